"""Which step size a distillation takes."""

import math
from types import SimpleNamespace

import pytest

from mea_compress.training import trials
from mea_compress.training.settings import DistillationSettings


@pytest.mark.parametrize(
    ("steps", "rate", "taken"),
    [
        (12, 0.001, 0.001),
        (80, 0.001, 0.001),
        (320, 0.001, 0.002),
        (180, 0.001, 0.0015),
        (9999, 0.001, 0.002),
        (720, 0.01, 0.015),
        (720, 0.05, 0.05),
    ],
)
def test_a_longer_run_takes_larger_steps_than_its_trials(steps, rate, taken):
    """As the root of its length in fours of a trial, twice at most, and not above 0.015 by that."""
    settings = DistillationSettings(1000, 8)
    assert settings.trial_steps == 20
    assert trials.rate_of_run(rate, steps, settings) == pytest.approx(taken)
    assert trials.rate_of_run(rate, steps, DistillationSettings(1000, 8, rates=(rate,))) == rate


@pytest.mark.parametrize(("steps", "raised"), [(1000, 2), (2000, 0.5 * 12.5**0.5), (7000, 1)])
def test_a_run_takes_what_long_trials_say(steps, raised):
    assert trials.rate_of_run(0.001, steps, DistillationSettings(steps, 8)) == pytest.approx(0.001 * raised)


@pytest.mark.parametrize(
    ("steps", "deadline", "taken"),
    [(4, None, 3), (100, None, 5), (1000, None, 20), (7000, None, 140), (100, 1.0, 5), (7000, 1.0, 12)],
)
def test_a_trial_is_as_long_as_a_run_can_spare(steps, deadline, taken):
    assert DistillationSettings(steps, 8, deadline=deadline).trial_steps == taken


@pytest.mark.parametrize(
    ("values", "tried", "chosen"),
    [
        ((0.9, 0.8, 0.7, 0.6, 0.5), (3, 4, 5), 5),
        ((0.9, 0.8, 0.7, 0.6, 0.9), (3, 4, 5), 4),
        ((0.9, 0.8, 0.7, 1.1, 0.1), (3, 4), 3),  # a larger one that does worse ends it
        ((0.9, 0.8, 1.2, 0.1, 0.1), (3, 2), 2),
        ((0.9, 1.1, math.inf, 0.1, 0.1), (3, 2, 1), 1),
        ((1.1, 1.2, 1.3, 0.1, 0.1), (3, 2, 1), 1),
    ],
)
def test_step_sizes_are_tried_from_the_middle_on(values, tried, chosen):
    rates, progress, order = (1, 2, 3, 4, 5), SimpleNamespace(curve=[(0, 1.0)], found={}), []
    while (rate := trials.next_rate(rates, progress)) is not None:
        order.append(rate)
        progress.found[str(rate)] = values[rate - 1]
    assert tuple(order) == tried
    best = trials.best_rate(rates, progress)
    assert chosen - 1 <= best <= chosen + 1  # between its neighbours
    if (chosen == tried[-1] and chosen == rates[-1]) or min(values[rate - 1] for rate in tried) >= 1.0:
        assert best == chosen


def test_the_way_up_and_down_is_as_long_as_it_gains_or_does_not():
    """Seven step sizes, three on either side."""
    rates = tuple(range(1, 8))
    for values, tried in (((9, 9, 9, 4, 3, 2, 1), [4, 5, 6, 7]), ((9, 9, 9, 4, 3, 9, 1), [4, 5, 6])):
        assert tried_in_order(rates, values) == tried
    for values, tried in (((1, 9, 9, 9, 1, 1, 1), [4, 3, 2, 1]), ((1, 2, 9, 9, 1, 1, 1), [4, 3, 2])):
        assert tried_in_order(rates, values) == tried


def tried_in_order(rates, values):
    progress, order = SimpleNamespace(curve=[(0, 5.0)], found={}), []
    while (rate := trials.next_rate(rates, progress)) is not None:
        order.append(rate)
        progress.found[str(rate)] = values[rate - 1]
    return order


@pytest.mark.parametrize("best", [0.0009, 0.001, 0.0017])
def test_the_best_step_size_is_where_the_parabola_through_start_and_trials_is_lowest(best):
    """Also between those tried; a smaller one is not asked for where the middle gains."""
    progress = SimpleNamespace(curve=[(0, 1.0)], found={})
    rates = (0.00015, 0.0005, 0.0015, 0.005, 0.015)
    while (rate := trials.next_rate(rates, progress)) is not None:
        progress.found[str(rate)] = 1.0 + 0.1 * ((rate / best - 1) ** 2 - 1)
    assert trials.best_rate(rates, progress) == pytest.approx(best)


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ({"0.1": 0.8, "0.2": 0.6}, 0.2),  # nothing larger was tried
        ({"0.1": 1.3, "0.2": 1.2, "0.3": 1.25}, 0.2),  # none gained: the least bad
        ({"0.2": 0.8, "0.3": math.inf}, 0.2),
        ({"0.1": 0.99999, "0.2": 1.5}, 0.1),  # no smaller one is there
        ({"0.2": 0.5, "0.3": 0.50001}, 0.2500),  # hardly worse: between both
        ({}, 0.1),
    ],
)
def test_a_step_size_that_was_tried_where_trials_say_no_more(found, best):
    progress = SimpleNamespace(curve=[(0, 1.0)], found=found)
    assert trials.best_rate((0.1, 0.2, 0.3), progress) == pytest.approx(best, rel=0.15)
