"""Head-level linear composition: every head is a real combination of fewer component heads (arXiv 2601.19611).

With the ``weights`` fit this is the paper's initialisation, the SVD of the (d·D) × H matrix that has a head in each
column. ``activations`` takes the Gram of what the heads send. ``aligned`` first turns heads within the freedom that
attention leaves, so that they become alike, and lets q_proj and o_proj take the turns back.
"""

import torch

from mea_compress.alignment import (
    align_phases,
    align_rotations,
    change_key_basis,
    change_value_basis,
    fold_head_norm,
)
from mea_compress.calibration import LayerStatistics
from mea_compress.composed import Composed
from mea_compress.compositions.measure import key_cross, key_weights, moment, through, value_cross, value_root
from mea_compress.compositions.request import Request
from mea_compress.heads import AttentionHeads


def combine(
    heads: torch.Tensor, components: int, second: torch.Tensor | None, gram: torch.Tensor | None = None
) -> Composed:
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
    rows = heads.flatten(1)  # (H, d · (D + 1))
    plain = rows @ rows.T
    if gram is None:
        gram = plain if second is None else through(heads, second).flatten(1) @ rows.T
    vectors = torch.linalg.eigh(gram).eigenvectors  # ascending
    top = vectors.flip(-1)[:, :components]  # (H, C)
    # Signs are free; fixing them makes the bytes the same wherever the eigenvectors are.
    top = top * torch.sign(top.gather(0, top.abs().argmax(0, keepdim=True)))
    sizes = ((plain @ top) * top).sum(0).clamp(min=0).sqrt()  # of the components, (C,)
    average = (plain.trace() / count).sqrt()
    average = torch.where(average > 0, average, torch.ones_like(average))  # heads that are all zero stay so
    # Products of inner products lose half of the digits, so what is smaller counts as nothing.
    scale = average / sizes.clamp(min=1e-7 * average)
    projection = ((top * scale).T @ rows).unflatten(1, (head_dim, -1))  # (C, d, D + 1)
    return Composed("head", count, head_dim, projection.flatten(0, 1), (top / scale).T.contiguous())


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
        self, heads: AttentionHeads, second: torch.Tensor | None, weights: torch.Tensor, components: int, fit: str
    ) -> Composed:
        """QK-norm leaves no turns, but weights on channels and on whole heads, which the norm makes free."""
        if fit != "aligned":
            return combine(heads.key, components, second)
        assert heads.key_norm is not None
        size = weights.square().mean(1).sqrt()  # (H,)
        shape = (weights / size[:, None]).square().mean(0).sqrt()  # (P,)
        channels = heads.key_norm.abs().clone()
        for channel in heads.pairs:
            channels[channel] *= shape
        channels = channels.clamp(min=1e-6 * float(channels.max()))
        scale = size[:, None, None] * channels[None, :, None]
        composed = combine(heads.key * scale, components, second)
        projection = composed.projection.unflatten(0, (components, -1)) / channels[None, :, None]
        assert composed.weight is not None
        weight = composed.weight / size  # (C, H)
        return Composed("head", composed.heads, composed.head_dim, projection.flatten(0, 1), weight)

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
