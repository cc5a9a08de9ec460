"""Pruning proper: some heads stay bit-identical, the others become real combinations of them.

Kept heads are chosen by pivoted elimination on the Gram (the head that explains most of what is left is kept next) or
by how much they contribute to the layer's output, ‖o_proj · head‖. With the ``aligned`` fit a pruned head is
turned towards the kept ones first; q_proj and o_proj take the turn back.
"""

import torch

from mea_compress.alignment import change_key_basis, change_value_basis, fold_head_norm, output_metric
from mea_compress.calibration import LayerStatistics
from mea_compress.composed import Composed
from mea_compress.compositions.measure import key_cross, key_weights, moment, through, value_cross
from mea_compress.compositions.request import Request
from mea_compress.heads import AttentionHeads

_ROUNDS = 200


def choose_kept(gram: torch.Tensor, components: int) -> list[int]:
    """Pivoted elimination: heads that span the others best, ascending.

    Args:
        gram: H × H inner products.
        components: How many to keep.
    """
    left = gram.clone()
    kept: list[int] = []
    for _ in range(components):
        diagonal = left.diagonal()
        gain = left.square().sum(0) / diagonal.clamp(min=1e-12 * float(gram.diagonal().max()))
        gain[kept] = -1.0
        pivot = int(gain.argmax())
        kept.append(pivot)
        left = left - torch.outer(left[:, pivot], left[pivot]) / left[pivot, pivot].clamp(min=1e-300)
    return sorted(kept)


def largest_contributions(heads: AttentionHeads, second: torch.Tensor | None, components: int) -> list[int]:
    """Heads that send most through o_proj, E‖W_O V x‖² summed over the group's queries, ascending.

    Args:
        heads: The layer.
        second: E[x xᵀ] of what attention averages; None for the identity.
        components: How many to keep.
    """
    metric = output_metric(fold_head_norm(heads))
    sent = torch.einsum("gab,gax,gbx->g", metric, through(heads.value, second), heads.value)
    return sorted(sent.argsort(descending=True, stable=True)[:components].tolist())


def least_squares(gram: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """W (C, H) with head h ≈ sum over c of W[c, h] kept head c; the identity on the kept ones."""
    weight = torch.linalg.pinv(gram[kept][:, kept], hermitian=True) @ gram[kept]
    weight[:, kept] = torch.eye(len(kept), dtype=gram.dtype)
    return weight


class Prune:
    """Kept heads and real combinations of them, for keys and values."""

    name = "prune"

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed keys and the layer whose queries fit them."""
        components, fit = int(request.components), request.fit
        second = moment(statistics, fit, "key")
        turning = fit == "aligned" and heads.key_norm is None
        cross = key_cross(heads, statistics, fit) if turning else None
        if request.prune_by == "contribution":
            kept = largest_contributions(heads, moment(statistics, fit, "value"), components)
        elif cross is not None:
            kept = choose_kept(_coherent(cross), components)
        else:
            kept = choose_kept(torch.einsum("gdx,hdx->gh", through(heads.key, second), heads.key), components)
        if cross is not None:
            weights = key_weights(heads, statistics, fit).T
            plain = cross / (weights[:, :, None] * weights[:, None, :])
            heads = change_key_basis(heads, _turn_to_kept(plain, kept))
        return self._composed(heads.key, kept, second), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed values and the layer whose o_proj fits them."""
        components, fit = int(request.components), request.fit
        second = moment(statistics, fit, "value")
        if request.prune_by == "contribution":
            kept = largest_contributions(heads, second, components)
        else:
            kept = choose_kept(torch.einsum("gdx,hdx->gh", through(heads.value, second), heads.value), components)
        if fit == "aligned":
            heads = fold_head_norm(heads)
            heads = change_value_basis(heads, _rotate_to_kept(value_cross(heads.value, second), kept))
        return self._composed(heads.value, kept, second), heads

    def _composed(self, side: torch.Tensor, kept: list[int], second: torch.Tensor | None) -> Composed:
        gram = torch.einsum("gdx,hdx->gh", through(side, second), side)
        return Composed(self.name, side.shape[0], side.shape[1], side[kept].flatten(0, 1), least_squares(gram, kept))


def _coherent(cross: torch.Tensor) -> torch.Tensor:
    """Inner products that heads could reach if each pair were turned at will, (H, H)."""
    return cross.abs().sum(0)


def _turn_to_kept(cross: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Phases of the pruned heads, (H, P); alternates with least squares."""
    heads, pairs = cross.shape[1], cross.shape[0]
    pruned = [h for h in range(heads) if h not in kept]
    z = torch.ones(heads, pairs, dtype=cross.dtype)
    if not pruned:
        return z
    # Begin with each pruned head turned to the kept head that it could resemble most.
    likeness = _coherent(cross)
    for g in pruned:
        near = max(kept, key=lambda h: float(likeness[g, h] / cross[:, h, h].real.sum().clamp(min=1e-300).sqrt()))
        z[g] = _unit(cross[:, g, near].conj())
    for _ in range(_ROUNDS):
        aligned = cross * z.T[:, :, None] * z.T[:, None, :].conj()
        weight = least_squares(aligned.real.sum(0), kept)  # (C, H)
        inner = torch.einsum("cg,pgc->gp", weight.to(cross.dtype), cross[:, :, kept] * z[kept].T[:, None, :].conj())
        new = z.clone()
        new[pruned] = _unit(inner.conj())[pruned]
        change = float((new - z).abs().max())
        z = new
        if change < 1e-9:
            break
    return z


def _unit(z: torch.Tensor) -> torch.Tensor:
    return torch.where(z.abs() > 0, z / z.abs().clamp(min=1e-300), torch.ones_like(z))


def _rotate_to_kept(cross: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Rotations of the pruned heads, (H, d, d); alternates with least squares."""
    heads, head_dim = cross.shape[0], cross.shape[-1]
    pruned = [h for h in range(heads) if h not in kept]
    maps = torch.eye(head_dim, dtype=cross.dtype).repeat(heads, 1, 1)
    if not pruned:
        return maps
    for g in pruned:
        near = max(kept, key=lambda h: float(torch.linalg.matrix_norm(cross[g, h], "nuc") / cross[h, h].trace().sqrt()))
        left, _, right = torch.linalg.svd(cross[g, near])
        maps[g] = right.mT @ left.mT
    for _ in range(_ROUNDS):
        gram = torch.einsum("gab,ghbc,hac->gh", maps, cross, maps)
        weight = least_squares(gram, kept)
        inner = torch.einsum("cg,gcbe->gbe", weight, cross[:, kept])
        left, _, right = torch.linalg.svd(inner[pruned])
        new = right.mT @ left.mT
        change = float((new - maps[pruned]).abs().max())
        maps[pruned] = new
        if change < 1e-9:
            break
    return maps
