"""What a profile says is what a checkpoint with that one side compressed really costs."""

import json

import pytest
import torch
from test_every_family import FAMILIES, SIZES
from tiny import CASES, save, scatter, stock_checkpoint
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

import mea_compress as mc
from mea_compress.errors import RequestError
from mea_compress.fit import layers as fit_layers
from mea_compress.fit import profile as profiling
from mea_compress.fit import progress
from mea_compress.fit.layers import calibration_tokens, measured_tokens
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe

QUICK = {"sequence_length": 32, "sequences": 16}
WEIGHTS = {**QUICK, "fit": "weights", "key_composition": "head", "value_composition": "head"}


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def kl(source, out, ids):
    with torch.no_grad():
        p, q = (loaded(path)(ids).logits[:, :-1].log_softmax(-1) for path in (source, out))
    return float((p.exp() * (p - q)).sum(-1).mean())


def with_one_side(source, out, plan, point):
    """What compressing a point's side alone comes to."""
    heads = plan.source.config.num_key_value_heads
    counts = [{"layer": layer.layer, "key_components": heads, "value_components": heads} for layer in plan.layers]
    counts[point.layer][f"{point.side}_components"] = point.components
    file = out.with_suffix(".json")
    file.write_text(json.dumps({"layers": counts}))
    return mc.compress(source, out, recipe=plan.recipe, budget=str(file), progress=False)


@pytest.mark.parametrize("case", CASES)
def test_a_cost_is_that_of_a_checkpoint_with_this_side_compressed(case, tmp_path):
    source = stock_checkpoint(tmp_path / "source", case)
    profile = mc.profile(source, progress=False, **WEIGHTS)
    plan = make_plan(source, Recipe(kv_ratio=0.5, budget="uniform", **WEIGHTS))
    ids = calibration_tokens(plan, progress=False)
    ids = measured_tokens(plan, ids)
    point = next(point for point in profile.points if (point.layer, point.side) == (0, "key"))
    with_one_side(source, tmp_path / "out", plan, point)
    assert point.kl == pytest.approx(kl(source, tmp_path / "out", ids), rel=2e-3, abs=1e-7)


def test_costs_are_measured_on_the_beginnings_of_many_sequences(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "source")
    monkeypatch.setattr(progress, "_MEASURED_WINDOW", 12)
    monkeypatch.setattr(progress, "_MEASURED_TOKENS", 3 * 12)
    profile = mc.profile(source, progress=False, **WEIGHTS)
    plan = make_plan(source, Recipe(kv_ratio=0.5, budget="uniform", **WEIGHTS))
    ids = calibration_tokens(plan, progress=False)[:3, :12]
    assert profile.tokens == ids[:, 1:].numel()
    point = next(point for point in profile.points if (point.layer, point.side) == (profile.layers - 1, "value"))
    with_one_side(source, tmp_path / "out", plan, point)
    assert point.kl == pytest.approx(kl(source, tmp_path / "out", ids), rel=2e-3, abs=1e-7)
    options = {**QUICK, "kv_ratio": 0.5, "budget": "measured", "refine": 0, "heal": "0"}
    whole = mc.compress(source, tmp_path / "whole", progress=False, **options)
    assert whole.fidelity["budget"]["measured_kl"] == pytest.approx(kl(source, tmp_path / "whole", ids), rel=1e-2)


@pytest.fixture
def at_cache(tmp_path):
    """Makes a checkpoint of a family that is composed at its cache."""

    def make(family, **changes):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family][0] | changes)
        return save(scatter(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)), tmp_path / "source")

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_a_cost_at_the_cache_is_that_of_a_checkpoint_with_this_side_compressed(family, at_cache, tmp_path, monkeypatch):
    """Behind other layers, layers of other kinds, final norms and soft-capped logits."""
    source = at_cache(family)
    settings = {**QUICK, "fit": "activations", "refine": 0, "effort": "fast"}
    profile = mc.profile(source, progress=False, **settings)
    plan = make_plan(source, Recipe(kv_ratio=0.5, budget="measured", **settings))
    assert plan.decisions.measures_budget
    assert not make_plan(source, Recipe(kv_ratio=0.5, **settings)).decisions.measures_budget
    tokens = calibration_tokens(plan, progress=False)
    ids = measured_tokens(plan, tokens)
    fitted = tokens[len(ids) :]
    layers = [layer.layer for layer in plan.layers if layer.compressed]
    point = next(point for point in profile.points if (point.layer, point.side) == (layers[0], "value"))
    counts = [{"layer": layer, "key_components": 2, "value_components": 2} for layer in layers]
    counts[0]["value_components"] = point.components
    (tmp_path / "widths.json").write_text(json.dumps({"layers": counts}))
    options = {**settings, "kv_ratio": 0.5, "budget": str(tmp_path / "widths.json"), "sequences": len(fitted)}
    monkeypatch.setattr(fit_layers, "calibration_tokens", lambda *_: fitted)  # not what the cost was measured on
    mc.compress(source, tmp_path / "out", progress=False, **options)
    assert point.kl == pytest.approx(kl(source, tmp_path / "out", ids), rel=2e-3, abs=1e-7)


@pytest.mark.slow
def test_a_budget_at_the_cache_is_measured_where_it_is_asked_for(at_cache, tmp_path):
    source = at_cache("olmo2")
    settings = {**QUICK, "fit": "activations", "refine": 0, "effort": "fast", "kv_ratio": 0.5, "progress": False}
    result = mc.compress(source, tmp_path / "out", budget="measured", **settings)
    budget = result.fidelity["budget"]
    assert budget["measured_kl"] > 0 and budget["predicted_kl"] > 0
    assert result.plan.bytes_after <= result.plan.bytes_before / 2


def test_layers_that_differ_in_their_heads_have_no_profile(at_cache, tmp_path):
    source = at_cache("gemma4_text")
    with pytest.raises(RequestError, match="differ in the heads that they cache"):
        mc.profile(source, progress=False, **QUICK)
    with pytest.raises(RequestError, match="`budget` measured cannot be: the layers of this model differ"):
        mc.plan(source, kv_ratio=0.5, budget="measured")
    (tmp_path / "widths.json").write_text(json.dumps({"layers": []}))
    with pytest.raises(RequestError, match="a `budget` from a file counts heads"):
        mc.plan(source, kv_ratio=0.5, budget=str(tmp_path / "widths.json"))


def test_every_layer_and_side_has_a_curve_that_falls(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    profile = mc.profile(source, progress=False, **QUICK)
    layers = range(profile.layers)
    assert {(point.layer, point.side) for point in profile.points} == {(n, s) for n in layers for s in ("key", "value")}
    for layer in layers:
        for side in profile.sides:
            kept, costs = profile.curve(layer, side)
            assert kept == sorted(kept) and len(kept) >= 3
            assert costs == sorted(costs, reverse=True)
    assert profile.floor == 0  # float32
    assert profile.report().count("\n| ") == profile.layers + 1


def test_costs_do_not_depend_on_the_layers_measured_before(tmp_path):
    """What the original makes of the text is kept from the first of them on."""
    source = stock_checkpoint(tmp_path / "source")
    of_all, of_last = (mc.profile(source, layers=layers, progress=False, **QUICK) for layers in ("all", "1"))
    last = [point for point in of_all.points if point.layer == 1]
    assert len(last) == len(of_last.points) >= 6
    for point, other in zip(last, of_last.points, strict=True):
        assert (point.side, point.components) == (other.side, other.components)
        assert point.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-8)


def test_the_noise_of_rounded_products_is_taken_off(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "source")
    assert mc.profile(source, progress=False, **WEIGHTS).floor == 0
    monkeypatch.setattr(fit_layers, "fast_products", lambda dtype, device: torch.bfloat16)
    found = mc.profile(source, progress=False, **WEIGHTS)
    monkeypatch.setattr(profiling, "rounds", lambda products: False)
    with_noise = mc.profile(source, progress=False, **WEIGHTS)
    assert with_noise.floor == 0 < found.floor < 1e-3
    taken = [noisy.kl - point.kl for noisy, point in zip(with_noise.points, found.points, strict=True)]
    assert min(taken) > 0 and sum(taken) / len(taken) == pytest.approx(found.floor, rel=0.1)


@pytest.mark.parametrize(("rope", "window"), [({}, 12), ({"rope_type": "dynamic", "factor": 2.0}, 32)])
def test_the_beginnings_of_sequences_have_the_frequencies_of_the_whole(rope, window, tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] |= rope
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(progress, "_MEASURED_WINDOW", 12)
    plan = make_plan(source, Recipe(kv_ratio=0.5, **QUICK))
    assert progress.measured_window(plan) == window


def test_an_interrupted_profile_goes_on(tmp_path, monkeypatch):
    source, file = stock_checkpoint(tmp_path / "source"), tmp_path / "profile.json"
    whole = mc.profile(source, progress=False, **QUICK)
    measured, profile = [], profiling._Profiler.profile

    def stop(self, layer):
        if measured:
            raise KeyboardInterrupt
        measured.append(layer.layer)
        return profile(self, layer)

    monkeypatch.setattr(profiling._Profiler, "profile", stop)
    with pytest.raises(KeyboardInterrupt, match=r"profile\.json\.partial keeps .* the same command goes on"):
        mc.profile(source, out=file, progress=False, **QUICK)
    assert not file.exists()
    monkeypatch.setattr(
        profiling._Profiler, "profile", lambda self, layer: (measured.append(layer.layer), profile(self, layer))[1]
    )
    assert mc.profile(source, out=file, progress=False, **QUICK) == whole
    assert measured == list(range(whole.layers))
    assert json.loads(file.read_text()) == whole.to_json()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_compress_measures_chooses_and_says_what_came_of_it(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    result = mc.compress(source, tmp_path / "out", kv_ratio=0.5, refine=0, heal="0", progress=False, **QUICK)
    budget = result.fidelity["budget"]
    assert budget["predicted_kl"] == result.plan.predicted_kl > 0
    assert result.plan.bytes_after <= result.plan.bytes_before // 2
    plan = result.plan
    ids = calibration_tokens(plan, progress=False)
    assert budget["measured_kl"] == pytest.approx(kl(source, tmp_path / "out", measured_tokens(plan, ids)), rel=1e-2)
    data = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert mc.Profile.from_json(data["profile"]) == plan.profile


def test_what_came_of_it_is_measured_where_that_was_interrupted(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "source")
    options = {"kv_ratio": 0.5, "refine": 0, "heal": "0", "progress": False, **QUICK}
    whole = mc.compress(source, tmp_path / "whole", **options)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_layers.CalibratedFit, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            mc.compress(source, tmp_path / "out", **options)
    resumed = mc.compress(source, tmp_path / "out", resume=True, **options)
    assert resumed.fidelity["budget"]["measured_kl"] == whole.fidelity["budget"]["measured_kl"] > 0


def test_what_was_measured_on_other_text_is_not_gone_on_with(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "source")
    options = {"kv_ratio": 0.5, "refine": 0, "heal": "0", "progress": False, **QUICK}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(profiling._Profiler, "advance", interrupted)  # behind the first layer
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            mc.compress(source, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr(progress, "_MEASURED_WINDOW", 16)
        with pytest.raises(RequestError, match="what a profile is measured on changed since the interrupted run"):
            mc.compress(source, tmp_path / "out", resume=True, **options)
    assert mc.compress(source, tmp_path / "out", resume=True, **options).fidelity["budget"]["measured_kl"] > 0


def test_one_sequence_is_too_little(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    with pytest.raises(RequestError, match="only one"):
        mc.profile(source, progress=False, sequences=1, sequence_length=64)
