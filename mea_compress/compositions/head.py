"""Head-level linear composition: every head is a real combination of fewer component heads (arXiv 2601.19611).

With the ``weights`` fit this is the paper's initialisation, the SVD of the (d·D) × H matrix that has a head in each
column. ``activations`` takes the Gram of what the heads send. ``aligned`` first rotates heads within the freedom
that attention leaves, so that they become alike, and lets q_proj and o_proj take the rotations back.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mea_compress.compositions.base import CompositionOptions, register
from mea_compress.compositions.moments import (
    head_gram,
    key_cross,
    key_weights,
    leading_components,
    moment,
    value_cross,
    value_root,
)
from mea_compress.heads.alignment import (
    align_phases,
    align_rotations,
    change_key_basis,
    change_value_basis,
    fold_head_norm,
)
from mea_compress.heads.composed import Array, FactoredHeads, join_heads, split_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import REAL, Form


def combine(heads: Array, components: int, covariance: Array | None, gram: Array | None = None) -> FactoredHeads:
    """Fit the best `components` component heads for real combinations.

    Components are scaled to the size of an average head, so that they survive float16.

    Args:
        heads: (H, d, D + 1), float64.
        components: C, between 1 and H.
        covariance: E[x xᵀ], (D + 1, D + 1), or None for the identity.
        gram: Inner products of the heads, (H, H), in place of those that `covariance` gives.

    Returns:
        Components (C·d, D + 1) and a composition (C, H): the top eigenvectors of
        G[g, h] = tr(W_g Σ W_hᵀ), or of `gram`.
    """
    count, head_dim = heads.shape[:2]
    rows = heads.reshape(count, -1)  # (H, d · (D + 1))
    plain = rows @ rows.T
    if gram is None:
        gram = plain if covariance is None else head_gram(heads, covariance)
    top = leading_components(gram, components)  # (H, C)
    sizes = np.sqrt(np.maximum(((plain @ top) * top).sum(0), 0))  # of the components, (C,)
    average = math.sqrt(plain.trace() / count) or 1.0  # heads that are all zero stay so
    # Products of inner products lose half of the digits, so what is smaller counts as nothing.
    scale = average / np.maximum(sizes, 1e-7 * average)
    projection = ((top * scale).T @ rows).reshape(components * head_dim, -1)
    return FactoredHeads(REAL, count, head_dim, projection, (top / scale).T.copy())


@register
@dataclass(frozen=True)
class Head:
    """Real combinations of component heads, for keys and values."""

    name: ClassVar[str] = "head"
    form: ClassVar[Form] = REAL
    needs_queries: ClassVar[bool] = False

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit keys; see `base.Fit`."""
        components, fit = int(options.components), options.fit
        covariance = moment(statistics, fit, "key")
        weights = key_weights(heads, statistics, fit)
        if heads.key_norm is not None:
            return self._normed_keys(heads, covariance, weights, components, fit), heads
        if fit == "aligned":
            cross = key_cross(heads, statistics, fit)
            phases = align_phases(cross, components)  # (H, P)
            heads = change_key_basis(heads, phases * weights)
            aligned = cross * phases.T[:, :, None] * phases.T[:, None, :].conj()
            return combine(heads.key, components, None, aligned.real.sum(0)), heads
        return combine(heads.key, components, covariance), heads

    def _normed_keys(
        self, heads: AttentionHeads, covariance: Array | None, weights: Array, components: int, fit: str
    ) -> FactoredHeads:
        """Fit keys that a norm follows.

        Under QK-norm heads cannot be rotated; channels and whole heads can still be weighted, since the norm removes
        each head's scale.
        """
        if fit != "aligned":
            return combine(heads.key, components, covariance)
        assert heads.key_norm is not None
        size = np.sqrt(np.square(weights).mean(1))  # (H,)
        shape = np.sqrt(np.square(weights / size[:, None]).mean(0))  # (P,)
        channels = np.abs(heads.key_norm)
        for channel in heads.pairs:
            channels[channel] *= shape
        channels = np.maximum(channels, 1e-6 * channels.max())
        scale = size[:, None, None] * channels[None, :, None]
        factored = combine(heads.key * scale, components, covariance)
        projection = split_heads(factored.projection, factored.head_dim) / channels[:, None]
        assert factored.weight is not None
        weight = factored.weight / size  # (C, H)
        return FactoredHeads(REAL, factored.heads, factored.head_dim, join_heads(projection), weight)

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit values; see `base.Fit`."""
        components, fit = int(options.components), options.fit
        covariance = moment(statistics, fit, "value")
        if fit == "aligned":
            if heads.head_norm is None:
                maps, _ = value_root(heads, fit)
                heads = change_value_basis(heads, maps)
            else:
                heads = fold_head_norm(heads)
            heads = change_value_basis(heads, align_rotations(value_cross(heads.value, covariance), components))
        return combine(heads.value, components, covariance), heads
