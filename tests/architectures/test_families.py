"""Every family against transformers' own class: what `tiny.CASES` lists is what is supported."""

import json
from functools import cache

import pytest
import torch
from remote import remote_logits
from tiny import CASES, SIZES, contents, save, stock_checkpoint, stock_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from mea_compress.architectures import FAMILIES
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe

COMPOSITIONS = {"head": ("head", "head"), "frequency": ("frequency", "latent")}


def recipe(ratio, compositions="head", **more):
    keys, values = COMPOSITIONS[compositions]
    return Recipe(kv_ratio=ratio, fit="weights", key_composition=keys, value_composition=values, **more)


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager", **options)


def tokens(*shape):
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Each case's checkpoint at half its cache, made when first asked for."""

    @cache
    def half(case, compositions="head"):
        directory = tmp_path_factory.mktemp("half")
        stock_checkpoint(directory / "source", case)
        compress(directory / "source", directory / "out", recipe=recipe(0.5, compositions), progress=False)
        return directory / "out"

    return half


def test_every_family_has_a_case():
    assert {kind.model_type for kind, _ in CASES.values()} == {family.model_type for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("case", CASES)
def test_at_ratio_one_logits_are_the_original_s(case, dtype, tolerance, tmp_path):
    stock_checkpoint(tmp_path / "source", case, dtype)
    original = load(tmp_path / "source")
    assert original.dtype == dtype
    ids = tokens(2, 12)
    expected = logits(original, ids)
    for compositions in COMPOSITIONS:
        out = tmp_path / compositions
        compress(tmp_path / "source", out, recipe=recipe(1.0, compositions), progress=False)
        compressed = load(out)
        assert compressed.dtype == dtype
        torch.testing.assert_close(logits(compressed, ids), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("compositions", COMPOSITIONS)
@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached_and_the_cache_is_half(case, compositions, halves):
    out = halves(case, compositions)
    model = load(out, dtype=torch.float64)
    ids, cache = tokens(2, 12), DynamicCache()  # without a configuration no token slides out of it
    steps = [logits(model, ids[:, :5], past_key_values=cache)]
    steps += [logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, ids, use_cache=False), rtol=0, atol=1e-9)

    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    scalars = config.num_key_value_heads if config.mea["qk_norm"] else 0  # 1/rms of every composed head
    numbers = config.num_hidden_layers * (config.num_key_value_heads * head_dim + scalars)
    assert held == 8 * numbers * ids.numel()
    assert make_plan(out, Recipe()).bytes_before == 4 * numbers


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("case", CASES)
def test_padding_on_the_left_changes_nothing(case, halves):
    model = load(halves(case), dtype=torch.float64)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[0, 4:], logits(model, ids[:1, 4:])[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_generate(case, halves):
    model = load(halves(case))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = tokens(2, 7)
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape == (2, 15)


@pytest.mark.parametrize("case", CASES)
def test_saving_and_loading_changes_nothing(case, halves, tmp_path):
    model = load(halves(case, "frequency"))
    save(model, tmp_path)
    again = load(tmp_path)
    ids = tokens(1, 9)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.config.mea == model.config.mea
    tied = model.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == bool(tied)


@pytest.mark.process
def test_every_family_loads_as_remote_code_where_the_package_is_absent(halves, tmp_path):
    outs = [halves(case, compositions) for case in CASES for compositions in COMPOSITIONS]
    ids = tokens(2, 9)
    for out, found in remote_logits(outs, ids, tmp_path).items():
        torch.testing.assert_close(found, logits(load(out), ids), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "qwen3", "phi3"])
def test_a_compressed_checkpoint_is_a_source_again(case, halves, tmp_path):
    half = halves(case)
    ids = tokens(1, 10)
    compress(half, tmp_path / "same", recipe=recipe(1.0), progress=False)
    assert torch.equal(logits(load(tmp_path / "same"), ids), logits(load(half), ids))
    result = compress(half, tmp_path / "quarter", recipe=recipe(0.5), progress=False)
    before, after = result.plan.bytes_before, result.plan.bytes_after
    scalars = 2 * 4 * 4 if case == "qwen3" else 0
    assert after - scalars == (before - scalars) / 2
    assert load(tmp_path / "quarter").config.mea["layers"][0]["key_components"] == 1


@pytest.mark.parametrize("case", ["llama", "phi3", "qwen3_moe"])
def test_layers_that_are_not_chosen_stay_as_they_are(case, tmp_path):
    stock_checkpoint(tmp_path / "source", case, num_hidden_layers=3)
    compress(tmp_path / "source", tmp_path / "out", recipe=recipe(0.5, layers="1"), progress=False)
    before, after = load(tmp_path / "source"), load(tmp_path / "out")
    kinds = [layer["key_composition"] for layer in after.config.mea["layers"]]
    assert kinds == ["none", "head", "none"]
    with torch.no_grad():
        before.model.layers[1].self_attn = after.model.layers[1].self_attn
    ids = tokens(1, 8)
    torch.testing.assert_close(logits(after, ids), logits(before, ids), rtol=0, atol=1e-5)


REFUSED = {
    "deepseek_v3": "MLA",
    "gpt2": r"tensor transformer\.\S+ is missing",
    "lama": "did you mean llama",
    "clip": "this release of transformers knows",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_whose_attention_does_not_fit_are_refused(model_type, tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"model_type": model_type, "architectures": None}
    (source / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path)
    with pytest.raises(RequestError, match=REFUSED[model_type]) as refusal:
        compress(source, tmp_path / "out", recipe=recipe(0.5), progress=False)
    assert "\n" not in str(refusal.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "kv_lora_rank", "quantization_config"])
def test_settings_that_change_attention_are_refused(key, tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    config = (source / "config.json").read_text().replace('"model_type"', f'"{key}": 8, "model_type"')
    (source / "config.json").write_text(config)
    with pytest.raises(RequestError, match=key):
        make_plan(source, recipe(0.5))


def test_the_emitted_type_is_no_stock_type(halves):
    for case in CASES:
        config = AutoConfig.from_pretrained(halves(case))
        assert config.model_type == "mea_" + CASES[case][0].model_type


def test_a_checkpoint_in_half_precision_stays_in_it(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        save(stock_model("llama", dtype), tmp_path / name)
        result = compress(tmp_path / name, tmp_path / f"{name}-out", recipe=recipe(0.5), progress=False)
        assert load(tmp_path / f"{name}-out").dtype == dtype
        assert result.fidelity["verification"]["kv_bytes_per_token"] == result.plan.bytes_before // 2
