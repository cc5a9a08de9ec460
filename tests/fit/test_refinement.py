"""Refinement of one layer against errors that are computed here, from a plain run of the layer."""

import copy
import math

import pytest
import torch
from tiny import stock_checkpoint

from mea_compress.architectures import open_checkpoint
from mea_compress.fit.closed_form import compose
from mea_compress.fit.refinement import Refiner, Settings, _Descent, _order, _Run
from mea_compress.layers.runner import LayerRunner, embed
from mea_compress.layers.store import store_layer
from mea_compress.planning.plans import plan_source
from mea_compress.recipe import Recipe

SEQUENCES, LENGTH, HELD_OUT = 12, 16, 4


@pytest.fixture
def task(tmp_path):
    """A plan, and what the original has before layer 0 and behind its attention, for random tokens."""
    source = open_checkpoint(stock_checkpoint(tmp_path / "source", "llama", head_dim=8))
    tokens = torch.randint(3, 64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(3))
    inputs = embed(source, tokens)
    targets = copy.copy(inputs)
    targets._data = inputs[:] + LayerRunner(source, 0).attend(inputs[:]).outputs
    return source, inputs, targets


def planned(source, **changes):
    kinds = {"key_composition": "head", "value_composition": "head"}
    return plan_source(source, Recipe(**{"kv_ratio": 0.5, "fit": "weights", **kinds, **changes}))


def runner_of(plan, composed):
    return LayerRunner(plan.source, 0, store_layer(composed, plan.source.config.mea["bias"], "F32"))


def held_out_error(runner, inputs, targets, batch):
    """Relative squared error of the stream behind the attention over that of leaving it out, float64."""
    inputs, targets = inputs[:].double(), targets[:].double()
    size = torch.maximum(targets.square().mean(-1, keepdim=True), inputs.square().mean(-1, keepdim=True))
    reach = slice(HELD_OUT, HELD_OUT + batch)
    scale = ((targets - inputs)[reach].square() / size[reach]).mean()
    with torch.no_grad():
        outputs = inputs[:HELD_OUT] + runner.run(inputs[:HELD_OUT].float())[1].outputs.double()
    return float(((outputs - targets[:HELD_OUT]).square() / size[:HELD_OUT]).mean() / scale)


@pytest.mark.parametrize("kinds", [("head", "head"), ("frequency", "latent"), ("pool", "head")])
def test_what_is_reported_is_the_error_of_the_layer_that_comes_back(kinds, task):
    source, inputs, targets = task
    plan = planned(source, key_composition=kinds[0], value_composition=kinds[1])
    composed, _ = compose(plan, plan.layers[0], None)
    settings = Settings(40, 4, HELD_OUT, trial_steps=10, between_looks=5)
    refined = Refiner(inputs, targets, settings, seed=0).refine(composed, runner_of(plan, composed))
    before = held_out_error(runner_of(plan, composed), inputs, targets, 4)
    after = held_out_error(runner_of(plan, refined.layer), inputs, targets, 4)
    assert refined.before == pytest.approx(before, rel=1e-3)
    assert refined.after == pytest.approx(after, rel=1e-3)
    assert after < 0.9 * before and refined.rate in settings.rates


def test_steps_that_only_diverge_leave_the_closed_form(task):
    source, inputs, targets = task
    plan = planned(source)
    composed, _ = compose(plan, plan.layers[0], None)
    settings = Settings(6, 4, HELD_OUT, rates=(1e4, 1e6), trial_steps=3)
    refiner = Refiner(inputs, targets, settings, seed=0)
    refined = refiner.refine(composed, runner_of(plan, composed))
    assert refined.layer is composed and refined.rate == 0 and refined.after == refined.before


def test_the_best_trial_is_continued_and_no_more_steps_are_taken_than_were_said(task):
    source, inputs, targets = task
    plan = planned(source)
    composed, _ = compose(plan, plan.layers[0], None)
    taken, settings = [], Settings(25, 4, HELD_OUT, trial_steps=5, between_looks=5, decay=0.4, least_gain=-1.0)
    Refiner(inputs, targets, settings, 0, taken.append).refine(composed, runner_of(plan, composed))
    assert sum(taken) == settings.all_steps == 30
    taken.clear()
    settings = Settings(
        25, 4, HELD_OUT, trial_steps=5, between_looks=5, decay=0.4, least_gain=1.0
    )  # nothing gains as much
    Refiner(inputs, targets, settings, 0, taken.append).refine(composed, runner_of(plan, composed))
    assert sum(taken) == 2 * 5 + 5 + 10  # trials, one look, and the end in which the step size falls


def test_a_descent_goes_on_where_it_was_after_another(task):
    """Weights and moments: two pieces with another descent between them are one piece of both lengths."""
    source, inputs, targets = task
    plan = planned(source)
    composed, _ = compose(plan, plan.layers[0], None)
    run = _Run(Refiner(inputs, targets, Settings(20, 4, HELD_OUT), seed=0), runner_of(plan, composed))
    whole = _Descent(run, 0.02).advance(8)
    pieces = _Descent(run, 0.02)
    pieces.advance(5)
    _Descent(run, 0.1).advance(3)
    pieces.resume()
    assert pieces.advance(3) == whole


def test_what_lies_between_groups_stays_zero(task):
    source, inputs, targets = task
    plan = planned(source, kv_groups=2)
    composed, _ = compose(plan, plan.layers[0], None)
    refined = Refiner(inputs, targets, Settings(20, 4, HELD_OUT, trial_steps=5), 0).refine(
        composed, runner_of(plan, composed)
    )
    assert refined.rate > 0
    for side in (refined.layer.key, refined.layer.value):  # (C, H): one component and two heads a group
        assert (side.weight[0, 2:] == 0).all() and (side.weight[1, :2] == 0).all()
        assert (side.weight[0, :2] != 0).any() and (side.weight[1, 2:] != 0).any()


@pytest.mark.parametrize(("count", "batch"), [(6, 2), (5, 2), (3, 8)])
def test_every_sequence_comes_once_before_any_comes_again(count, batch):
    order = _order(count, batch, seed=1)
    drawn = torch.cat([next(order) for _ in range(math.lcm(count, batch) // batch)])
    for part in drawn.split(count):
        assert sorted(part.tolist()) == list(range(count))
    assert torch.equal(next(_order(count, batch, seed=2)), next(_order(count, batch, seed=2)))
