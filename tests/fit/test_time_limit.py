"""Within a time limit no more is measured and fitted than there is time for, and a resumed run does the same."""

import json
import math

import pytest
import torch
from letters import character_tokenizer
from tiny import contents, stock_checkpoint

import mea_compress.fit.layers as fitting
from mea_compress.compression import compress
from mea_compress.fit import progress, time_limit, trial
from mea_compress.fit.progress import budget_units, closed_form_units
from mea_compress.planning import decisions
from mea_compress.planning.plans import equal_widths, make_plan
from mea_compress.recipe import Recipe

LIMITED = {"sequence_length": 32, "kv_ratio": 0.5, "refine": 0, "heal": 0, "time_limit": 60.0}
SEQUENCES, LEAST = 64, 16


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkpoint, and a calibration that is small beside it."""
    monkeypatch.setattr(decisions, "_CALIBRATION_TOKENS", SEQUENCES * 32)
    monkeypatch.setattr(progress, "_FITTED_TOKENS", (LEAST - 3) * 32)
    monkeypatch.setattr(progress, "_MEASURED_TOKENS", 2 * 32)  # and one for the process
    return stock_checkpoint(tmp_path / "src")


@pytest.fixture
def unit(monkeypatch):
    """Sets the seconds that a unit of work takes."""
    return lambda seconds: monkeypatch.setattr(time_limit, "unit_seconds", lambda plan: seconds)


def told(out):
    return json.loads((out / "compression.json").read_text())["fidelity"].get("time_limit")


@pytest.mark.parametrize("joint", [False, True])
def test_a_budget_is_measured_where_a_share_of_the_time_is_enough(joint, source, tmp_path, unit):
    methods = {"key_composition": "joint", "value_composition": "joint"} if joint else {}
    recipe = Recipe(**LIMITED, **methods)
    plan = make_plan(source, recipe)
    share = 0.3 * 3600 / budget_units(plan, equal_widths(plan), SEQUENCES)
    for factor, measured in ((0.9, True), (1.1, False)):
        unit(factor * share)
        out = tmp_path / f"{factor}"
        result = compress(source, out, recipe=recipe, progress=False)
        assert (result.plan.profile is not None) == measured == ("budget" in result.fidelity)
        assert told(out) == result.fidelity["time_limit"]
        if measured:
            assert told(out)["budget"] == "measured"
            continue
        assert told(out)["budget"].startswith("equal widths, for measuring others takes 19.8 of ")
        assert told(out)["budget"] in result.plan.decisions.choice
        alone = compress(
            source, tmp_path / "alone", recipe=Recipe(**LIMITED, **methods, budget="uniform"), progress=False
        )
        assert [layer.spec for layer in result.plan.layers] == [layer.spec for layer in alone.plan.layers]
        assert contents(out)["model.safetensors"] == contents(tmp_path / "alone")["model.safetensors"]


def test_a_budget_that_is_asked_for_is_measured(source, tmp_path, unit):
    unit(1e6)
    recipe = Recipe(**LIMITED, budget="measured", sequences=SEQUENCES)
    assert "measured_kl" in compress(source, tmp_path / "out", recipe=recipe, progress=False).fidelity["budget"]
    assert told(tmp_path / "out") is None


def test_the_text_that_is_left_has_the_sequences_that_costs_are_measured_on(source, tmp_path, unit, monkeypatch):
    """A quarter of what there is at most, as for a profile that had more."""
    monkeypatch.setattr(progress, "_FITTED_TOKENS", 32)
    monkeypatch.setattr(progress, "_MEASURED_TOKENS", 8 * 32)
    unit(1e6)
    result = compress(source, tmp_path / "out", recipe=Recipe(**LIMITED, budget="uniform"), progress=False)
    assert told(tmp_path / "out")["sequences"] == 4 * 8
    assert progress.measured_count(result.plan, 4 * 8) == progress.measured_count(result.plan, SEQUENCES) == 8


@pytest.mark.parametrize(("more", "share"), [({}, 0.9), ({"refine": 1}, 0.2), ({"heal": 1}, 0.2)])
def test_the_closed_form_is_fitted_to_as_much_text_as_there_is_time_for(more, share, source, tmp_path, unit):
    recipe = Recipe(**LIMITED | more, budget="uniform")
    whole = share * 3600 / closed_form_units(make_plan(source, recipe), SEQUENCES)
    for factor, sequences in ((0.9, SEQUENCES), (2.001, SEQUENCES // 2 - 1), (1e6, LEAST)):
        unit(factor * whole)
        out = tmp_path / f"{factor}"
        result = compress(source, out, recipe=recipe, progress=False)
        assert told(out) == {"sequences": pytest.approx(sequences, abs=1)}
        assert result.plan.decisions.sequences == told(out)["sequences"]
    given = Recipe(**LIMITED | more, budget="uniform", sequences=LEAST)
    compress(source, tmp_path / "given", recipe=given, progress=False)
    assert told(tmp_path / "given") is None
    assert contents(tmp_path / "given")["model.safetensors"] != contents(tmp_path / "0.9")["model.safetensors"]


def test_a_resumed_run_does_what_was_decided(source, tmp_path, unit, monkeypatch):
    recipe = Recipe(**LIMITED)
    unit(1e6)
    whole = compress(source, tmp_path / "whole", recipe=recipe, progress=False)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mea_compress.compression.write_weights", stop)
        compress(source, tmp_path / "out", recipe=recipe, progress=False)
    unit(1e-9)  # a quicker machine
    monkeypatch.setattr(trial, "better_plan", stop)
    resumed = compress(source, tmp_path / "out", recipe=recipe, progress=False, resume=True)
    assert resumed.fidelity["time_limit"]["sequences"] == LEAST == whole.fidelity["time_limit"]["sequences"]
    ours, theirs = (contents(tmp_path / name)["model.safetensors"] for name in ("out", "whole"))
    assert ours == theirs


def test_without_a_limit_nothing_is_decided_by_the_clock(source, tmp_path, unit):
    unit(math.inf)
    recipe = Recipe(**LIMITED | {"time_limit": None})
    result = compress(source, tmp_path / "out", recipe=recipe, progress=False)
    assert told(tmp_path / "out") is None and result.plan.decisions.sequences == SEQUENCES
    assert result.plan.profile is not None


def test_several_processes_share_the_text(source, tmp_path, unit, monkeypatch):
    recipe = Recipe(**LIMITED, budget="uniform")
    whole = 0.9 * 3600 / closed_form_units(make_plan(source, recipe), SEQUENCES)
    unit(2.001 * whole)
    alone = compress(source, tmp_path / "alone", recipe=recipe, progress=False)
    monkeypatch.setattr(time_limit, "process_count", lambda: 2)
    both = compress(source, tmp_path / "both", recipe=recipe, progress=False)
    assert alone.fidelity["time_limit"]["sequences"] == pytest.approx(SEQUENCES // 2 - 1, abs=1)
    assert both.fidelity["time_limit"]["sequences"] == pytest.approx(SEQUENCES - 1, abs=1)


def test_a_short_text_is_counted_as_it_is_and_shuffled(source, tmp_path, unit):
    character_tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text("".join(f"the {word} fox\n" * 25 for word in ("quick", "brown", "lazy", "red")))
    unit(1e-9)
    recipe = Recipe(**LIMITED | {"text": [tmp_path / "text.txt"]}, budget="uniform")
    result = compress(source, tmp_path / "out", recipe=recipe, progress=False)
    rows = fitting.calibration_tokens(make_plan(source, recipe), progress=False)
    unlimited = make_plan(source, recipe.model_copy(update={"time_limit": None}))
    in_order = fitting.calibration_tokens(unlimited, progress=False)
    assert result.plan.decisions.sequences == told(tmp_path / "out")["sequences"] == len(rows) < SEQUENCES
    assert sorted(rows.tolist()) == sorted(in_order.tolist()) and not torch.equal(rows, in_order)
