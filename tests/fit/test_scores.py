"""q_proj fitted to the original's scores: against least squares written out query by query, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import stock_checkpoint
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mea_compress.architectures import open_checkpoint
from mea_compress.compositions.base import CompositionOptions
from mea_compress.compositions.groups import cluster, compose_groups
from mea_compress.compositions.pool import reorder
from mea_compress.fit import scores
from mea_compress.fit.closed_form import compose
from mea_compress.fit.layers import CalibratedFit
from mea_compress.fit.scores import OriginalScores, ScoreRegression, conjugate_gradients
from mea_compress.heads.composed import FactoredHeads, split_heads
from mea_compress.layers.read import read_heads, read_projection
from mea_compress.layers.stream import stream_size
from mea_compress.modeling.attention_mea import rotate_heads
from mea_compress.modeling.section_mea import POOLED
from mea_compress.planning.plans import plan_source
from mea_compress.recipe import Recipe

LENGTH, SEQUENCES = 24, 12


def fit_of(source, **changes):
    """The first layer's fit behind its closed form, what takes the scores, and the composed layer."""
    settings = {"kv_ratio": 0.5, "refine": 0, "heal": "0", "sequences": SEQUENCES, "sequence_length": LENGTH}
    plan = plan_source(open_checkpoint(source), Recipe(**settings | changes))
    ids = torch.randint(3, 64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    fit = CalibratedFit(plan, ids, 0)
    fit.compressed = fit.original.copy()
    wanted = fit._scores_of(plan.layers[0])
    statistics = fit.pass_original(0, True, wanted)
    return fit, wanted, compose(plan, plan.layers[0], statistics)[0], ids


def errors_written_out(fit, composed, ids, source, query):
    """The weighted squared errors of all scores of the composed layer with other queries (Hq, d, D + 1), float64."""
    layer = AutoModelForCausalLM.from_pretrained(source).double().eval()
    stock, heads = layer.model.layers[0].self_attn, composed.key.reconstruct()
    scaling = stock.scaling
    order = list(composed.order or range(len(heads)))
    with torch.no_grad():
        embedded = layer.model.embed_tokens(ids)
        x = layer.model.layers[0].input_layernorm(embedded)  # (B, T, D)
        behind = embedded + stock(x, layer.model.rotary_emb(x, torch.arange(LENGTH)[None]), _causal())[0]
        cos, sin = layer.model.rotary_emb(x, torch.arange(LENGTH)[None])
        wide = torch.cat((x, torch.ones(*x.shape[:2], 1, dtype=x.dtype)), -1)

        def rotated(weight):
            return apply_rotary_pos_emb(*(2 * [wide @ torch.from_numpy(weight).mT[:, None]]), cos, sin, unsqueeze_dim=0)

        old = read_heads(fit.plan.source, 0)
        queries, keys = rotated(old.query)[0], rotated(old.key)[0]  # (Hq, B, T, d)
        values = wide @ torch.from_numpy(old.value).mT[:, None]
        group = len(old.query) // len(old.key)
        places = [order[place // group] * group + place % group for place in range(len(query))]
        new_queries, new_keys = rotated(query)[0], rotated(heads)[0]
        size = torch.maximum(behind.square().mean(-1), embedded.square().mean(-1))  # (B, T)
        total = 0.0
        for head, place in enumerate(places):
            for b in range(SEQUENCES):
                expected = queries[place, b] @ keys[place // group, b].T  # (T, T)
                weights = (expected * scaling + _causal()[0, 0]).softmax(-1)
                error = new_queries[head, b] @ new_keys[head // group, b].T - expected
                counted = (weights + _causal()[0, 0].softmax(-1)) / 2  # half of it alike for all that is seen
                variance = (counted * error.square()).sum(-1) - (counted * error).sum(-1).square()
                v = values[place // group, b]
                output = torch.from_numpy(old.output[place])  # (D, d)
                moved = ((v[None] - (weights @ v)[:, None]) @ output.T).square().sum(-1)  # (S, T)
                squares = weights.square()
                leverage = (squares * moved).sum(-1) / (1 - squares.sum(-1)).clamp(min=1e-3)
                total += float((leverage / size[b] * variance).sum())
    return total


def _causal():
    return torch.full((1, 1, LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {}),
        ("llama", {"key_composition": "latent"}),
        ("llama", {"key_composition": "head", "value_composition": "head"}),
        ("llama", {"key_composition": "pool", "value_composition": "pool"}),
        ("llama", {"key_composition": "head", "value_composition": "head", "kv_groups": 2}),
        ("qwen2", {}),
        ("llama-rope-bias-wide-tied", {"key_composition": "share", "value_composition": "latent"}),
    ],
)
def test_the_objective_is_that_of_errors_written_out(case, changes, tmp_path):
    source = stock_checkpoint(tmp_path / "src", case, num_hidden_layers=1)
    fit, wanted, composed, ids = fit_of(source, **changes)
    old = composed.query
    if old is None:
        old = split_heads(read_projection(fit.plan.source, 0, "query"), fit.plan.source.head_dim)
    old = 0.7 * old  # of a model that has learnt nothing they are as good as can be
    composed = replace(composed, query=old)
    fitted = fit.regress_scores(0, composed, wanted)
    before, after = (errors_written_out(fit, composed, ids, source, query) for query in (old, fitted.query))
    assert 0 < after < before
    # The same moments say what the change gains.
    runner = fit.runner_of(0, fit._stored(composed, "F32"))
    regression = ScoreRegression(wanted, runner.attention, torch.float32, False)
    size = stream_size(fit.original[:], fit.compressed[:])
    regression.add(runner.attend(fit.compressed[:]), size, torch.arange(SEQUENCES))
    width = regression.inputs[0].shape[-1]
    places = np.arange(len(old)).reshape(len(composed.key.reconstruct()), -1)
    places = places[list(composed.order or range(len(places)))].reshape(-1)
    gained, order = 0.0, list(range(SEQUENCES))
    group = len(old) // len(composed.key.reconstruct())
    for head, place in enumerate(places):
        (moments,), (cross,) = regression._normal(head // group, [place], order, torch.device("cpu"))
        inputs = torch.cat(regression.inputs).double()
        tables = [table[0].repeat(SEQUENCES, 1).double() for table in regression.rotation]
        for query, sign in ((old, -1), (fitted.query, 1)):
            q = inputs @ torch.from_numpy(query[head, :, :width]).T
            q = rotate_heads(q[None, :, None], *(table[None] for table in tables))[0, :, 0]
            gained += sign * float((q * ((moments.double() @ q[..., None])[..., 0] - 2 * cross)).sum())
    assert gained == pytest.approx(after - before, rel=1e-3)


@pytest.mark.parametrize(("case", "changes"), [("qwen3", {}), ("llama", {"fit": "activations"})])
def test_queries_are_fitted_to_composed_keys_of_the_aligned_fit_alone(case, changes, tmp_path):
    """Not where a norm follows on them, either."""
    source = stock_checkpoint(tmp_path / "src", case, num_hidden_layers=1)
    assert fit_of(source, **changes)[1] is None
    fit, wanted, *_ = fit_of(stock_checkpoint(tmp_path / "other", num_hidden_layers=1))
    layer = fit.plan.layers[0]
    assert wanted is not None
    assert fit._scores_of(replace(layer, spec=replace(layer.spec, key=layer.before.key))) is None


def test_one_sequence_changes_nothing_and_as_many_as_are_wanted_are_taken(tmp_path):
    source = stock_checkpoint(tmp_path / "src", num_hidden_layers=1)
    fit, wanted, composed, _ = fit_of(source)
    assert len(wanted) == SEQUENCES and not composed.query
    old = 0.7 * split_heads(read_projection(fit.plan.source, 0, "query"), fit.plan.source.head_dim)
    for count in (1, 5):
        few = OriginalScores(count, wanted.at, wanted.hidden, *(kept[:count] for kept in _lists(wanted)))
        assert not few.wants_more
        found = fit.regress_scores(0, replace(composed, query=old), few).query
        assert np.array_equal(found, old) == (count == 1)


def _lists(wanted):
    return wanted.queries, wanted.keys, wanted.importance


def test_steps_stop_where_other_sequences_gain_no_more():
    """Of one direction that both parts have in common and one that either has alone, the first is learnt."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator)
    moments, tables = torch.eye(2).repeat(40, 1, 1), (torch.ones(40, 2), torch.zeros(40, 2))
    true = torch.randn(2, 3, generator=generator)
    common = inputs @ true.T

    def best_change(residual):
        whole = scores._LeastSquares(inputs, moments, residual, *tables, False)
        return scores._best_change(whole, [whole.part(slice(20)), whole.part(slice(20, None))])

    found = best_change(common)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    opposed = torch.cat((common[:20], -(inputs[20:] @ true.T)))
    assert best_change(opposed) is None


def test_conjugate_gradients_end_at_the_solution():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, target = root @ root.T + torch.eye(6), torch.randn(6, generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, target)
    iterates = list(conjugate_gradients(lambda x: matrix @ x, target, 6))
    distances = [float((one - expected).norm()) for one in iterates]
    assert len(iterates) == 6 and distances[-1] < 1e-8
    assert distances == sorted(distances, reverse=True)
    assert [float(x.norm()) for x in conjugate_gradients(lambda x: x, torch.zeros(3), 5)] == [0.0]
    assert len(list(conjugate_gradients(lambda x: x, torch.ones(3), 5))) == 1


def test_where_heads_stand_is_known(tmp_path):
    heads = read_heads(open_checkpoint(stock_checkpoint(tmp_path / "src")), 0)
    assert heads.order is None
    once = reorder(heads, [2, 0, 3, 1])
    assert once.order == (2, 0, 3, 1) and reorder(once, [1, 0, 2, 3]).order == (0, 2, 3, 1)
    clustered, _ = cluster(heads, None, "weights", 2)
    assert all(np.array_equal(clustered.key[place], heads.key[head]) for place, head in enumerate(clustered.order))

    def swapped(part, _, options):
        side = FactoredHeads(POOLED, 2, 4, np.zeros((4, 33)))
        return side, reorder(part, [1, 0])

    _, moved = compose_groups(swapped, clustered, None, CompositionOptions(2, "weights"), 2)
    assert all(np.array_equal(moved.key[place], heads.key[head]) for place, head in enumerate(moved.order))
