"""Closed forms against the heads of the checkpoint, multiplied out."""

import numpy as np
import pytest
from tiny import stock_checkpoint

from mea_compress.architectures import open_checkpoint
from mea_compress.fit.closed_form import compose
from mea_compress.layers.read import read_side
from mea_compress.planning.plans import plan_source
from mea_compress.recipe import Recipe

PAIRS = [("head", "head"), ("frequency", "latent"), ("latent", "latent"), ("joint", "joint"), ("prune", "share")]


@pytest.fixture(params=["llama", "llama-rope-bias-wide-tied", "phi3-partial"])
def source(request, tmp_path):
    return open_checkpoint(stock_checkpoint(tmp_path / "source", request.param))


@pytest.mark.parametrize(("keys", "values"), PAIRS)
def test_the_reported_error_is_the_share_of_the_heads_that_is_lost(keys, values, source):
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition=keys, value_composition=values)
    plan = plan_source(source, recipe)
    composed, errors = compose(plan, plan.layers[1], None)
    for name, side in (("key", composed.key), ("value", composed.value)):
        heads = read_side(source, 1, name)
        lost = np.square(heads - side.reconstruct()).sum() / np.square(heads).sum()
        assert errors[f"{name}_relative_error"] == pytest.approx(lost, rel=1e-4)
        assert 0 < lost < 1


def test_a_weights_fit_leaves_queries_and_output(source):
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition="head", value_composition="head")
    plan = plan_source(source, recipe)
    composed, _ = compose(plan, plan.layers[0], None)
    assert not plan.layers[0].needs_queries
    assert composed.query is None and composed.output is None and composed.head_norm is None


def test_a_side_that_nothing_is_said_of_stays(source):
    recipe = Recipe(key_components=2, fit="weights", key_composition="head")
    plan = plan_source(source, recipe)
    composed, _ = compose(plan, plan.layers[0], None)
    assert composed.value.form.identity and not composed.key.form.identity
    heads = read_side(source, 0, "value")
    assert np.array_equal(composed.value.projection.reshape(heads.shape), heads)
