"""Pruning proper: some heads stay bit-identical, the others become real combinations of them.

Kept heads are chosen by pivoted elimination on the Gram (the head that explains most of what is left is kept next) or
by how much they contribute to the layer's output, ‖o_proj · head‖. With the ``aligned`` fit a pruned head is
rotated towards the kept ones first; q_proj and o_proj take the rotation back.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from mea_compress.compositions.base import CompositionOptions, register
from mea_compress.compositions.moments import apply_covariance, head_gram, key_cross, key_weights, moment, value_cross
from mea_compress.heads.alignment import (
    change_key_basis,
    change_value_basis,
    fold_head_norm,
    nearest_rotation,
    output_metric,
    phase,
    rotated_gram,
)
from mea_compress.heads.composed import Array, FactoredHeads, join_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import KEPT, Form

_ROUNDS = 200


def choose_kept(gram: Array, components: int) -> list[int]:
    """Choose by pivoted elimination the heads that span the others best, ascending.

    Args:
        gram: H × H inner products.
        components: How many to keep.
    """
    left, floor = gram.copy(), max(1e-12 * gram.diagonal().max(), 1e-300)
    kept: list[int] = []
    for _ in range(components):
        diagonal = left.diagonal()
        gain = np.square(left).sum(0) / np.maximum(diagonal, floor)
        gain[kept] = -1.0
        pivot = int(gain.argmax())
        kept.append(pivot)
        if left[pivot, pivot] > floor:  # else those kept so far span it, and there is nothing to take out
            left = left - np.outer(left[:, pivot], left[pivot]) / left[pivot, pivot]
    return sorted(kept)


def largest_contributions(heads: AttentionHeads, covariance: Array | None, components: int) -> list[int]:
    """Return the heads that send most through o_proj, E‖W_O V x‖² summed over the group's queries, ascending.

    Args:
        heads: The layer.
        covariance: E[x xᵀ] of what attention averages; None for the identity.
        components: How many to keep.
    """
    metric = output_metric(fold_head_norm(heads))
    sent = ((metric @ heads.value) * apply_covariance(heads.value, covariance)).sum((1, 2))
    return sorted(np.argsort(-sent, stable=True)[:components].tolist())


def least_squares(gram: Array, kept: list[int]) -> Array:
    """W (C, H) with head h ≈ sum over c of W[c, h] kept head c; the identity on the kept ones."""
    weight = np.linalg.pinv(gram[kept][:, kept], hermitian=True) @ gram[kept]
    weight[:, kept] = np.eye(len(kept))
    return weight


@register
@dataclass(frozen=True)
class Prune:
    """Kept heads and real combinations of them, for keys and values.

    Attributes:
        by: How kept heads are chosen: by ``pivot`` (what they explain of the others) or by ``contribution`` (what they
            send through o_proj).
    """

    name: ClassVar[str] = "prune"
    form: ClassVar[Form] = KEPT
    by: Literal["pivot", "contribution"] = field(default="pivot", metadata={"setting": "prune_by"})

    @property
    def needs_queries(self) -> bool:
        """Whether o_proj decides, even with the ``weights`` fit."""
        return self.by == "contribution"

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit keys, and queries to them."""
        components, fit = int(options.components), options.fit
        covariance = moment(statistics, fit, "key")
        rotating = fit == "aligned" and heads.key_norm is None
        cross = key_cross(heads, statistics, fit) if rotating else None
        if self.by == "contribution":
            kept = largest_contributions(heads, moment(statistics, fit, "value"), components)
        elif cross is not None:
            kept = choose_kept(_coherent(cross), components)
        else:
            kept = choose_kept(head_gram(heads.key, covariance), components)
        if cross is not None:
            weights = key_weights(heads, statistics, fit).T
            plain = cross / (weights[:, :, None] * weights[:, None, :])
            heads = change_key_basis(heads, _phases_to_kept(plain, kept))
        return self._factored(heads.key, kept, covariance), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit values, and o_proj to them."""
        components, fit = int(options.components), options.fit
        covariance = moment(statistics, fit, "value")
        if self.by == "contribution":
            kept = largest_contributions(heads, covariance, components)
        else:
            kept = choose_kept(head_gram(heads.value, covariance), components)
        if fit == "aligned":
            heads = fold_head_norm(heads)
            heads = change_value_basis(heads, _rotate_to_kept(value_cross(heads.value, covariance), kept))
        return self._factored(heads.value, kept, covariance), heads

    def _factored(self, side: Array, kept: list[int], covariance: Array | None) -> FactoredHeads:
        weight = least_squares(head_gram(side, covariance), kept)
        return FactoredHeads(self.form, side.shape[0], side.shape[1], join_heads(side[kept]), weight)


def _coherent(cross: Array) -> Array:
    """Inner products that heads could reach if each pair were rotated at will, (H, H)."""
    return np.abs(cross).sum(0)


def _phases_to_kept(cross: Array, kept: list[int]) -> Array:
    """Phases of the pruned heads, (H, P); alternates with least squares."""
    heads, pairs = cross.shape[1], cross.shape[0]
    pruned = [h for h in range(heads) if h not in kept]
    z = np.ones((heads, pairs), cross.dtype)
    if not pruned:
        return z
    # Begin with each pruned head rotated to the kept head that it could resemble most.
    likeness = _coherent(cross)
    for g in pruned:
        near = max(kept, key=lambda h: float(likeness[g, h]) / math.sqrt(max(cross[:, h, h].real.sum(), 1e-300)))
        z[g] = phase(cross[:, g, near].conj())
    for _ in range(_ROUNDS):
        aligned = cross * z.T[:, :, None] * z.T[:, None, :].conj()
        weight = least_squares(aligned.real.sum(0), kept)  # (C, H)
        inner = np.einsum("cg,pgc->gp", weight, cross[:, :, kept] * z[kept].T[:, None, :].conj())
        new = z.copy()
        new[pruned] = phase(inner.conj())[pruned]
        change = np.abs(new - z).max()
        z = new
        if change < 1e-9:
            break
    return z


def _rotate_to_kept(cross: Array, kept: list[int]) -> Array:
    """Rotations of the pruned heads, (H, d, d); alternates with least squares."""
    heads, head_dim = cross.shape[0], cross.shape[-1]
    pruned = [h for h in range(heads) if h not in kept]
    maps = np.tile(np.eye(head_dim), (heads, 1, 1))
    if not pruned:
        return maps
    sizes = np.sqrt(np.maximum(np.trace(cross[kept, kept], axis1=-2, axis2=-1), 1e-300))
    for g in pruned:
        near = kept[int(np.argmax(np.linalg.matrix_norm(cross[g, kept], ord="nuc") / sizes))]
        maps[g] = nearest_rotation(cross[g, near])
    for _ in range(_ROUNDS):
        weight = least_squares(rotated_gram(cross, maps), kept)
        inner = (weight.T[..., None, None] * cross[:, kept]).sum(1)  # (H, d, d)
        new = nearest_rotation(inner[pruned])
        change = np.abs(new - maps[pruned]).max()
        maps[pruned] = new
        if change < 1e-9:
            break
    return maps
