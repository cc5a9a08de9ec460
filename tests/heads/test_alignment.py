"""Every change of basis leaves the attention block as it is; alternation beats the obvious starts."""

from dataclasses import replace

import numpy as np
import pytest
from blocks import HEAD_DIM, HEADS, make_heads, run

from mea_compress.heads.alignment import (
    align_phases,
    align_rotations,
    change_key_basis,
    change_value_basis,
    fold_head_norm,
    output_metric,
    sqrt_and_inverse_sqrt,
)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def draw_complex(seed, *shape):
    return draw(seed, *shape) + 1j * draw(seed + 100, *shape)


@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, HEAD_DIM // 2])
def test_key_basis_leaves_the_block_alone(rotary_dim):
    heads = make_heads(rotary_dim=rotary_dim)
    changed = change_key_basis(heads, draw_complex(2, HEADS, HEAD_DIM // 2))
    assert not np.allclose(changed.key, heads.key)
    np.testing.assert_allclose(run(changed), run(heads), rtol=0, atol=1e-10)


def test_any_invertible_map_of_values_without_head_norm():
    heads = make_heads()
    maps = draw(3, HEADS, HEAD_DIM, HEAD_DIM)
    np.testing.assert_allclose(run(change_value_basis(heads, maps)), run(heads), rtol=0, atol=1e-10)


def test_rotations_of_values_with_head_norm_once_its_weight_is_folded():
    heads = make_heads(head_norm=True)
    folded = fold_head_norm(heads)
    np.testing.assert_allclose(run(folded), run(heads), rtol=0, atol=1e-10)
    random = draw(4, HEADS, HEAD_DIM, HEAD_DIM)
    rotations = np.linalg.qr(random).Q
    np.testing.assert_allclose(run(change_value_basis(folded, rotations)), run(heads), rtol=0, atol=1e-10)
    # A map that is no rotation would not be exact: the check can fail.
    assert np.abs(run(change_value_basis(folded, random)) - run(heads)).max() > 1e-3


def test_phases_find_heads_that_are_turned_copies():
    base = draw_complex(5, HEAD_DIM // 2, 40)
    turns = np.exp(2j * np.pi * np.random.default_rng(6).random((HEADS, HEAD_DIM // 2)))
    copies = base * turns[..., None]  # (H, P, samples)
    cross = np.einsum("gpx,hpx->pgh", copies, copies.conj())
    z = align_phases(cross, components=1)
    np.testing.assert_allclose(np.abs(z), 1)
    aligned = (cross * z.T[:, :, None] * z.T[:, None, :].conj()).real.sum(0)
    values = np.linalg.eigvalsh(aligned)
    assert values[-1] / values.sum() > 1 - 1e-9


def test_rotations_find_heads_that_are_rotated_copies():
    turns = np.linalg.qr(draw(7, HEADS, HEAD_DIM, HEAD_DIM)).Q
    copies = turns @ draw(6, HEAD_DIM, 40)
    cross = np.einsum("gax,hbx->ghab", copies, copies)
    maps = align_rotations(cross, components=1)
    np.testing.assert_allclose(maps @ maps.mT, np.tile(np.eye(HEAD_DIM), (HEADS, 1, 1)), atol=1e-12)
    values = np.linalg.eigvalsh(np.einsum("gab,ghbc,hac->gh", maps, cross, maps))
    assert values[-1] / values.sum() > 1 - 1e-9


@pytest.mark.parametrize("components", [1, 2, 3])
def test_alignment_never_captures_less_than_no_alignment(components):
    heads = make_heads(seed=components)
    first, second = heads.pairs
    pairs = heads.key[:, first] + 1j * heads.key[:, second]
    cross = np.einsum("gpx,hpx->pgh", pairs, pairs.conj())
    z = align_phases(cross, components)
    before = np.linalg.eigvalsh(cross.real.sum(0))[-components:].sum()
    after = np.linalg.eigvalsh((cross * z.T[:, :, None] * z.T[:, None, :].conj()).real.sum(0))[-components:].sum()
    assert after >= before - 1e-12


def test_root_of_a_singular_metric_is_clamped():
    heads = make_heads()
    flat = replace(heads, output=heads.output * np.array([1.0] * 7 + [0.0]))
    square, inverse = sqrt_and_inverse_sqrt(output_metric(flat), floor=1e-8)
    assert np.isfinite(inverse).all()
    np.testing.assert_allclose(square @ inverse, np.tile(np.eye(HEAD_DIM), (HEADS, 1, 1)), atol=1e-6)
