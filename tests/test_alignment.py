"""Every change of basis leaves the attention block as it is; alternation beats the obvious starts."""

from dataclasses import replace

import pytest
import torch
from blocks import HEAD_DIM, HEADS, make_heads, run

from mea_compress.alignment import (
    align_phases,
    align_rotations,
    change_key_basis,
    change_value_basis,
    fold_head_norm,
    output_metric,
    root,
)


@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, HEAD_DIM // 2])
def test_key_basis_leaves_the_block_alone(rotary_dim):
    heads = make_heads(rotary_dim=rotary_dim)
    factors = torch.randn(HEADS, HEAD_DIM // 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(2))
    changed = change_key_basis(heads, factors)
    assert not torch.allclose(changed.key, heads.key)
    torch.testing.assert_close(run(changed), run(heads), rtol=0, atol=1e-10)


def test_any_invertible_map_of_values_without_head_norm():
    heads = make_heads()
    maps = torch.randn(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(change_value_basis(heads, maps)), run(heads), rtol=0, atol=1e-10)


def test_rotations_of_values_with_head_norm_once_its_weight_is_folded():
    heads = make_heads(head_norm=True)
    folded = fold_head_norm(heads)
    torch.testing.assert_close(run(folded), run(heads), rtol=0, atol=1e-10)
    random = torch.randn(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rotations = torch.linalg.qr(random).Q
    torch.testing.assert_close(run(change_value_basis(folded, rotations)), run(heads), rtol=0, atol=1e-10)
    # A map that is no rotation would not be exact: the check can fail.
    assert (run(change_value_basis(folded, random)) - run(heads)).abs().max() > 1e-3


def test_phases_find_heads_that_are_turned_copies():
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(HEAD_DIM // 2, 40, dtype=torch.complex128, generator=generator)
    turns = torch.exp(2j * torch.pi * torch.rand(HEADS, HEAD_DIM // 2, generator=generator, dtype=torch.float64))
    copies = base * turns[..., None]  # (H, P, samples)
    cross = torch.einsum("gpx,hpx->pgh", copies, copies.conj())
    z = align_phases(cross, components=1)
    assert torch.allclose(z.abs(), torch.ones_like(z.abs()))
    aligned = (cross * z.T[:, :, None] * z.T[:, None, :].conj()).real.sum(0)
    values = torch.linalg.eigvalsh(aligned)
    assert values[-1] / values.sum() > 1 - 1e-9


def test_rotations_find_heads_that_are_rotated_copies():
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(HEAD_DIM, 40, dtype=torch.float64, generator=generator)
    turns = torch.linalg.qr(torch.randn(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64, generator=generator)).Q
    copies = turns @ base
    cross = torch.einsum("gax,hbx->ghab", copies, copies)
    maps = align_rotations(cross, components=1)
    identity = torch.eye(HEAD_DIM, dtype=torch.float64).expand(HEADS, -1, -1)
    torch.testing.assert_close(maps @ maps.mT, identity)
    values = torch.linalg.eigvalsh(torch.einsum("gab,ghbc,hac->gh", maps, cross, maps))
    assert values[-1] / values.sum() > 1 - 1e-9


@pytest.mark.parametrize("components", [1, 2, 3])
def test_alignment_never_captures_less_than_no_alignment(components):
    heads = make_heads(seed=components)
    first, second = heads.pairs
    pairs = torch.complex(heads.key[:, first], heads.key[:, second])
    cross = torch.einsum("gpx,hpx->pgh", pairs, pairs.conj())
    z = align_phases(cross, components)
    before = torch.linalg.eigvalsh(cross.real.sum(0))[-components:].sum()
    after = torch.linalg.eigvalsh((cross * z.T[:, :, None] * z.T[:, None, :].conj()).real.sum(0))[-components:].sum()
    assert after >= before - 1e-12


def test_root_of_a_singular_metric_is_clamped():
    heads = make_heads()
    flat = replace(heads, output=heads.output * torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64))
    square, inverse = root(output_metric(flat), floor=1e-8)
    assert torch.isfinite(inverse).all()
    torch.testing.assert_close(square @ inverse, torch.eye(HEAD_DIM, dtype=torch.float64).expand(HEADS, -1, -1))
