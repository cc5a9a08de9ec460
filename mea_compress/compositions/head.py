"""Head-level linear composition: every head is a real combination of fewer component heads (arXiv 2601.19611).

With the ``weights`` fit this is the paper's initialisation, the SVD of the (d·D) × H matrix that has a head in each
column. ``activations`` takes the Gram of what the heads send. ``aligned`` first turns heads within the freedom that
attention leaves, so that they become alike, and lets q_proj and o_proj take the turns back.
"""

import math

import numpy as np

from mea_compress.compositions.moments import (
    head_gram,
    key_cross,
    key_weights,
    largest_entries,
    moment,
    value_cross,
    value_root,
)
from mea_compress.compositions.request import Request
from mea_compress.heads.alignment import (
    align_phases,
    align_rotations,
    change_key_basis,
    change_value_basis,
    fold_head_norm,
)
from mea_compress.heads.composed import Array, Composed, join_heads, split_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads


def combine(heads: Array, components: int, second: Array | None, gram: Array | None = None) -> Composed:
    """The best `components` component heads for real combinations.

    Components are scaled to the size of an average head, so that they survive float16.

    Args:
        heads: (H, d, D + 1), float64.
        components: C, between 1 and H.
        second: E[x xᵀ], (D + 1, D + 1), or None for the identity.
        gram: Inner products of the heads, (H, H), in place of those that `second` gives.

    Returns:
        Components (C·d, D + 1) and a composition (C, H): the top eigenvectors of
        G[g, h] = tr(W_g Σ W_hᵀ), or of `gram`.
    """
    count, head_dim = heads.shape[:2]
    rows = heads.reshape(count, -1)  # (H, d · (D + 1))
    plain = rows @ rows.T
    if gram is None:
        gram = plain if second is None else head_gram(heads, second)
    vectors = np.linalg.eigh(gram).eigenvectors  # ascending
    top = vectors[:, ::-1][:, :components]  # (H, C)
    # Signs are free; fixing them makes the bytes the same wherever the eigenvectors are.
    top = top * np.sign(largest_entries(top))
    sizes = np.sqrt(np.maximum(((plain @ top) * top).sum(0), 0))  # of the components, (C,)
    average = math.sqrt(plain.trace() / count) or 1.0  # heads that are all zero stay so
    # Products of inner products lose half of the digits, so what is smaller counts as nothing.
    scale = average / np.maximum(sizes, 1e-7 * average)
    projection = ((top * scale).T @ rows).reshape(components * head_dim, -1)
    return Composed("head", count, head_dim, projection, (top / scale).T.copy())


class Head:
    """Real combinations of component heads, for keys and values."""

    name = "head"

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed keys and the layer whose queries fit them; see `compositions`."""
        components, fit = int(request.components), request.fit
        second = moment(statistics, fit, "key")
        weights = key_weights(heads, statistics, fit)
        if heads.key_norm is not None:
            return self._normed_keys(heads, second, weights, components, fit), heads
        if fit == "aligned":
            cross = key_cross(heads, statistics, fit)
            phases = align_phases(cross, components)  # (H, P)
            heads = change_key_basis(heads, phases * weights)
            aligned = cross * phases.T[:, :, None] * phases.T[:, None, :].conj()
            return combine(heads.key, components, None, aligned.real.sum(0)), heads
        return combine(heads.key, components, second), heads

    def _normed_keys(
        self, heads: AttentionHeads, second: Array | None, weights: Array, components: int, fit: str
    ) -> Composed:
        """QK-norm leaves no turns, but weights on channels and on whole heads, which the norm makes free."""
        if fit != "aligned":
            return combine(heads.key, components, second)
        assert heads.key_norm is not None
        size = np.sqrt(np.square(weights).mean(1))  # (H,)
        shape = np.sqrt(np.square(weights / size[:, None]).mean(0))  # (P,)
        channels = np.abs(heads.key_norm)
        for channel in heads.pairs:
            channels[channel] *= shape
        channels = np.maximum(channels, 1e-6 * channels.max())
        scale = size[:, None, None] * channels[None, :, None]
        composed = combine(heads.key * scale, components, second)
        projection = split_heads(composed.projection, composed.head_dim) / channels[:, None]
        assert composed.weight is not None
        weight = composed.weight / size  # (C, H)
        return Composed("head", composed.heads, composed.head_dim, join_heads(projection), weight)

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed values and the layer whose o_proj fits them; see `compositions`."""
        components, fit = int(request.components), request.fit
        second = moment(statistics, fit, "value")
        if fit == "aligned":
            if heads.head_norm is None:
                maps, _ = value_root(heads, fit)
                heads = change_value_basis(heads, maps)
            else:
                heads = fold_head_norm(heads)
            heads = change_value_basis(heads, align_rotations(value_cross(heads.value, second), components))
        return combine(heads.value, components, second), heads
