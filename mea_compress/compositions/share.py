"""Head sharing: some heads stay bit-identical and every other head uses one of them (DirectShare, 2402.11819).

With the ``weights`` fit a pruned head simply takes the kept head that is most like it. The other fits first rotate
it towards that head, and q_proj and o_proj take the rotation back. The composition is a matrix of zeros and ones.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mea_compress.compositions.base import CompositionOptions, register
from mea_compress.compositions.moments import head_gram, key_cross, key_weights, moment, value_cross
from mea_compress.heads.alignment import change_key_basis, change_value_basis, fold_head_norm, nearest_rotation
from mea_compress.heads.composed import Array, FactoredHeads, join_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import SELECTED, Form


def choose_shared(likeness: Array, components: int) -> tuple[list[int], list[int]]:
    """Kept heads, added one at a time so that the total likeness grows most, and for every head its place among them.

    Args:
        likeness: What is gained when head g uses head h, (H, H); the diagonal is the most that can be gained.
        components: How many to keep.
    """
    kept: list[int] = []
    for _ in range(components):
        others = [h for h in range(len(likeness)) if h not in kept]
        kept.append(max(others, key=lambda h: likeness[:, [*kept, h]].max(1).sum()))
    kept.sort()
    place = likeness[:, kept].argmax(1).tolist()
    for index, head in enumerate(kept):
        place[head] = index
    return kept, place


@register
@dataclass(frozen=True)
class Share:
    """Kept heads that others use too, for keys and values."""

    name: ClassVar[str] = "share"
    form: ClassVar[Form] = SELECTED
    needs_queries: ClassVar[bool] = False

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit keys, and queries to them."""
        components, fit = int(options.components), options.fit
        cross = key_cross(heads, statistics, fit)
        energy = np.maximum(cross.diagonal(axis1=-2, axis2=-1).real, 1e-300)  # (P, H)
        if fit == "aligned" and heads.key_norm is None:
            likeness = (np.square(np.abs(cross)) / energy[:, None, :]).sum(0)
            kept, place = choose_shared(likeness, components)
            weights = key_weights(heads, statistics, fit).T
            plain = cross / (weights[:, :, None] * weights[:, None, :])
            factors = np.ones((cross.shape[1], cross.shape[0]), cross.dtype)
            for head, index in enumerate(place):
                if head not in kept:
                    target = kept[index]  # k[head] ≈ ratio · k[target]: dividing by the ratio makes them equal
                    ratio = plain[:, head, target] / np.maximum(plain[:, target, target].real, 1e-300)
                    some = np.abs(ratio) > 1e-6
                    factors[head] = np.where(some, 1 / np.where(some, ratio, 1), 1e6)
            heads = change_key_basis(heads, factors)
        else:
            gram = cross.real.sum(0)
            kept, place = choose_shared(_overlap(gram), components)
        return self._factored(heads.key, kept, place), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit values, and o_proj to them."""
        components, fit = int(options.components), options.fit
        covariance = moment(statistics, fit, "value")
        if fit != "aligned":
            kept, place = choose_shared(_overlap(head_gram(heads.value, covariance)), components)
            return self._factored(heads.value, kept, place), heads
        heads = fold_head_norm(heads)
        cross = value_cross(heads.value, covariance)
        trace = np.trace(cross, axis1=-2, axis2=-1)  # (H, H)
        likeness = np.linalg.matrix_norm(cross, ord="nuc") / np.sqrt(np.maximum(trace.diagonal(), 1e-300))
        kept, place = choose_shared(likeness, components)
        maps = np.tile(np.eye(cross.shape[-1]), (len(place), 1, 1))
        for head, index in enumerate(place):
            if head not in kept:
                size = math.sqrt(
                    max(float(trace[kept[index], kept[index]]), 0.0) / max(float(trace[head, head]), 1e-300)
                )
                rotation = nearest_rotation(cross[head, kept[index]])
                maps[head] = rotation * (size if heads.head_norm is None and size > 0 else 1.0)
        heads = change_value_basis(heads, maps)
        return self._factored(heads.value, kept, place), heads

    def _factored(self, side: Array, kept: list[int], place: list[int]) -> FactoredHeads:
        weight = np.zeros((len(kept), len(side)))
        weight[place, np.arange(len(side))] = 1.0
        return FactoredHeads(self.form, side.shape[0], side.shape[1], join_heads(side[kept]), weight)


def _overlap(gram: Array) -> Array:
    """Minus the squared distance between head g and head h, shifted so that it is positive."""
    energy = gram.diagonal()
    distance = energy[:, None] + energy[None] - 2 * gram
    return distance.max() - distance
