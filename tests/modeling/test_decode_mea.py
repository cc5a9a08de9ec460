import importlib.util
import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from test_modeling_mea import HEAD_DIM, HEADS, KEYS, PAIRS, VALUES, build, decode, forward, spec, tokens
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mea_compress.modeling import attention_mea, configuration_mea, modeling_mea
from mea_compress.modeling.decode_mea import (
    absorb_is_faster,
    add_mask,
    key_scores,
    may_fuse,
    readable_mask,
    softmax,
    weighted_values,
)
from mea_compress.modeling.reference import reference_attention
from mea_compress.modeling.section_mea import FORM_OF

pytestmark = pytest.mark.usefixtures("exact_norms")
EVERY_PAIR = [*((keys, values) for keys, values in itertools.product(KEYS, VALUES)), ("joint", "joint")]
# Largest difference of an attention block's output from the reference in float64, relative to its largest element.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def attention_of(family, keys, values, head_norm, dtype=torch.float64):
    model = build(family, keys, values, head_norm)
    for layer in model.model.layers:
        layer.self_attn.config.mea["decode"] = "absorb"
    return model.to(dtype)


def decode_layer(model, hidden, prefix, steps, cache=None, mask=None, positions=None):
    """Outputs of the first layer's attention for the tokens after a prefix, `steps` at a time."""
    attention, length = model.model.layers[0].self_attn, hidden.shape[1]
    positions = torch.arange(length)[None] if positions is None else positions
    cache = DynamicCache() if cache is None else cache
    outputs, start = [], 0
    for stop in [prefix, *range(prefix + steps, length + 1, steps)]:
        cos, sin = model.model.rotary_emb(hidden, positions[:, start:stop])
        visible = torch.ones(length, length).tril().bool()[None, None, start:stop, :stop]
        if mask is not None:
            visible = visible & mask[:, None, None, :stop]
        output, _ = attention(
            hidden[:, start:stop],
            (cos, sin),
            visible if steps > 1 or start == 0 or mask is not None else None,
            past_key_values=cache,
            position_ids=positions[:, start:stop],
        )
        outputs.append(output)
        start = stop
    return torch.cat(outputs[1:], 1), cache


def expected_of(model, hidden, prefix, present=None):
    """The reference, in float64, for one sequence (T, D); rows after the prefix."""
    model = build_like(model)
    hidden, length = hidden.double(), hidden.shape[0]
    cos, sin = model.model.rotary_emb(hidden[None], torch.arange(length)[None])
    visible = torch.ones(length, length).tril().bool()
    if present is not None:
        visible = visible & present[None]
    return reference_attention(model.model.layers[0].self_attn, hidden, cos[0], sin[0], visible)[prefix:]


def build_like(model):
    twin = type(model)(model.config).double()
    twin.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    return twin.eval()


@pytest.fixture
def absorbing(monkeypatch):
    """Counts how often an attention block read components as they lie."""
    calls = []
    attend = attention_mea.MeaAttention.attend_to_components

    def counted(self, *arguments):
        calls.append(self.layer_idx)
        return attend(self, *arguments)

    monkeypatch.setattr(attention_mea.MeaAttention, "attend_to_components", counted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("keys", "values"), EVERY_PAIR)
def test_absorbed_attention_equals_the_reference(keys, values, steps, dtype, absorbing, monkeypatch):
    monkeypatch.setattr(attention_mea, "TILE", 4)  # several tiles of a small cache
    for family, head_norm in itertools.product(("Llama", "Qwen3"), (False, True)):
        model = attention_of(family, keys, values, head_norm, dtype)
        hidden = torch.randn(1, 13, model.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
        absorbing.clear()
        with torch.no_grad():
            found, _ = decode_layer(model, hidden, 7, steps)
            expected = expected_of(model, hidden[0], 7)
        assert len(absorbing) == 1 + 6 // steps
        error = (found[0].double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[dtype], (family, head_norm)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("keys", "values"), [*PAIRS, ("joint", "joint")])
def test_padded_tokens_are_not_seen(keys, values, family, steps, absorbing):
    model = attention_of(family, keys, values, True)
    hidden = torch.randn(3, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    present = torch.ones(3, 12).bool()
    present[0, :4] = False
    present[1, 3:6] = False
    with torch.no_grad():
        found, _ = decode_layer(model, hidden, 8, steps, mask=present)
        for row in range(3):
            expected = expected_of(model, hidden[row], 8, present[row])
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-9)
    assert absorbing


@pytest.mark.parametrize("chosen", ["absorb", "auto"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
@pytest.mark.parametrize(("keys", "values"), PAIRS)
def test_a_decoded_step_is_the_same_absorbed_and_expanded(keys, values, family, chosen, absorbing):
    changes = {"sliding_window": 4} if family == "Mistral" else {}
    model = build(family, keys, values, **changes)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    model.config.mea["decode"] = "expand"
    expected, _ = decode(model, ids, 6, attention_mask=mask)
    assert not absorbing
    model.config.mea["decode"] = chosen
    found, _ = decode(model, ids, 6, attention_mask=mask)
    assert absorbing
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-9)


@pytest.mark.parametrize("keys", KEYS)
def test_a_static_cache_is_read_as_far_as_it_is_filled(keys, absorbing):
    model = build("Qwen3", keys, "latent")
    ids = tokens(2, 10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        steps = [model(ids[:, :6], past_key_values=cache).logits]
        steps += [model(ids[:, [i]], past_key_values=cache).logits for i in range(6, 10)]
    torch.testing.assert_close(torch.cat(steps, 1), forward(model, ids), rtol=0, atol=1e-9)
    assert absorbing


def test_the_cache_that_generate_fills_holds_components_only():
    for family, keys, values in (("Llama", "head", "head"), ("Qwen3", "head", "latent"), ("Llama", "none", "none")):
        model = build(family, keys, values, dtype=torch.float32)
        output = model.generate(tokens(2, 6), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        layer = output.past_key_values.layers[0]
        stored = (layer.keys.numel() + layer.values.numel()) / (2 * layer.keys.shape[-2])
        components = spec(keys, values)["key_components"] + spec(keys, values)["value_components"]
        norms = HEADS if family == "Qwen3" else 0
        assert stored == components * HEAD_DIM + norms


MASKS = {
    "boolean": torch.tensor([[True, True, False, True], [False, True, True, True]]),
    "integer": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]),
}


@pytest.mark.parametrize("kind", ["boolean", "integer", "additive", "four", "longer"])
def test_every_form_of_a_mask_hides_the_same(kind):
    logits = torch.randn(2, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    seen = MASKS["boolean"][:, None, None]
    mask = MASKS.get(kind, seen)
    if kind == "additive":
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    if kind == "longer":
        mask = torch.cat((seen, torch.zeros(2, 1, 1, 3).bool()), -1)
    assert readable_mask(mask, 1)
    expected = logits.masked_fill(~seen, -1e30).softmax(-1)
    torch.testing.assert_close(add_mask(logits, mask).softmax(-1), expected, rtol=0, atol=0)


def test_masks_that_are_not_understood_are_left_to_the_attention_implementation():
    assert readable_mask(None, 1)
    assert not readable_mask(None, 2)
    assert not readable_mask(MASKS["boolean"], 2)
    assert not readable_mask(object(), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cpu_products_equal_the_batched_ones(dtype):
    generator = torch.Generator().manual_seed(0)
    queries, weights = (torch.randn(2, 3, 5, width, generator=generator).to(dtype) for width in (16, 11))
    cached = torch.randn(2, 3, 11, 20, generator=generator).to(dtype)[..., :16]  # as beside norm scalars
    with torch.no_grad():
        found = (key_scores(queries, cached), weighted_values(weights, cached))
    expected = (queries.double() @ cached.double().mT, weights.double() @ cached.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=20 * torch.finfo(dtype).eps)


FLAT = [*itertools.product(("head", "prune", "share", "frequency"), ("head", "prune", "share", "latent"))]


def plain_products(queries, keys, values, norms, mask, tokens):
    """What a kernel replaces: queries (B, 1, Hq * Q, W) against flat components, step after step."""
    logits = key_scores(queries, keys)[:, 0].unflatten(1, (-1, tokens))  # (B, Hq, Q, T)
    if norms is not None:
        logits = logits * norms.mT.repeat_interleave(logits.shape[1] // norms.shape[-1], 1)[:, :, None]
    weights = softmax(add_mask(logits, mask)).to(values.dtype)
    return weighted_values(weights.flatten(1, 2)[:, None], values)


def mask_of(kind, batch, heads, tokens, length):
    """Masks that leave every row something to see."""
    seen = torch.rand(batch, heads, tokens, length, generator=torch.Generator().manual_seed(4)) > 0.4
    seen[..., 0] = True
    longer = torch.cat((seen, torch.zeros(batch, heads, tokens, 3).bool()), -1)
    return {
        "none": None,
        "boolean": seen[:, :1],
        "of one sequence": seen[:1, :1],
        "of every head": seen,
        "integer": seen[:, 0, 0].long(),
        "additive": torch.where(seen[:, :1], 0.0, torch.finfo(torch.float32).min),
        "distances": torch.randn(1, heads, tokens, length, generator=torch.Generator().manual_seed(5)),
        "longer": longer[:, :1],
    }[kind]


MASK_KINDS = ("none", "boolean", "of one sequence", "of every head", "integer", "additive", "distances", "longer")


def parts(tokens, norms, dtype, device="cpu", length=13, key_width=24, value_width=16, batch=2, heads=4, groups=2):
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, heads * tokens, key_width), (1, length, key_width), (1, length, value_width)]
    found = [torch.randn(batch, *shape, generator=generator).to(device, dtype) for shape in shapes]
    found[0] *= key_width**-0.5
    scales = 0.5 + torch.rand(batch, length, groups, generator=generator).to(device, dtype)
    if norms:  # the cache holds them beside the keys
        cached = torch.cat((found[1], scales[:, None]), dim=-1)
        found[1], scales = cached[..., :key_width], cached[:, 0, :, key_width:]
    return *found, scales if norms else None


def test_no_kernel_is_asked_for_where_there_is_none():
    for dtype in (torch.float16, torch.float64):
        assert not may_fuse(*(torch.zeros(1, dtype=dtype) for _ in range(3)))
    on_another = torch.zeros(1, device="meta")
    assert not may_fuse(on_another, on_another, on_another)
    with torch.no_grad():
        assert not may_fuse(on_another, on_another)
    assert not may_fuse(torch.zeros(1), on_another, on_another)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_step_decoded_on_a_gpu_is_the_same_absorbed_and_expanded(family):
    model = build(family, "head", "latent", dtype=torch.float32, num_attention_heads=8).cuda()
    ids, found = tokens(2, 12).cuda(), {}
    for choice in ("expand", "absorb"):
        model.config.mea["decode"] = choice
        found[choice], _ = decode(model, ids, 6)
    torch.testing.assert_close(found["absorb"], found["expand"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("trained", ["all", "composition"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_flow_through_a_decoded_step(dtype, trained):
    model = build("Qwen3", "frequency", "latent", head_norm=True, dtype=dtype)
    model.requires_grad_(trained == "all")
    for layer in model.model.layers:
        layer.self_attn.key_composition.requires_grad_()
    ids, gradients = tokens(1, 8), []
    for choice in ("absorb", "expand"):
        model.config.mea["decode"] = choice
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        model(ids[:, :7], past_key_values=cache)
        model(ids[:, 7:], past_key_values=cache).logits.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*gradients, strict=True):
        scale = other.abs().max().clamp(min=1)
        assert (one - other).abs().max() < {torch.float32: 1e-4, torch.float64: 1e-8}[dtype] * scale


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and shutil.which("g++") is None, reason="torch.compile needs a compiler"
)
@pytest.mark.parametrize(("keys", "values"), [("head", "head"), ("frequency", "latent"), ("latent", "pool")])
def test_a_decoded_step_compiles_without_a_graph_break(keys, values):
    torch._dynamo.reset()
    model = build("Qwen3", keys, values, head_norm=True)
    ids = tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        steps = [model(ids[:, :6], past_key_values=cache).logits]
        for i in range(6, 9):
            position = torch.tensor([[i]])
            steps.append(step(ids[:, [i]], position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), forward(model, ids), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_a_compiled_step_runs_in_generated_code():
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    model = build("Llama", "head", "head", dtype=torch.float32, num_hidden_layers=2)
    ids = tokens(1, 8)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        found = step(ids[:, 7:], position_ids=torch.tensor([[7]]), past_key_values=cache).logits
    torch.testing.assert_close(found, forward(model, ids)[:, 7:], rtol=0, atol=1e-4)


LLAMA_8B = {"query_heads": 32, "heads": 8, "head_dim": 128}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["head", "prune", "share", "frequency"])
def test_one_token_absorbs_and_a_prompt_expands(kind, device):
    for values in ("head", "latent"):
        sides = ((FORM_OF[kind], 4), (FORM_OF[values], 4))
        assert absorb_is_faster(*sides, **LLAMA_8B, tokens=1, device=device)
        assert not absorb_is_faster(*sides, **LLAMA_8B, tokens=4096, device=device)


def test_more_queries_per_head_favour_expanding():
    sides = ((FORM_OF["head"], 8), (FORM_OF["head"], 8))
    for device in ("cpu", "cuda"):
        few = absorb_is_faster(*sides, query_heads=16, heads=16, head_dim=64, tokens=1, device=device)
        many = absorb_is_faster(*sides, query_heads=2048, heads=16, head_dim=64, tokens=1, device=device)
        assert few and not many


def test_a_few_new_tokens_absorb_on_a_cpu():
    """Measured there: 8 tokens take a third to a seventh of the time, 256 take two to three times as long."""
    for kinds in (("head", "head"), ("frequency", "latent")):
        for head_dim in (64, 128):
            shape = {"query_heads": 32, "heads": 8, "head_dim": head_dim, "device": "cpu"}
            sides = [(FORM_OF[kind], 4) for kind in kinds]
            assert absorb_is_faster(*sides, **shape, tokens=8)
            assert not absorb_is_faster(*sides, **shape, tokens=256)


def test_plain_heads_are_read_at_once_by_a_single_token_only():
    sides = ((FORM_OF["pool"], 4), (FORM_OF["none"], 8))
    assert absorb_is_faster(*sides, **LLAMA_8B, tokens=1, device="cpu")
    assert not absorb_is_faster(*sides, **LLAMA_8B, tokens=2, device="cpu")


def test_eager_attention_stays_as_written(absorbing):
    model = build("Llama", "head", "head", attention="eager", dtype=torch.float32)
    model.config.mea["decode"] = "absorb"
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(tokens(1, 5), past_key_values=cache)
        output = model(tokens(1, 1), past_key_values=cache, output_attentions=True)
    assert not absorbing
    assert output.attentions[0].shape == (1, 8, 1, 6)


@pytest.mark.parametrize("kinds", [("head", "head"), ("frequency", "latent"), ("latent", "latent"), ("pool", "pool")])
def test_an_attention_put_in_place_of_sdpa_is_called(kinds, absorbing, monkeypatch):
    """As kvpress does, which hides tokens in there."""
    model, ids, calls = build("Llama", *kinds, dtype=torch.float32), tokens(1, 8), []
    model.config.mea["decode"] = "absorb"
    expected = decode(model, ids, 5)[0]
    assert absorbing
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, key, value, *arguments, **options):
        calls.append(key.shape)
        return stock(module, query, key, 2 * value, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", attend)
    absorbing.clear()
    found = decode(model, ids, 5)[0]
    assert not absorbing and calls[-1][2:] == (8, 8)
    assert not torch.allclose(found, expected, atol=1e-2)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="decode is one of auto, absorb, expand"):
        configuration_mea.MeaLlamaConfig(mea={"decode": "fast"})


LOAD = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] == "mea_compress":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.process
def test_the_code_files_stand_on_their_own(tmp_path):
    from mea_compress.emit.code import CODE_FILES

    model = build("Llama", "frequency", "latent", dtype=torch.float32)
    model.config.auto_map = {
        "AutoConfig": "configuration_mea.MeaLlamaConfig",
        "AutoModelForCausalLM": "modeling_mea.MeaLlamaForCausalLM",
    }
    model.save_pretrained(tmp_path / "model")
    for name in CODE_FILES:
        shutil.copy(modeling_mea.__file__.replace("modeling_mea.py", name), tmp_path / "model" / name)
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert loaded.returncode == 0, loaded.stderr
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist()
    assert loaded.stdout.strip().endswith(str(expected))
