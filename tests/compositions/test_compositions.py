"""Every composition on every kind of head: exact where nothing is left out, best where something is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from blocks import HEAD_DIM, HEADS, D, make_heads, run

from mea_compress.compositions import CompositionOptions, find_method
from mea_compress.compositions.frequency import Frequency, allocate_components
from mea_compress.compositions.head import combine
from mea_compress.compositions.latent import low_rank
from mea_compress.compositions.pool import group_heads
from mea_compress.compositions.prune import Prune, choose_kept, least_squares
from mea_compress.errors import RequestError
from mea_compress.heads.statistics import LayerStatistics

KEYS = ("head", "frequency", "latent", "joint", "pool", "prune", "share")
VALUES = ("head", "latent", "joint", "pool", "prune", "share")
FITS = ("weights", "activations", "aligned")


def make_statistics(heads=None, seed=7, cost=None):
    """Second moments of random inputs, and the products of the keys that they make."""
    heads = heads or make_heads()
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((400, D)) * np.linspace(0.1, 2, D)
    x = np.concatenate((x, np.ones((400, 1))), 1)
    smooth = (x[1:] + x[:-1]) / 2
    if cost is None:
        cost = generator.random((HEADS, HEAD_DIM // 2)) + 0.1
    sent = heads.key @ x.T  # (H, d, tokens)
    if heads.key_norm is not None:
        sent = sent / np.sqrt(np.square(sent).mean(1, keepdims=True) + heads.norm_eps) * heads.key_norm[:, None]
    keys = as_pairs(sent, heads)  # (H, P, tokens)
    covariance = np.einsum("gpt,hpt->pgh", keys, keys.conj()) / 400
    return LayerStatistics(400, x.T @ x / 400, smooth.T @ smooth / 399, covariance, cost)


def as_pairs(channels, heads):
    first, other = heads.pairs
    return channels[:, first] + 1j * channels[:, other]


def surgery(heads, kind, side, components, fit):
    statistics = None if fit == "weights" else make_statistics(heads)
    return getattr(find_method(kind)(), f"{side}s")(heads, statistics, CompositionOptions(components, fit))


def with_composed(heads, composed, side):
    rebuilt = composed.reconstruct()
    if side == "key" and composed.form.weighted_keys and heads.key_norm is not None:
        rebuilt = rebuilt / heads.key_norm[:, None]
    return replace(heads, **{side: rebuilt})


def lost(heads, kind, side, components, fit):
    """Relative squared change of the block's output on random input."""
    composed, changed = surgery(heads, kind, side, components, fit)
    expected = run(heads)
    return np.square(run(with_composed(changed, composed, side)) - expected).sum() / np.square(expected).sum()


CASES = [("key", kind) for kind in KEYS] + [("value", kind) for kind in VALUES]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("head_norm", "key_norm"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("side", "kind"), CASES)
def test_with_as_many_components_as_heads_the_block_is_the_same(side, kind, head_norm, key_norm, fit):
    heads = make_heads(head_norm=head_norm, key_norm=key_norm)
    composed, _ = surgery(heads, kind, side, HEADS, fit)
    assert composed.components == HEADS
    assert lost(heads, kind, side, HEADS, fit) < 1e-18


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("head_norm", "key_norm"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("side", "kind"), CASES)
def test_with_half_the_components_half_is_cached_and_the_rest_is_kept_in_place(side, kind, head_norm, key_norm, fit):
    heads = make_heads(head_norm=head_norm, key_norm=key_norm)
    composed, changed = surgery(heads, kind, side, HEADS // 2, fit)
    assert composed.projection.shape == (HEADS // 2 * HEAD_DIM, D + 1)
    assert composed.expansion().shape == (HEADS * HEAD_DIM, HEADS // 2 * HEAD_DIM)
    assert np.isfinite(run(with_composed(changed, composed, side))).all()
    if kind != "pool":  # what else changed is only a change of basis (pool folds its factors into it)
        np.testing.assert_allclose(run(changed), run(heads), rtol=0, atol=1e-10)


def test_weights_fit_of_head_is_the_papers_svd():
    heads = make_heads()
    matrix = heads.key.reshape(HEADS, -1).T  # (d·(D + 1), H)
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    expected = (left[:, :2] * singular[:2]) @ right[:2]
    composed, _ = surgery(heads, "head", "key", 2, "weights")
    np.testing.assert_allclose(composed.reconstruct().reshape(HEADS, -1).T, expected, atol=1e-12)


def test_combine_weighs_inputs_by_their_moment():
    heads, second = make_heads().value, make_statistics().moment

    def error(rebuilt):
        gap = heads - rebuilt
        return np.einsum("gdx,xy,gdy->", gap, second, gap)

    best = error(combine(heads, 2, second).reconstruct())
    generator = np.random.default_rng(1)
    for _ in range(50):  # no other two directions do better
        basis = np.linalg.qr(generator.standard_normal((HEADS, 2))).Q
        assert error(np.einsum("gh,hdx->gdx", basis @ basis.T, heads)) >= best - 1e-9


def test_low_rank_is_the_whitened_svd():
    rows, second = make_heads().value.reshape(-1, D + 1), make_statistics().moment
    expansion, projection = low_rank(rows, second, 5)
    values, vectors = np.linalg.eigh(second)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    left, singular, right = np.linalg.svd(rows @ root, full_matrices=False)
    expected = (left[:, :5] * singular[:5]) @ right[:5]
    np.testing.assert_allclose(expansion @ projection @ root, expected, atol=1e-9)


def test_frequency_captures_what_the_complex_gram_says():
    heads, second = make_heads(), make_statistics().moment
    pairs = as_pairs(heads.key, heads)
    for uniform in (True, False):
        method = Frequency(allocation="uniform" if uniform else "energy")
        composed, _ = method.keys(heads, make_statistics(), CompositionOptions(2, "activations"))
        assert sum(composed.rotary_components) == 2 * HEAD_DIM // 2
        assert not uniform or set(composed.rotary_components) == {2}
        gap = heads.key - composed.reconstruct()
        error = np.einsum("gdx,xy,gdy->", gap, second, gap)
        expected = 0.0
        for p, count in enumerate(composed.rotary_components):
            # An independent route: the singular values of the pair's whitened rows.
            root = np.linalg.cholesky(second + 1e-12 * np.eye(D + 1))
            singular = np.linalg.svdvals(pairs[:, p] @ root)
            expected += np.square(singular[count:]).sum()
        assert error == pytest.approx(expected, rel=1e-6)


def test_budgeted_components_are_the_best_split_there_is():
    energies = -np.sort(-np.random.default_rng(3).random((4, 3)), 1)
    for total in range(1, 13):
        found = allocate_components(energies, total)
        splits = [s for s in itertools.product(range(4), repeat=4) if sum(s) == total]
        best = max(sum(float(energies[p, :c].sum()) for p, c in enumerate(s)) for s in splits)
        assert sum(found) == total
        assert sum(float(energies[p, :c].sum()) for p, c in enumerate(found)) == pytest.approx(best)


def test_kept_heads_stay_bit_identical():
    heads = make_heads()
    for kind, side, fit in itertools.product(("prune", "share"), ("key", "value"), FITS):
        composed, _ = surgery(heads, kind, side, 2, fit)
        components = composed.projection.reshape(2, HEAD_DIM, -1)
        original = getattr(heads, side)
        kept = [g for g in range(HEADS) if any(np.array_equal(original[g], c) for c in components)]
        assert len(kept) == 2, (kind, side, fit)
        if kind == "share":
            assert set(np.unique(composed.weight)) == {0.0, 1.0}
            assert (composed.weight.sum(0) == 1).all()


@pytest.mark.parametrize("fit", FITS)
def test_heads_that_send_most_are_kept(fit):
    heads = make_heads()
    scale = np.array([1.0, 3.0, 0.5, 2.0])
    heads = replace(heads, value=heads.value * scale[:, None, None])
    statistics = None if fit == "weights" else make_statistics(heads)
    for side in ("key", "value"):
        composed, _ = getattr(Prune(by="contribution"), f"{side}s")(heads, statistics, CompositionOptions(2, fit))
        kept = composed.projection.reshape(2, HEAD_DIM, -1)
        assert np.array_equal(kept, getattr(heads, side)[[1, 3]])


def test_pivoting_explains_heads_as_well_as_any_choice_here():
    mix = np.array([[1, 0], [0, 1], [0.6, 0.4], [1, -1]])
    heads = mix @ np.random.default_rng(8).standard_normal((2, 30))
    gram = heads @ heads.T
    kept = choose_kept(gram, 2)
    weight = least_squares(gram, kept)
    np.testing.assert_allclose(weight.T @ heads[kept], heads, atol=1e-9)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", ["prune", "share", "head", "pool"])
def test_heads_that_are_copies_or_zero_are_no_trouble(kind, fit):
    """More components than the heads' Gram has rank; warnings of NumPy are errors here."""
    heads = make_heads()
    for side in ("key", "value"):
        whole = getattr(heads, side)
        for rows in (np.stack([whole[0]] * HEADS), np.concatenate((whole[:1], 0 * whole[1:]))):
            same = replace(heads, **{side: rows})
            assert lost(same, kind, side, 2, fit) < (1e-12 if kind == "prune" else 1)


def test_frequency_keys_want_a_key_norm_without_zeros():
    heads = make_heads(key_norm=True)
    heads = replace(heads, key_norm=heads.key_norm * (np.arange(HEAD_DIM) != 3))
    with pytest.raises(RequestError, match="choose `key_composition` head"):
        surgery(heads, "frequency", "key", 2, "weights")


@pytest.mark.parametrize("seed", range(5))
def test_grouping_is_the_best_pairing(seed):
    distance = np.random.default_rng(seed).random((6, 6))
    distance = distance + distance.T
    np.fill_diagonal(distance, 0)
    found = group_heads(distance, 3)
    assert sorted(itertools.chain(*found)) == list(range(6))

    def cost(grouping):
        return sum(float(distance[a, b]) for members in grouping for a in members for b in members)

    def pairings(rest):
        if not rest:
            yield []
        for other in rest[1:]:
            remaining = [h for h in rest[1:] if h != other]
            yield from ([[rest[0], other], *more] for more in pairings(remaining))

    assert cost(found) == pytest.approx(min(cost(p) for p in pairings(list(range(6)))))


def test_many_heads_are_grouped_by_swaps_and_plain_pairs_are_found():
    generator = np.random.default_rng(0)
    partner = generator.permutation(16).reshape(8, 2).tolist()
    distance = generator.random((16, 16)) + 1
    distance = distance + distance.T
    np.fill_diagonal(distance, 0)
    for a, b in partner:
        distance[a, b] = distance[b, a] = 0.01
    assert group_heads(distance, 8) == sorted(sorted(pair) for pair in partner)


def test_pool_averages_adjacent_heads_when_it_looks_at_weights_alone():
    heads = make_heads()
    composed, _ = surgery(heads, "pool", "key", 2, "weights")
    np.testing.assert_allclose(composed.projection[:HEAD_DIM], (heads.key[0] + heads.key[1]) / 2)


def test_pool_wants_groups_of_one_size():
    with pytest.raises(RequestError, match="divides 4"):
        surgery(make_heads(), "pool", "key", 3, "aligned")


@pytest.mark.parametrize("side", ["key", "value"])
def test_what_is_aligned_loses_less_than_what_is_not(side):
    # Heads that are turned copies of two: alignment finds out, the paper's initialisation cannot.
    heads = make_heads()
    generator = np.random.default_rng(9)
    base = getattr(heads, side)[:2]
    if side == "key":
        first, other = heads.pairs
        turn = np.exp(2j * np.pi * generator.random((2, HEAD_DIM // 2)))
        pairs = as_pairs(base, heads) * turn[..., None]
        copies = base.copy()
        copies[:, first], copies[:, other] = pairs.real, pairs.imag
    else:
        copies = np.linalg.qr(generator.standard_normal((2, HEAD_DIM, HEAD_DIM))).Q @ base
    heads = replace(heads, **{side: np.concatenate((base, copies))})
    # Queries of one length: weights that differ by head and pair would make the copies differ again.
    statistics = make_statistics(heads, cost=np.ones((HEADS, HEAD_DIM // 2)))
    composed, changed = getattr(find_method("head")(), f"{side}s")(heads, statistics, CompositionOptions(2, "aligned"))
    expected = run(heads)
    aligned = np.square(run(with_composed(changed, composed, side)) - expected).sum() / np.square(expected).sum()
    unaligned = lost(heads, "head", side, 2, "weights")
    assert unaligned > 1e-2
    assert aligned < (1e-12 if side == "key" else unaligned / 4)
