"""Complex composition of keys, a matrix for every rotary pair: it commutes with RoPE exactly.

For each pair p, K[g, p] = sum over its components of a complex number times the component. The best components are the
top eigenvectors of the complex H × H Gram of the pair. How many a pair gets may vary; their sum is the budget.
"""

import heapq
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from mea_compress.compositions.base import CompositionOptions, register
from mea_compress.compositions.moments import fix_phases, key_cross, key_weights, moment, pair_cross
from mea_compress.errors import RequestError
from mea_compress.heads.alignment import key_pairs
from mea_compress.heads.composed import Array, FactoredHeads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import COMPLEX, Form, uniform_components


def allocate_components(energies: Array, total: int) -> tuple[int, ...]:
    """Allocate the budget greedily: keep the `total` largest eigenvalues over all rotary pairs.

    Args:
        energies: Eigenvalues of each pair's Gram, descending, (P, H).
        total: Sum of components.

    Returns:
        The components of each pair, P counts between 0 and H.
    """
    pairs, heads = energies.shape
    counts = [0] * pairs
    queue = [(-float(energies[p, 0]), p) for p in range(pairs)]
    heapq.heapify(queue)
    for _ in range(total):
        _, p = heapq.heappop(queue)
        counts[p] += 1
        if counts[p] < heads:
            heapq.heappush(queue, (-float(energies[p, counts[p]]), p))
    return tuple(counts)


@register
@dataclass(frozen=True)
class Frequency:
    """Complex combinations of complex components; keys only.

    Attributes:
        allocation: How complex components are allocated to rotary pairs: by a layer's own ``energy``, ``uniform``, or
            ``shared``: as the energies of all layers together say.
    """

    name: ClassVar[str] = "frequency"
    form: ClassVar[Form] = COMPLEX
    needs_queries: ClassVar[bool] = False
    allocation: Literal["energy", "uniform", "shared"] = field(
        default="energy", metadata={"setting": "rotary_allocation"}
    )

    @property
    def allocates_alike(self) -> bool:
        """Whether every layer allocates in the same way."""
        return self.allocation != "energy"

    @property
    def shares_allocation(self) -> bool:
        """Whether that way comes from all layers together."""
        return self.allocation == "shared"

    def energies(self, heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
        """Return what each component of each rotary pair is worth, descending, (P, H), as shares of the layer's sum."""
        values, _ = self._spectrum(heads, statistics, fit, *self._weighted(heads, statistics, fit))
        return values.clip(0) / max(values.clip(0).sum(), 1e-300)

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit keys; queries stay as they are. Under a key norm the weighted keys are fitted."""
        budget = options.width(heads.key.shape[1]) // 2
        weighted, weights = self._weighted(heads, statistics, options.fit)
        values, vectors = self._spectrum(heads, statistics, options.fit, weighted, weights)
        scaled = weighted * weights[..., None]  # (H, P, D + 1)
        count, pairs = heads.key.shape[0], len(heads.pairs[0])
        counts = options.rotary_components or allocate_components(values, budget)
        if self.allocation == "uniform":
            counts = tuple(uniform_components(budget, pairs))
        components, combinations = [], []
        for p, number in enumerate(counts):
            if not number:
                continue
            basis = fix_phases(vectors[p, :, :number])  # (H, C_p)
            projected = basis.conj().T @ scaled[:, p]  # (C_p, D + 1)
            average = math.sqrt(max(np.square(np.abs(weighted[:, p])).sum(1).mean(), 1e-300))
            size = np.maximum(np.sqrt(np.square(np.abs(projected)).sum(1)), 1e-12 * average) / average  # (C_p,)
            components.append(projected / size[:, None])
            combinations.append((basis * size / weights[:, p, None]).T)  # (C_p, H)
        rows, weight = np.concatenate(components), np.concatenate(combinations)
        factored = FactoredHeads(
            COMPLEX,
            count,
            heads.key.shape[1],
            np.concatenate((rows.real, rows.imag)),
            np.stack((weight.real, weight.imag)),
            counts,
            (tuple(heads.pairs[0]), tuple(heads.pairs[1])),
        )
        return factored, heads

    def _weighted(self, heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> tuple[Array, Array]:
        """Return keys as complex pairs, (H, P, D + 1), under a key norm times its weight; and how much each counts."""
        if heads.key_norm is None:
            weighted = key_pairs(heads)
        else:
            first, other = heads.pairs
            gamma = heads.key_norm
            if not gamma.all():
                raise RequestError(
                    "frequency keys have the weight of the key norm in them, which takes a channel out where it is 0; "
                    "choose `key_composition` head"
                )
            weighted = heads.key[:, first] * gamma[first, None] + 1j * heads.key[:, other] * gamma[other, None]
        return weighted, key_weights(heads, statistics, fit)

    def _spectrum(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, fit: str, weighted: Array, weights: Array
    ) -> tuple[Array, Array]:
        """Return eigenvalues (P, H), descending, and eigenvectors (P, H, H) of each pair's Gram."""
        if fit == "aligned" and statistics is not None:
            cross = key_cross(heads, statistics, fit)
        else:
            cross = pair_cross(weighted * weights[..., None], moment(statistics, fit, "key"))
        values, vectors = np.linalg.eigh(cross)
        return values[..., ::-1], vectors[..., ::-1]
