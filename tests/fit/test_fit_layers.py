"""Layers fitted in order: better than the baseline, never worse for refining, the same after a stop, the same twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from letters import character_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from tiny import contents, stock_checkpoint, stock_model
from transformers import AutoModelForCausalLM

from mea_compress.architectures import open_checkpoint
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.fit import layers as fitting
from mea_compress.layers.read import read_side
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe
from mea_compress.text.sampling import sample_sequences

QUICK = {"sequence_length": 32, "sequences": 24, "kv_ratio": 0.5}
PAIRS = [
    ("head", "head"),
    ("frequency", "latent"),
    ("latent", "latent"),
    ("joint", "joint"),
    ("pool", "pool"),
    ("prune", "prune"),
    ("share", "share"),
    ("pool", "head"),
]


def recipe(**changes):
    return Recipe(**{**QUICK, "refine": 0, **changes})


def sampled(source):
    """Text that the original itself says, as it is calibrated on, but other than that."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    return sample_sequences(model, None, 32, 32, seed=5, progress=False)


def kl(source, out):
    """KL(original ‖ compressed) on text of the original's own, nats/token."""
    ids = sampled(source)
    with torch.no_grad():
        p, q = (AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits.log_softmax(-1) for path in (source, out))
    return float((p.exp() * (p - q)).sum(-1).mean())


def kl_of_no_attention(source):
    """KL of the original from itself with values that are all zero, on the same text."""
    ids = sampled(source)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        p = model(ids).logits.log_softmax(-1)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
        q = model(ids).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_every_pair_of_compositions_is_refined_and_loads(case, keys, values, tmp_path):
    source = stock_checkpoint(tmp_path / "src", case)
    result = compress(
        source,
        tmp_path / "out",
        recipe=recipe(key_composition=keys, value_composition=values, refine=6),
        progress=False,
    )
    assert set(result.fidelity["layers"]) == {"0", "1"}
    assert -1e-6 < kl(source, tmp_path / "out") < 0.75 * kl_of_no_attention(source)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "phi3-partial"])
def test_default_fit_is_closer_than_the_papers_start(case, tmp_path):
    source = stock_checkpoint(tmp_path / "src", case)
    paper = recipe(fit="weights", key_composition="head", value_composition="head")
    compress(source, tmp_path / "paper", recipe=paper, progress=False)
    compress(source, tmp_path / "ours", recipe=recipe(refine=10), progress=False)
    assert kl(source, tmp_path / "ours") < kl(source, tmp_path / "paper")


@pytest.mark.slow
def test_kept_heads_stay_bit_identical_through_refinement(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    compress(
        source,
        tmp_path / "out",
        recipe=recipe(key_composition="prune", value_composition="prune", refine=4, split="even"),
        progress=False,
    )
    emitted, original = open_checkpoint(tmp_path / "out"), open_checkpoint(source)
    for side in ("key", "value"):
        rows = emitted.reader.read_array(f"model.layers.0.self_attn.{side[0]}_proj.weight")
        components = rows.reshape(2, -1, rows.shape[1])
        heads = read_side(original, 0, side)[..., :-1]
        assert sum(any(np.array_equal(head, component) for head in heads) for component in components) == 2


@pytest.mark.slow
@pytest.mark.parametrize("refine", [0, 3])
def test_same_bytes_twice_and_after_an_interruption(refine, tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src", num_hidden_layers=3)
    wanted = recipe(refine=refine)
    compress(source, tmp_path / "a", recipe=wanted, progress=False)
    real, calls = fitting.write_checkpoint, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # the text, the first layer, the second
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(fitting, "write_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "b", recipe=wanted, progress=False)
    monkeypatch.setattr(fitting, "write_checkpoint", real)
    assert not (tmp_path / "b").exists()
    compress(source, tmp_path / "b", recipe=wanted, resume=True, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_sequential_statistics_and_partial_layers(tmp_path):
    source = stock_checkpoint(tmp_path / "src", num_hidden_layers=3)
    result = compress(source, tmp_path / "out", recipe=recipe(layers="1-2", statistics="sequential"), progress=False)
    assert [layer.compressed for layer in result.plan.layers] == [False, True, True]
    assert (
        json.loads((tmp_path / "out" / "compression.json").read_text())["plan"]["layers"][0]["key_composition"]
        == "none"
    )


def test_calibration_text_begins_as_the_recipe_says(tmp_path):
    source = tmp_path / "src"
    tiny_llama().save_pretrained(source)
    character_tokenizer().save_pretrained(source)
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)

    def tokens(**changes):
        wanted = Recipe(kv_ratio=0.5, sequences=4, sequence_length=16, device="cpu", **changes)
        return fitting.calibration_tokens(make_plan(source, wanted), progress=False)

    for text in (tmp_path / "a.txt", [tmp_path / "a.txt", tmp_path], None):
        assert (tokens(text=text)[:, 0] == 1).all() and not (tokens(text=text, bos="never") == 1).all(1).any()
        assert not (tokens(text=text, bos="never")[:, 0] == 1).any()
        assert torch.equal(tokens(text=text), tokens(text=text))
        assert not torch.equal(tokens(text=text), tokens(text=text, seed=1))


def test_a_run_is_taken_up_with_the_same_texts_alone(tmp_path, monkeypatch):
    source = tmp_path / "src"
    tiny_llama(max_position_embeddings=256).save_pretrained(source)
    character_tokenizer().save_pretrained(source)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in texts:
        path.write_text("the quick brown fox jumps over the lazy dog " * 40)
    wanted = Recipe(kv_ratio=0.5, text=texts, sequences=8, sequence_length=64, refine=0, device="cpu")
    real = fitting.compose
    monkeypatch.setattr(fitting, "compose", lambda plan, layer, _: stop() if layer.layer else real(plan, layer, _))
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", recipe=wanted, progress=False)
    monkeypatch.setattr(fitting, "compose", real)
    texts[1].write_text("another text")
    with pytest.raises(RequestError, match="the calibration text"):
        compress(source, tmp_path / "out", recipe=wanted, resume=True, progress=False)
    texts[1].unlink()
    with pytest.raises(RequestError, match=r"b\.txt does not exist"):
        compress(source, tmp_path / "out", recipe=wanted, resume=True, progress=False)


def stop():
    raise KeyboardInterrupt


def test_text_that_is_too_short_leaves_nothing(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    with pytest.raises(RequestError, match="tokens"):
        compress(source, tmp_path / "out", recipe=recipe(sequences=1), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.slow
def test_refinement_holds_a_sequence_out_even_of_few(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    few = {"sequence_length": 64, "sequences": 3, "refine": 4}
    layers = compress(source, tmp_path / "out", recipe=recipe(**few), progress=False).fidelity["layers"]
    assert all(np.isfinite(layer["refinement"]["before"]) for layer in layers.values())
    one = {"sequence_length": 256, "sequences": 1, "refine": 4}
    with pytest.raises(RequestError, match="`sequences` 2"):
        compress(source, tmp_path / "again", recipe=recipe(**one), progress=False)
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("fit", ["weights", "aligned"])
def test_projections_that_are_all_zero_stay_finite(name, fit, tmp_path):
    """Models that were made deeper begin with such layers."""
    source = stock_checkpoint(tmp_path / "src")
    weights = load_file(source / "model.safetensors")
    weights[f"model.layers.1.self_attn.{name}.weight"].zero_()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for keys, values in PAIRS:
        budget = None if name == "k_proj" else "uniform"  # a profile is measured of one of them
        wanted = recipe(fit=fit, key_composition=keys, value_composition=values, budget=budget, heal=2)
        compress(source, tmp_path / f"{keys}-{values}", recipe=wanted, progress=False)
        for tensor in load_file(tmp_path / f"{keys}-{values}" / "model.safetensors").values():
            assert tensor.isfinite().all()


def test_refinement_is_on_with_the_aligned_fit_alone(tmp_path):
    source = stock_checkpoint(tmp_path / "src")

    def steps(**changes):
        return make_plan(source, Recipe(kv_ratio=0.5, **changes)).decisions.refinement_steps

    assert steps() > 0
    assert steps(fit="weights") == steps(fit="activations") == 0
    assert steps(fit="weights", refine=7) == 7


def test_where_refinement_follows_ways_to_divide_a_budget_are_tried_by_its_steps(tmp_path, monkeypatch):
    source, tried, real = stock_checkpoint(tmp_path / "src"), [], fitting.CalibratedFit._refine

    def last_wins(self, layer, composed, settings):
        refined = real(self, layer, composed, settings)
        if settings is not self.split_trial:
            return refined
        tried.append(refined.after)
        return replace(refined, after=-len(tried))

    monkeypatch.setattr(fitting.CalibratedFit, "_refine", last_wins)
    for refine in (0, 3):
        wanted = recipe(refine=refine, budget="uniform", heal="0")
        layers = compress(source, tmp_path / f"{refine}", recipe=wanted, progress=False).plan.layers
        assert len(tried) == (5 * len(layers) if refine else 0)
    assert all(layer.spec.key.components > layer.spec.value.components for layer in layers)  # seven to three
    assert all(error < 1 for error in tried)


@pytest.mark.slow
def test_native_mea_with_head_norm_goes_the_same_way(tmp_path):
    from mea_compress.modeling.configuration_mea import MeaLlamaConfig
    from mea_compress.modeling.modeling_mea import MeaLlamaForCausalLM

    sizes = {**stock_model("llama").config.to_dict()}
    sizes = {
        k: v for k, v in sizes.items() if k not in ("model_type", "architectures", "dtype", "transformers_version")
    }
    torch.manual_seed(0)
    model = MeaLlamaForCausalLM(MeaLlamaConfig(**sizes, mea={"head_norm": True})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "composition" in name else 0.2))
    model.save_pretrained(tmp_path / "src")
    paper = recipe(fit="weights", key_composition="head", value_composition="head")
    compress(tmp_path / "src", tmp_path / "paper", recipe=paper, progress=False)
    compress(tmp_path / "src", tmp_path / "ours", recipe=recipe(refine=10), progress=False)
    assert kl(tmp_path / "src", tmp_path / "ours") < kl(tmp_path / "src", tmp_path / "paper")
