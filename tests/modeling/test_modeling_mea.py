import copy
import itertools

import pytest
import torch
from tiny import SIZES, save, scatter
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mea_compress.modeling import configuration_mea, modeling_mea
from mea_compress.modeling.attention_mea import read_position, write_position
from mea_compress.modeling.reference import reference_attention

FAMILIES = [config.__name__.removeprefix("Mea").removesuffix("Config") for config in configuration_mea.CONFIGS]
TRAITS = {
    "Phi3": {"hidden_size": 64, "partial_rotary_factor": 0.5},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
KEYS = ("none", "head", "frequency", "latent", "pool", "prune", "share")
VALUES = ("none", "head", "latent", "pool", "prune", "share")
# Every family with every kind of keys; every pair of kinds once.
PAIRS = (
    ("none", "none"),
    ("head", "head"),
    ("frequency", "latent"),
    ("latent", "latent"),
    ("pool", "pool"),
    ("pool", "head"),
    ("prune", "share"),
    ("share", "none"),
)
HEADS, HEAD_DIM = 4, 8
EXACT = {"sdpa": (torch.float64, 1e-9), "eager": (torch.float32, 1e-4)}
pytestmark = pytest.mark.usefixtures("exact_norms")


def spec(keys, values, components=2):
    layer = {
        "key_composition": keys,
        "key_components": HEADS if keys == "none" else components,
        "value_composition": values,
        "value_components": HEADS if values == "none" else components,
    }
    if keys == "frequency":
        layer["rotary_components"] = [1, 3, 0, 4]
    return layer


def build(family, keys, values, head_norm=False, attention="sdpa", dtype=torch.float64, **changes):
    kind = getattr(configuration_mea, f"Mea{family}Config")
    traits = TRAITS.get(family, {"head_dim": HEAD_DIM})
    mea = {"head_norm": head_norm, "layers": [spec(keys, values) for _ in range(2)]}
    config = kind(**{**SIZES, **traits, **changes}, mea=mea, attn_implementation=attention)
    config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scatter(getattr(modeling_mea, f"Mea{family}ForCausalLM")(config).to(dtype))


def tokens(*shape):
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(5))


def decode(model, ids, split, **options):
    """Logits of a prefill of `split` tokens and of the remaining ones in steps of one, two, one, two, ..."""
    with torch.no_grad():
        mask = options.pop("attention_mask", None)
        cache = DynamicCache(config=model.config)
        steps, start, sizes = [], 0, itertools.chain([split], itertools.cycle([1, 2]))
        while start < ids.shape[1]:
            stop = min(ids.shape[1], start + next(sizes))
            given = {} if mask is None else {"attention_mask": mask[:, :stop]}
            given |= {name: value[:, start:stop] for name, value in options.items()}
            steps.append(model(ids[:, start:stop], past_key_values=cache, **given).logits)
            start = stop
    return torch.cat(steps, 1), cache


def forward(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def widths(model, keys, values):
    beside = HEADS if model.config.mea["qk_norm"] and keys in ("head", "frequency", "prune", "share") else 0
    beside = 3 if keys == "latent" else beside  # digits of the position
    layer = spec(keys, values)
    return layer["key_components"] * HEAD_DIM + beside, layer["value_components"] * HEAD_DIM


CASES = [
    *((family, *pair, norm) for family in FAMILIES for pair in PAIRS for norm in (False, True)),
    *(("Qwen3", *pair, False) for pair in itertools.product(KEYS, VALUES) if pair not in PAIRS),
]


@pytest.mark.parametrize(("family", "keys", "values", "head_norm"), CASES)
def test_cached_decode_equals_the_uncached_forward_pass_and_the_reference(family, keys, values, head_norm):
    model = build(family, keys, values, head_norm)
    ids = tokens(2, 12)
    found, cache = decode(model, ids, 6)
    torch.testing.assert_close(found, forward(model, ids), rtol=0, atol=1e-9)
    assert [layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.layers] == [widths(model, keys, values)[0]] * 2
    assert [layer.values.shape[1] * layer.values.shape[3] for layer in cache.layers] == [
        widths(model, keys, values)[1]
    ] * 2

    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 12, model.config.hidden_size, dtype=torch.float64)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(12)[None])
    visible = torch.ones(12, 12).tril().bool()
    with torch.no_grad():
        found = attention(hidden, (cos, sin), visible[None, None], position_ids=torch.arange(12)[None])[0][0]
        expected = reference_attention(attention, hidden[0], cos[0], sin[0], visible)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["default", "counting"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("keys", "values"), [("head", "head"), ("frequency", "latent"), ("latent", "pool")])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_padding_changes_nothing(family, keys, values, side, positions, attention):
    # Transformers' eager attention is made for float32; its softmax is, and its mask is infinite beyond.
    model = build(family, keys, values, attention=attention, dtype=EXACT[attention][0])
    tolerance = EXACT[attention][1]
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    if side == "left":
        mask[0, :3] = 0
    else:
        mask[0, 5:] = 0
    more = tokens(2, 4)
    ids, mask = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    options = {"attention_mask": mask}
    if positions == "counting":
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    found = decode(model, ids, 8, **options)[0]
    whole = forward(model, ids, **options)
    seen = mask.bool()
    torch.testing.assert_close(found[seen], whole[seen], rtol=0, atol=tolerance)
    if side == "left" or positions == "counting":
        alone = forward(model, ids[:1, seen[0]])
        # Angles are in float32, so that the same tokens further on are not the same to the last digit.
        tolerance = tolerance if positions == "counting" else 1e-4
        torch.testing.assert_close(found[:1, seen[0]], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("keys", KEYS)
def test_sdpa_and_eager_agree(keys):
    model = build("Llama", keys, "head", head_norm=True)
    ids = tokens(2, 10)
    expected = forward(model, ids)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(forward(model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(("keys", "values"), PAIRS)
def test_a_sliding_window_hides_the_same_tokens_with_and_without_a_cache(keys, values, chunk):
    model = build("Mistral", keys, values, sliding_window=4)
    ids = tokens(2, 13)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start in [0, *range(7, 13, chunk)]:
            part = ids[:, start : 7 if start == 0 else min(13, start + chunk)]
            steps.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), forward(model, ids), rtol=0, atol=1e-9)
    assert cache.layers[0].keys.shape[-2] == 3


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize(("keys", "values"), [("head", "head"), ("frequency", "latent"), ("latent", "latent")])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_generate_with_a_cache_gives_what_it_gives_without(family, keys, values, implementation):
    model = build(family, keys, values)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, cache_implementation=implementation, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_beams_take_their_cache_with_them():
    model = build("Qwen3", "head", "latent")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    ids = tokens(2, 5)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("keys", "values"), [*PAIRS, ("joint", "joint")])
def test_continuous_batching_is_refused_at_once(keys, values, family):
    model = build(family, keys, values, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"continuous batching .* use generate, or export"):
        model.generate_batch(inputs=tokens(2, 6).tolist(), max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_as_it_was(family, tmp_path):
    model = build(family, "frequency", "latent", head_norm=True, dtype=torch.float32)
    ids = tokens(1, 9)
    save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.config.mea == model.config.mea
    torch.testing.assert_close(forward(loaded, ids), forward(model, ids), rtol=0, atol=0)
    assert set(loaded.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    for keys in KEYS:
        model = build("Qwen3", keys, "head", head_norm=True, dtype=dtype)
        logits, cache = decode(model, tokens(1, 6), 4)
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()
        assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == dtype


@pytest.mark.parametrize("keys", KEYS)
def test_every_new_parameter_gets_a_gradient(keys):
    model = build("Qwen3", keys, "latent", head_norm=True).train()
    model(tokens(1, 6), labels=tokens(1, 6)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_fresh_native_model_composes_heads_from_themselves():
    config = configuration_mea.MeaLlamaConfig(**SIZES, mea={"head_norm": True})
    model = modeling_mea.MeaLlamaForCausalLM(config)
    assert torch.equal(model.model.layers[0].self_attn.key_composition.weight, torch.eye(HEADS))
    assert "head_norm" in dict(model.model.layers[0].self_attn.named_children())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_positions_are_kept_exactly_in_every_dtype(dtype):
    positions = torch.tensor([[0, 1, 255, 256, 4097, 65_535, 65_536, 131_071, 1_048_577, 2**24 - 1]])
    digits = write_position(positions, torch.zeros(2, 10, 5, dtype=dtype))
    assert digits.shape == (2, 10, 3) and digits.dtype == dtype
    assert read_position(digits).tolist() == positions.expand(2, -1).tolist()


BAD = [
    ({"format": 2}, "format 2"),
    ({"layers": []}, "describes 0 layers"),
    ({"layers": [{}, {}]}, "unknown key_composition"),
    ({"layers": [spec("head", "head", components) for components in (2, 5)]}, "between 1 and 4"),
    ({"layers": [spec("head", "head", components) for components in (2, 0)]}, "between 1 and 4"),
    ({"layers": [spec("pool", "head", 3)] * 2}, "do not divide"),
    ({"layers": [spec("head", "frequency")] * 2}, "unknown value_composition"),
    ({"layers": [spec("frequency", "head", 3)] * 2}, "add up to 12"),
    ({"layers": [spec("frequency", "head") | {"rotary_components": [8]}] * 2}, "rotary_components"),
    ({"layers": [spec("none", "none") | {"key_components": 2}] * 2}, "caches all 4"),
]


@pytest.mark.parametrize(("section", "message"), BAD)
def test_an_impossible_section_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        configuration_mea.MeaLlamaConfig(**SIZES, head_dim=HEAD_DIM, mea=copy.deepcopy(section))


@pytest.mark.parametrize(("keys", "values"), [("frequency", "latent"), ("pool", "pool"), ("latent", "share")])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_an_engine_is_handed_every_head_and_may_answer_flat(family, keys, values, monkeypatch):
    """As vLLM runs remote code: no cache of transformers, pages for all heads, tokens that continue others."""
    model, ids = build(family, keys, values, head_norm=True), tokens(1, 9)

    def engine(module, query, key, value, attention_mask, **options):
        assert key.shape[1] == value.shape[1] == HEADS
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options["scaling"], enable_gqa=True
        )
        return output.transpose(1, 2).reshape(query.shape[2], -1), None

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", engine)
        model.config._attn_implementation = "vllm"
        found = model(ids, position_ids=torch.arange(5, 14)[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # RoPE sees differences of positions alone
