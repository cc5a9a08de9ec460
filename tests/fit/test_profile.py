"""What a profile says is what a checkpoint with that one side compressed really costs."""

import json

import pytest
import torch
from tiny import CASES, stock_checkpoint
from transformers import AutoModelForCausalLM

import mea_compress as mc
from mea_compress.errors import RequestError
from mea_compress.fit import profile as profiling
from mea_compress.fit.layers import calibration_tokens, measured_sequences
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


@pytest.mark.parametrize("case", CASES)
def test_a_cost_is_that_of_a_checkpoint_with_this_side_compressed(case, tmp_path):
    source = stock_checkpoint(tmp_path / "source", case)
    profile = mc.profile(source, progress=False, **WEIGHTS)
    recipe = Recipe(kv_ratio=0.5, budget="uniform", **WEIGHTS)
    plan = make_plan(source, recipe)
    ids = calibration_tokens(plan, progress=False)
    ids = ids[: measured_sequences(ids)]
    heads = plan.source.config.num_key_value_heads
    point = next(point for point in profile.points if (point.layer, point.side) == (0, "key"))
    file = tmp_path / "widths.json"
    layers = [{"layer": 0, "key_components": point.components, "value_components": heads}]
    layers += [{"layer": layer.layer, "key_components": heads, "value_components": heads} for layer in plan.layers[1:]]
    file.write_text(json.dumps({"layers": layers}))
    mc.compress(source, tmp_path / "out", recipe=recipe, budget=str(file), progress=False)
    assert point.kl == pytest.approx(kl(source, tmp_path / "out", ids), rel=2e-3, abs=1e-7)


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
    assert abs(profile.floor) < 1e-6  # float32
    assert profile.report().count("\n| ") == profile.layers + 1


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
    assert budget["measured_kl"] == pytest.approx(
        kl(source, tmp_path / "out", ids[: measured_sequences(ids)]), rel=1e-2
    )
    data = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert mc.Profile.from_json(data["profile"]) == plan.profile


def test_one_sequence_is_too_little(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    with pytest.raises(RequestError, match="only one"):
        mc.profile(source, progress=False, sequences=1, sequence_length=64)
