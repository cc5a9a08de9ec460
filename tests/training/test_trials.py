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
        (720, 0.001, 0.003),
        (9999, 0.001, 0.003),
        (720, 0.01, 0.015),
        (720, 0.05, 0.05),
    ],
)
def test_a_longer_run_takes_larger_steps_than_its_trials(steps, rate, taken):
    """As the root of its length in fours of a trial, thrice at most, and not above 0.015 by that."""
    settings = DistillationSettings(1000, 8)
    assert settings.trial_steps == 20
    assert trials.rate_of_run(rate, steps, settings) == pytest.approx(taken)
    assert trials.rate_of_run(rate, steps, DistillationSettings(1000, 8, rates=(rate,))) == rate


@pytest.mark.parametrize(("steps", "raised"), [(1000, 3), (2000, 0.5 * 12.5**0.5), (7000, 1)])
def test_a_run_takes_what_long_trials_say(steps, raised):
    assert trials.rate_of_run(0.001, steps, DistillationSettings(steps, 8)) == pytest.approx(0.001 * raised)


@pytest.mark.parametrize("rate", [0.00005, 0.0005, 0.0015, 0.05])  # 0.015 can be thrice 0.005 as well
@pytest.mark.parametrize(("steps", "deadline"), [(100, None), (384, None), (279, 1.0), (960, 1.0), (7000, None)])
def test_a_longer_run_takes_the_step_size_that_an_earlier_one_was_raised_from(rate, steps, deadline):
    taken = trials.rate_of_run(rate, steps, DistillationSettings(steps, 8, deadline=deadline))
    for longer in (steps, 2 * steps):
        settings = DistillationSettings(longer, 8)
        assert trials.rates_after(taken, steps, settings) == (trials.rate_of_run(rate, longer, settings),)


def test_an_earlier_run_that_says_nothing_of_this_one():
    settings = DistillationSettings(100, 8)
    assert trials.rates_after(0.0005, 101, settings) == settings.rates  # longer than this one
    assert trials.rates_after(0.0001, 100, settings) == settings.rates  # of no trial
    alone = DistillationSettings(100, 8, rates=(0.3,))
    assert trials.rates_after(0.0005, 50, alone) == (0.3,)


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
    while (rate := trials.next_rate(rates, progress, 20)) is not None:
        order.append(rate)
        progress.found[str(rate)] = values[rate - 1]
    assert tuple(order) == tried and trials.choose_rate(rates, progress, 20) == chosen


def test_the_way_up_and_down_is_as_long_as_it_gains_or_does_not():
    """Seven step sizes, three on either side."""
    rates = tuple(range(1, 8))
    for values, tried in (((9, 9, 9, 4, 3, 2, 1), [4, 5, 6, 7]), ((9, 9, 9, 4, 3, 9, 1), [4, 5, 6])):
        assert tried_in_order(rates, values) == tried
    for values, tried in (((1, 9, 9, 9, 1, 1, 1), [4, 3, 2, 1]), ((1, 2, 9, 9, 1, 1, 1), [4, 3, 2])):
        assert tried_in_order(rates, values) == tried


def tried_in_order(rates, values):
    progress, order = SimpleNamespace(curve=[(0, 5.0)], found={}), []
    while (rate := trials.next_rate(rates, progress, 20)) is not None:
        order.append(rate)
        progress.found[str(rate)] = values[rate - 1]
    return order


@pytest.mark.parametrize(
    ("found", "trial", "chosen"),
    [
        ({"0.1": 0.8, "0.2": 0.85, "0.3": 1.1}, 20, 0.2),  # the largest that gained as good as the most
        ({"0.1": 0.8, "0.2": 0.85, "0.3": 1.1}, 3, 0.2),
        ({"0.1": 0.8, "0.2": 0.85, "0.3": 1.1}, 140, 0.1),  # what a long trial says is true of the run
        ({"0.1": 0.8, "0.2": 0.801, "0.3": 1.1}, 140, 0.2),
        ({"0.1": 0.8, "0.2": 0.95, "0.3": 0.99}, 20, 0.1),
        ({"0.1": 1.3, "0.2": 1.2, "0.3": math.inf}, 20, 0.2),  # none gained: the least bad
        ({"0.1": 0.8}, 20, 0.1),  # there was no time for the others
    ],
)
def test_the_largest_step_size_that_gains_enough_is_taken(found, trial, chosen):
    progress = SimpleNamespace(curve=[(0, 1.0)], found=found)
    assert trials.choose_rate((0.1, 0.2, 0.3), progress, trial) == chosen
