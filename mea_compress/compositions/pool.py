"""Plain grouped-query attention with fewer key/value heads: heads of a group share one component.

With the ``weights`` fit adjacent heads are averaged, as in GQA's conversion (2305.13245). The other fits group the
heads that lose least, share the best component of each group, and let q_proj and o_proj take each head's own factor:
a complex number for every rotary pair, any matrix for values. The emitted layer needs no composition at all.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mea_compress.compositions.base import CompositionOptions, register
from mea_compress.compositions.head import combine
from mea_compress.compositions.latent import low_rank
from mea_compress.compositions.moments import key_cross, key_weights, moment, value_cross, value_root
from mea_compress.errors import RequestError
from mea_compress.heads.alignment import (
    align_rotations,
    change_value_basis,
    fold_head_norm,
    from_pairs,
    key_pairs,
    scale_query_pairs,
)
from mea_compress.heads.composed import Array, FactoredHeads, join_heads, split_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import POOLED, Form

_EXACT_HEADS = 12


def group_heads(distance: Array, groups: int) -> list[list[int]]:
    """Heads in groups of one size, so that the sum of distances within groups is small.

    The best there is for up to 12 heads; beyond that greedy, then improved by swaps until no swap helps.

    Args:
        distance: Loss of putting two heads together, (H, H), symmetric.
        groups: Number of groups; it divides H.
    """
    count = len(distance)
    size = count // groups
    if count <= _EXACT_HEADS:
        return _best_grouping(distance.tolist(), size)
    free, grouping = list(range(count)), []
    for _ in range(groups):
        first = max(free, key=lambda g: float(distance[g, free].sum()))  # the hardest to place chooses first
        members = [first]
        free.remove(first)
        while len(members) < size:
            best = min(free, key=lambda g: float(distance[g, members].sum()))
            members.append(best)
            free.remove(best)
        grouping.append(members)

    def loss(members: list[int]) -> float:
        return float(distance[members][:, members].sum())

    improved = True
    while improved:
        improved = False
        for a in range(groups):
            for b in range(a):
                for i in range(size):
                    for j in range(size):
                        left, right = list(grouping[a]), list(grouping[b])
                        left[i], right[j] = right[j], left[i]
                        if loss(left) + loss(right) < loss(grouping[a]) + loss(grouping[b]) - 1e-12:
                            grouping[a], grouping[b], improved = left, right, True
    return sorted(sorted(members) for members in grouping)


def _best_grouping(distance: list[list[float]], size: int) -> list[list[int]]:
    """Exhaustive search: the first free head is grouped with every choice of others."""

    @functools.cache
    def search(free: tuple[int, ...]) -> tuple[float, tuple[tuple[int, ...], ...]]:
        if not free:
            return 0.0, ()
        best: tuple[float, tuple[tuple[int, ...], ...]] = (math.inf, ())
        for others in itertools.combinations(free[1:], size - 1):
            members = (free[0], *others)
            rest = tuple(head for head in free if head not in members)
            loss = sum(distance[a][b] for a, b in itertools.permutations(members, 2))
            cost, grouping = search(rest)
            if loss + cost < best[0]:
                best = (loss + cost, (members, *grouping))
        return best

    return [list(members) for members in search(tuple(range(len(distance))))[1]]


def reorder(heads: AttentionHeads, order: list[int]) -> AttentionHeads:
    """The layer with its key/value heads, and the queries that see them, in another order."""
    queries = [head * heads.group + i for head in order for i in range(heads.group)]
    return replace(
        heads,
        query=heads.query[queries],
        key=heads.key[order],
        value=heads.value[order],
        output=heads.output[queries],
        order=tuple(order if heads.order is None else (heads.order[head] for head in order)),
    )


@register
@dataclass(frozen=True)
class Pool:
    """One component for each group of heads, for keys and values."""

    name: ClassVar[str] = "pool"
    form: ClassVar[Form] = POOLED
    needs_queries: ClassVar[bool] = False

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit keys, and queries to them; the heads come into the order of their groups."""
        components, fit = int(options.components), options.fit
        count, head_dim = heads.key.shape[:2]
        _check(count, components)
        if fit == "weights":
            return _averaged(heads.key, components), heads
        covariance = moment(statistics, fit, "key")
        grouping = group_heads(head_distance(heads, statistics, fit), components)
        order = [head for members in grouping for head in members]
        heads = reorder(heads, order)
        statistics = None if statistics is None else statistics.of_heads(order)
        weights = key_weights(heads, statistics, fit)
        if heads.key_norm is not None:
            return _normed_keys(heads, weights, covariance, components), heads
        cross = key_cross(heads, statistics, fit)  # (P, H, H)
        pairs = key_pairs(heads) * weights[..., None]
        rows, factors = [], np.ones((count, cross.shape[0]), cross.dtype)
        for members in np.arange(count).reshape(components, -1):
            leading = np.linalg.eigh(cross[:, members][:, :, members]).eigenvectors[..., -1]  # (P, group)
            average = math.sqrt(np.square(heads.key[members]).sum() / len(members))
            shared = np.einsum("pg,gpx->px", leading.conj(), pairs[members])  # (P, D + 1)
            size = math.sqrt(np.square(np.abs(shared)).sum())
            scale = average / size if size > 0 else 1.0
            rows.append(from_pairs(shared * scale, heads))
            factors[members] = (leading / scale).T / weights[members]
        # k ≈ factor · shared, so q conj(k) becomes (q conj(factor)) conj(shared).
        factored = FactoredHeads(self.form, count, head_dim, np.concatenate(rows))
        return factored, replace(heads, query=scale_query_pairs(heads, factors.conj()))

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit values of adjacent heads, and o_proj to them."""
        components, fit = int(options.components), options.fit
        count, head_dim = heads.value.shape[:2]
        _check(count, components)
        if fit == "weights":
            return _averaged(heads.value, components), heads
        covariance = moment(statistics, fit, "value")
        rows, maps = [], []
        if heads.head_norm is not None:
            heads = fold_head_norm(heads)
            rotations = []
            for members in np.arange(count).reshape(components, -1):
                rotation = align_rotations(value_cross(heads.value[members], covariance), 1)
                single = combine(rotation @ heads.value[members], 1, covariance)
                assert single.weight is not None
                rows.append(single.projection * single.weight.mean())  # the norm makes the size of a head free
                rotations.append(rotation)
            heads = change_value_basis(heads, np.concatenate(rotations))
            return FactoredHeads(self.form, count, head_dim, np.concatenate(rows)), heads
        square, inverse = value_root(heads, fit)
        for members in np.arange(count).reshape(components, -1):
            expansion, shared = low_rank(join_heads(square[members] @ heads.value[members]), covariance, head_dim)
            rows.append(shared)
            maps.append(inverse[members] @ split_heads(expansion, head_dim))
        # v ≈ map · shared, so W_O v becomes (W_O map) shared.
        output = heads.output @ np.concatenate(maps).repeat(heads.group, axis=0)
        return FactoredHeads(self.form, count, head_dim, np.concatenate(rows)), replace(heads, output=output)


def _check(count: int, components: int) -> None:
    if count % components:
        raise RequestError(
            f"pool makes groups of one size: {count} heads cannot share {components} components; "
            f"choose a count that divides {count}"
        )


def _averaged(heads: Array, components: int) -> FactoredHeads:
    mean = heads.reshape(components, -1, *heads.shape[1:]).mean(1)  # (C, d, D + 1)
    return FactoredHeads(POOLED, heads.shape[0], heads.shape[1], join_heads(mean))


def _normed_keys(heads: AttentionHeads, weights: Array, covariance: Array | None, components: int) -> FactoredHeads:
    """Under a key norm only the size of a head is free: heads of one size are averaged by their leading direction."""
    rows = []
    size = np.sqrt(np.square(weights).mean(1))
    for members in np.arange(len(heads.key)).reshape(components, -1):
        single = combine(heads.key[members] * size[members, None, None], 1, covariance)
        assert single.weight is not None
        rows.append(single.projection * single.weight.mean() / size[members].mean())
    return FactoredHeads(POOLED, heads.key.shape[0], heads.key.shape[1], np.concatenate(rows))


def head_distance(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """What two heads lose when they share one component, keys and values together, (H, H)."""
    return _key_distance(heads, statistics, fit) + _value_distance(heads, statistics, fit)


def _key_distance(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """Share of two heads' weighted energy that one shared key loses, (H, H)."""
    cross = key_cross(heads, statistics, fit)
    energy = cross.diagonal(axis1=-2, axis2=-1).real  # (P, H)
    first, other = energy[:, :, None], energy[:, None, :]
    gap = np.sqrt(np.square(first - other) / 4 + np.square(np.abs(cross)))
    if heads.key_norm is not None:  # no rotations: the real parts add up over pairs
        total, inner = energy.sum(0), cross.real.sum(0)
        lost = 1 - inner / np.sqrt(np.maximum(total[:, None] * total[None], 1e-300))
    else:
        smaller = (first + other) / 2 - gap  # the smaller eigenvalue of each 2 × 2 Gram
        lost = smaller.sum(0) / max(energy.sum(), 1e-300)
    np.fill_diagonal(lost, 0)
    return lost


def _value_distance(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """Share of two heads' weighted energy that one shared value of d channels loses, (H, H)."""
    covariance = moment(statistics, fit, "value")
    square, _ = value_root(heads, fit)
    cross = value_cross(square @ heads.value, covariance)  # (H, H, d, d)
    count, head_dim = heads.value.shape[:2]
    lost = np.zeros((count, count))
    total = max(np.einsum("ggaa->", cross), 1e-300)
    for g in range(count):
        for h in range(g):
            both = np.block([[cross[g, g], cross[g, h]], [cross[h, g], cross[h, h]]])
            lost[g, h] = lost[h, g] = np.maximum(np.linalg.eigvalsh(both)[:head_dim], 0).sum() / total
    return lost
