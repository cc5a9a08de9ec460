"""The bar of a fit ends where its work ends, a time limit shortens refinement, and an estimate needs one layer."""

import time
import warnings

import pytest
from tiny import stock_checkpoint

from mea_compress.compression import compress
from mea_compress.fit import progress
from mea_compress.fit.profile import profile
from mea_compress.fit.progress import STEP, FitProgress, WorkBar, estimate_seconds, healing_units
from mea_compress.planning.decisions import deadline_of
from mea_compress.planning.plans import make_plan
from mea_compress.planning.sizes import TOKENS_PER_STEP, healing_batch
from mea_compress.recipe import Recipe

QUICK = {"sequence_length": 32, "sequences": 24, "kv_ratio": 0.5, "budget": "uniform"}


@pytest.mark.parametrize("refine", [0, 6])
@pytest.mark.parametrize("layers", ["all", "1"])
def test_the_bar_ends_full(refine, layers, tmp_path, monkeypatch):
    source, kept = stock_checkpoint(tmp_path / "src", num_hidden_layers=3), []
    close = FitProgress.close
    monkeypatch.setattr(FitProgress, "close", lambda self: (kept.append(self), close(self)))
    settings = Recipe(**QUICK, refine=refine, layers=layers)
    compress(source, tmp_path / "out", recipe=settings, progress=False)
    (work,) = kept
    last = 1 if layers == "1" else 2  # nothing goes through the last layer that is fitted, or beyond
    assert work.done > 0 and work.left == 0
    rest = work.total - work.done
    assert rest <= work.layer_units + (2 - last) * work.passing
    assert work.expected > 0 or rest == 0


@pytest.mark.parametrize("name", ["fitting", "profiling"])
def test_a_bar_ends_before_what_went_wrong_is_said(name, tmp_path, monkeypatch):
    """Left open, it would be drawn again behind the message."""
    source, closed, close = stock_checkpoint(tmp_path / "src"), [], WorkBar.close

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkBar, "close", lambda self: (closed.append(self.name), close(self)))
    monkeypatch.setattr(WorkBar, "say", stop)
    with pytest.raises(KeyboardInterrupt):
        if name == "profiling":
            profile(source, progress=False, sequence_length=32, sequences=16)
        else:
            compress(source, tmp_path / "out", recipe=Recipe(**QUICK, refine=0, heal=0), progress=False)
    assert closed == [name]


def test_a_time_limit_shortens_refinement(tmp_path, monkeypatch):
    """A unit takes a second of a clock that work alone moves."""
    plan = make_plan(stock_checkpoint(tmp_path / "src"), Recipe(**QUICK, refine=100, heal=0))
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    work = FitProgress(plan, batches=2, trial_batches=1, steps=110, unfinished=2, deadline=60.0)

    def pass_time(units):
        clock[0] += units
        work.add(units)

    work.begin_fit()
    pass_time(10)
    left = (60 - 10 - work.without_steps) / 2  # for each of two layers
    assert work.steps_allowed(100, trials=5) == int(left / STEP) - 5
    assert work.steps_allowed(4, trials=1) == 4
    pass_time(45)
    assert work.steps_allowed(100, trials=5) == 0
    unlimited = FitProgress(plan, 2, 1, 110, 2)
    assert unlimited.steps_allowed(100, trials=5) == 100


def test_distillation_behind_the_fit_comes_before_refinement(tmp_path, monkeypatch):
    """What is kept for it is what it takes, and refinement has the rest; a unit takes a second."""
    healed = make_plan(stock_checkpoint(tmp_path / "src"), Recipe(**QUICK, refine=100))
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    behind = healing_units(healed, healed.decisions.healing_steps)
    batch = healing_batch(healed.decisions.sequence_length) * healed.decisions.sequence_length / TOKENS_PER_STEP
    assert behind > healed.decisions.healing_steps * batch * 3 * len(healed.layers)
    for rest in (40, 400):
        clock[0] = 0.0
        work = FitProgress(healed, 2, 1, 110, 1, deadline=behind + rest)
        work.begin_fit()
        clock[0] = 10.0
        work.add(10)
        assert work.steps_allowed(1000, trials=5) == int((rest - 10) / STEP) - 5
    clock[0] = behind + 400
    assert work.steps_allowed(1000, trials=5) == 0


def test_a_long_limit_is_used_for_distillation_and_keeps_time_for_refinement(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    shape = {"sequence_length": 32, "kv_ratio": 0.5, "budget": "uniform"}

    def work(**changes):
        plan = make_plan(source, Recipe(**shape, **changes))
        return plan.decisions.healing_steps, FitProgress(plan, 2, 1, 110, 2).behind, plan

    steps, behind, plan = work()
    assert steps == 240 and behind == healing_units(plan, 240)
    limited, kept, _ = work(time_limit=40)
    assert limited == work(effort="best")[0] > steps and kept == behind
    assert work(time_limit=40, effort="fast")[0] == 0
    assert work(time_limit=40, heal=300)[:2] == (300, healing_units(plan, 300))


def test_a_deadline_is_counted_from_the_beginning(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0)
    assert deadline_of(Recipe(kv_ratio=0.5)) is None and deadline_of(Recipe(kv_ratio=0.5, time_limit=0.5)) == 130.0


@pytest.mark.slow
def test_a_fit_ends_within_its_time_limit(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    began = time.monotonic()
    limited = Recipe(**QUICK, refine=100_000, heal=0, time_limit=0.1)
    result = compress(source, tmp_path / "out", recipe=limited, progress=False)
    assert time.monotonic() - began < 60  # 100,000 steps take an hour
    assert "refinement" in result.fidelity["layers"]["0"]
    began = time.monotonic()
    limited = Recipe(**QUICK, refine=100_000, heal=100_000, time_limit=0.1)
    result = compress(source, tmp_path / "healed", recipe=limited, progress=False)
    assert time.monotonic() - began < 60 and "refinement" not in result.fidelity["layers"]["0"]


def test_effort_says_how_long(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    steps = {e: make_plan(source, Recipe(**QUICK, effort=e)).decisions.refinement_steps for e in ("fast", "balanced")}
    assert steps["fast"] == 0 < steps["balanced"]
    assert make_plan(source, Recipe(**QUICK, effort="best")).decisions.refinement_steps == 3 * steps["balanced"]
    assert make_plan(source, Recipe(**QUICK, effort="fast", refine=7)).decisions.refinement_steps == 7
    wide = stock_checkpoint(tmp_path / "wide", hidden_size=512, num_hidden_layers=1)
    steps = {h: make_plan(wide, Recipe(**QUICK, heal=h)).decisions.refinement_steps for h in (0, "auto")}
    assert steps["auto"] == 0 < steps[0]  # what is healed end to end need not be refined before
    assert make_plan(wide, Recipe(**QUICK, effort="best")).decisions.refinement_steps == 3 * steps[0]


def test_an_estimate_grows_with_the_work(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src")
    monkeypatch.setattr(progress.time, "monotonic", iter(range(100)).__next__)  # a unit takes a second

    def seconds(**changes):
        return estimate_seconds(make_plan(source, Recipe(**{**QUICK, "refine": 0, "heal": 0, **changes})))

    assert seconds(fit="weights") == 0
    assert seconds(refine=100) - seconds() == pytest.approx(2 * 100 * STEP)
    assert seconds(sequences=24 * 64) > 5 * seconds()
    assert seconds(refine=10_000, time_limit=2.0) == 120
    assert seconds(budget="measured") > seconds()
    healing = seconds(heal=20) - seconds()
    assert seconds(heal=40) - seconds() == pytest.approx(2 * healing) and healing > 20 * 2 * 3 * 16 * 32 / 4096
    assert seconds(fit="weights", heal=20) == pytest.approx(healing)


def test_fractions_that_add_up_to_more_than_all_of_it_are_no_warning(capsys):
    bar = WorkBar("profiling", 1.0, progress=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            bar.add(0.4)
            bar.bar.refresh()
    bar.close()
    assert "100%" in capsys.readouterr().err
