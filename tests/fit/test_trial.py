"""Two allocations are tried, and the one that is closer to the original is taken."""

import json
import math

import pytest
import torch
from tiny import stock_checkpoint

import mea_compress.fit.layers as fitting
from mea_compress.compression import compress
from mea_compress.fit import progress, trial
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe

MEASURED = {"sequence_length": 32, "sequences": 24, "kv_ratio": 0.5, "budget": "measured", "refine": 0, "heal": 0}


def budget_of(source, out, **changes):
    result = compress(source, out, recipe=Recipe(**{**MEASURED, **changes}), progress=False)
    told = json.loads((out / "compression.json").read_text())["fidelity"]["budget"]
    assert told == result.fidelity["budget"]
    return result.plan, told


@pytest.mark.parametrize("methods", [{}, {"key_composition": "joint", "value_composition": "joint"}])
def test_a_trial_finds_what_the_checkpoint_then_has(methods, tmp_path):
    """The closed form of all layers is measured as the compression itself does it, on the same text."""
    _, told = budget_of(stock_checkpoint(tmp_path / "src"), tmp_path / "out", **methods)
    tried = {name: told[f"{name}_trial_kl"] for name in ("measured", "uniform")}
    assert tried[told["chosen"]] == min(tried.values())
    assert told["measured_kl"] == pytest.approx(min(tried.values()), rel=1e-4)


@pytest.mark.parametrize("better", ["measured", "uniform"])
def test_the_better_one_is_taken_and_an_interrupted_run_does_not_try_again(better, tmp_path, monkeypatch):
    source, tried = stock_checkpoint(tmp_path / "src", num_hidden_layers=3), []

    def kl(plan, tokens, title, progress):
        (name,) = (name for name in ("measured", "uniform") if name in title)
        tried.append(name)
        if len(tried) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return 0.1 if name == better else 0.2

    stopped = []
    monkeypatch.setattr(trial, "closed_form_kl", kl)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", recipe=Recipe(**MEASURED), progress=False)
    result = compress(source, tmp_path / "out", recipe=Recipe(**MEASURED), progress=False, resume=True)
    assert tried == ["measured", "uniform", "uniform"] and result.fidelity["budget"]["chosen"] == better
    monkeypatch.setattr(trial, "better_plan", lambda plans, *_, **__: plans[better])
    expected = compress(source, tmp_path / "expected", recipe=Recipe(**MEASURED), progress=False).plan
    assert [layer.spec for layer in result.plan.layers] == [layer.spec for layer in expected.layers]
    assert result.plan.predicted_kl == expected.predicted_kl > 0 and math.isfinite(result.plan.predicted_kl)


@pytest.mark.parametrize(("measured", "tried"), [(0.9, 1), (1.1, 2)])
def test_with_a_limit_equal_widths_are_tried_where_measured_ones_cost_more_than_these_were_to(
    measured, tried, tmp_path, monkeypatch
):
    """A trial that costs less than the profile predicts of equal widths is enough, and without a limit it is not."""
    source, seen, kept = stock_checkpoint(tmp_path / "src"), [], {}

    def kl(plan, tokens, title, progress):
        seen.append(plan.predicted_kl)
        return kept["equal"] * measured if "measured" in title else kept["equal"] * 1.05

    better = trial.better_plan

    def keep(plans, *args, **kwargs):
        kept["equal"] = plans["uniform"].predicted_kl
        return better(plans, *args, **kwargs)

    monkeypatch.setattr(trial, "closed_form_kl", kl)
    monkeypatch.setattr(trial, "better_plan", keep)
    _, told = budget_of(source, tmp_path / "limited", time_limit=60)
    assert len(seen) == tried and told["chosen"] == ("measured" if measured < 1 else "uniform")
    assert ("uniform_trial_kl" in told) == (tried == 2)
    seen.clear()
    _, told = budget_of(source, tmp_path / "unlimited")
    assert len(seen) == 2 and told["chosen"] == ("measured" if measured < 1 else "uniform")


@pytest.mark.parametrize(("sequences", "fitted"), [(22, 16), (48, 4)])
def test_a_trial_is_measured_on_text_that_no_profile_has_seen(sequences, fitted, tmp_path, monkeypatch):
    """Widths were chosen by what is in front, and what lies behind is fair to both; little text has nothing there."""
    seen, real = [], trial.CalibratedFit

    class Seen(real):
        def __init__(self, plan, tokens, held_out):
            super().__init__(plan, tokens, held_out)
            seen.append((tokens, held_out))

    monkeypatch.setattr(trial, "CalibratedFit", Seen)
    monkeypatch.setattr(progress, "_FITTED_TOKENS", fitted * 32)
    monkeypatch.setattr(progress, "_MEASURED_TOKENS", 4 * 32)
    monkeypatch.setattr(trial, "TRIED_TOKENS", 16 * 32)
    source = stock_checkpoint(tmp_path / "src")
    plan = make_plan(source, Recipe(**MEASURED | {"sequences": sequences}))
    tokens = fitting.calibration_tokens(plan, progress=False)
    found = trial.closed_form_kl(plan, tokens, "", progress=False)
    ((used, held_out),) = seen
    assert torch.equal(used[held_out:], tokens[4 : 4 + fitted])
    assert torch.equal(used[:held_out], tokens[4 + fitted : 4 + fitted + 16]) if sequences == 48 else held_out == 4
    if sequences == 22:
        assert torch.equal(used, tokens[: 4 + fitted])
    assert 0 < found < 10


@pytest.mark.parametrize(("sequences", "shape"), [(22, (4, 16)), (48, (8, 32))])
def test_a_trial_on_a_profile_s_text_reads_as_much_of_it(sequences, shape, tmp_path, monkeypatch):
    """Behind it, where there is more, sequences are read whole."""
    seen, measure = [], trial.CalibratedFit.measure
    monkeypatch.setattr(
        trial.CalibratedFit, "measure", lambda fit, *args: (seen.append(args[2].shape), measure(fit, *args))[1]
    )
    monkeypatch.setattr(progress, "_FITTED_TOKENS", 18 * 32)
    monkeypatch.setattr(progress, "_MEASURED_WINDOW", 16)
    monkeypatch.setattr(progress, "_MEASURED_TOKENS", 4 * 16)
    monkeypatch.setattr(trial, "TRIED_TOKENS", 8 * 32)
    plan = make_plan(stock_checkpoint(tmp_path / "src"), Recipe(**MEASURED | {"sequences": sequences}))
    found = trial.closed_form_kl(plan, fitting.calibration_tokens(plan, progress=False), "", progress=False)
    assert seen == [shape] and 0 < found < 10
