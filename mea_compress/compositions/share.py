"""Head sharing: some heads stay bit-identical and every other head uses one of them (DirectShare, 2402.11819).

With the ``weights`` fit a pruned head simply takes the kept head that is most like it. The other fits first turn it
towards that head, and q_proj and o_proj take the turn back. The composition is a matrix of zeros and ones.
"""

import torch

from mea_compress.alignment import change_key_basis, change_value_basis, fold_head_norm
from mea_compress.calibration import LayerStatistics
from mea_compress.composed import Composed
from mea_compress.compositions.measure import key_cross, key_weights, moment, through, value_cross
from mea_compress.compositions.request import Request
from mea_compress.heads import AttentionHeads


def choose_shared(likeness: torch.Tensor, components: int) -> tuple[list[int], list[int]]:
    """Kept heads, added one at a time so that the total likeness grows most, and for every head its place among them.

    Args:
        likeness: What is gained when head g uses head h, (H, H); the diagonal is the most that can be gained.
        components: How many to keep.
    """
    kept: list[int] = []
    for _ in range(components):
        others = [h for h in range(len(likeness)) if h not in kept]
        kept.append(max(others, key=lambda h: float(likeness[:, [*kept, h]].max(1).values.sum())))
    kept.sort()
    place = likeness[:, kept].argmax(1).tolist()
    for index, head in enumerate(kept):
        place[head] = index
    return kept, place


class Share:
    """Kept heads that others use too, for keys and values."""

    name = "share"

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Shared keys and the layer whose queries fit them."""
        components, fit = int(request.components), request.fit
        cross = key_cross(heads, statistics, fit)
        energy = cross.diagonal(dim1=-2, dim2=-1).real.clamp(min=1e-300)  # (P, H)
        if fit == "aligned" and heads.key_norm is None:
            likeness = (cross.abs().square() / energy[:, None, :]).sum(0)
            kept, place = choose_shared(likeness, components)
            weights = key_weights(heads, statistics, fit).T
            plain = cross / (weights[:, :, None] * weights[:, None, :])
            factors = torch.ones(cross.shape[1], cross.shape[0], dtype=cross.dtype)
            for head, index in enumerate(place):
                if head not in kept:
                    target = kept[index]  # k[head] ≈ ratio · k[target]: dividing by the ratio makes them equal
                    ratio = plain[:, head, target] / plain[:, target, target].real.clamp(min=1e-300)
                    factors[head] = torch.where(ratio.abs() > 1e-6, 1 / ratio, torch.full_like(ratio, 1e6))
            heads = change_key_basis(heads, factors)
        else:
            gram = cross.real.sum(0)
            kept, place = choose_shared(_overlap(gram), components)
        return self._composed(heads.key, kept, place), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Shared values and the layer whose o_proj fits them."""
        components, fit = int(request.components), request.fit
        second = moment(statistics, fit, "value")
        if fit != "aligned":
            gram = torch.einsum("gdx,hdx->gh", through(heads.value, second), heads.value)
            kept, place = choose_shared(_overlap(gram), components)
            return self._composed(heads.value, kept, place), heads
        heads = fold_head_norm(heads)
        cross = value_cross(heads.value, second)
        trace = cross.diagonal(dim1=-2, dim2=-1).sum(-1)
        likeness = torch.linalg.matrix_norm(cross, "nuc") / trace.diagonal().clamp(min=1e-300).sqrt()
        kept, place = choose_shared(likeness, components)
        maps = torch.eye(cross.shape[-1], dtype=cross.dtype).repeat(len(place), 1, 1)
        for head, index in enumerate(place):
            if head not in kept:
                left, _, right = torch.linalg.svd(cross[head, kept[index]])
                size = (trace[kept[index], kept[index]] / trace[head, head].clamp(min=1e-300)).sqrt()
                maps[head] = (right.mT @ left.mT) * (size if heads.head_norm is None and size > 0 else 1.0)
        heads = change_value_basis(heads, maps)
        return self._composed(heads.value, kept, place), heads

    def _composed(self, side: torch.Tensor, kept: list[int], place: list[int]) -> Composed:
        weight = torch.zeros(len(kept), len(side), dtype=torch.float64)
        weight[place, torch.arange(len(side))] = 1.0
        return Composed(self.name, side.shape[0], side.shape[1], side[kept].flatten(0, 1), weight)


def _overlap(gram: torch.Tensor) -> torch.Tensor:
    """Minus the squared distance between head g and head h, shifted so that it is positive."""
    energy = gram.diagonal()
    distance = energy[:, None] + energy[None] - 2 * gram
    return distance.max() - distance
