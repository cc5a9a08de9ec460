"""Any method, within separate groups of heads: block-diagonal over clusters of heads that are alike.

What is cached stays one vector, the groups' components one after another (complex components stay sorted by rotary
pair). Each group can then be a key/value head of its own in a stock checkpoint: narrower, and divisible among devices.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from mea_compress.compositions.base import CompositionOptions, Fit
from mea_compress.compositions.pool import group_heads, head_distance, reorder
from mea_compress.errors import RequestError
from mea_compress.heads.composed import Array, FactoredHeads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads


def cluster(
    heads: AttentionHeads, statistics: LayerStatistics | None, fit: str, groups: int
) -> tuple[AttentionHeads, LayerStatistics | None]:
    """Return the layer with heads that lose least together next to each other, in groups of one size.

    Args:
        heads: The layer.
        statistics: Of its inputs.
        fit: What distances between heads look at.
        groups: Number of groups; it divides H.
    """
    order = [head for members in group_heads(head_distance(heads, statistics, fit), groups) for head in members]
    if statistics is not None:
        statistics = statistics.of_heads(order)
    return reorder(heads, order), statistics


def compose_groups(
    fitter: Fit, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions, groups: int
) -> tuple[FactoredHeads, AttentionHeads]:
    """Fit one side of a layer, each group of adjacent heads on its own.

    Args:
        fitter: ``keys`` or ``values`` of a method.
        heads: The layer, its heads in order of groups.
        statistics: Of its inputs.
        options: For all groups together; `groups` divides its components.
        groups: Number of groups; it divides H.
    """
    options = replace(options, components=options.components // groups)
    fitted = [fitter(part, seen, options) for part, seen in divided(heads, statistics, groups)]
    factored, parts = zip(*fitted, strict=True)
    sides = ("query", "key", "value", "output")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in sides}
    orders = [part.order for part in parts if part.order is not None]
    return join(factored), replace(parts[0], order=tuple(chain.from_iterable(orders)) or None, **joined)


def divided(
    heads: AttentionHeads, statistics: LayerStatistics | None, groups: int
) -> Iterator[tuple[AttentionHeads, LayerStatistics | None]]:
    """Yield each group of adjacent heads as a layer of its own.

    Args:
        heads: The layer, its heads in order of groups.
        statistics: Of its inputs.
        groups: Number of groups; it divides H.
    """
    for members in np.arange(heads.key.shape[0]).reshape(groups, -1):
        queries = (members[:, None] * heads.group + np.arange(heads.group)).reshape(-1)
        part = replace(
            heads,
            query=heads.query[queries],
            key=heads.key[members],
            value=heads.value[members],
            output=heads.output[queries],
            order=None if heads.order is None else tuple(heads.order[head] for head in members),
        )
        yield part, None if statistics is None else statistics.of_heads(members)


def join(parts: tuple[FactoredHeads, ...]) -> FactoredHeads:
    """Join the factors of separate heads into one block-diagonal composition.

    Raises:
        RequestError: The weight of the form is no matrix.
    """
    first, heads = parts[0], sum(part.heads for part in parts)
    if first.form.per_pair:
        return _join_pairs(parts, heads)
    if first.weight is not None and first.weight.ndim != 2:
        raise RequestError(f"the form {first.form.name} cannot be divided into groups; leave `kv_groups` out")
    projection = np.concatenate([part.projection for part in parts])
    weight = None if first.weight is None else _block_diagonal([part.weight for part in parts])
    return FactoredHeads(first.form, heads, first.head_dim, projection, weight, groups=len(parts))


def _block_diagonal(blocks: list[Any]) -> Array:
    rows, columns = (sum(block.shape[i] for block in blocks) for i in (0, 1))
    whole = np.zeros((rows, columns))
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _join_pairs(parts: tuple[FactoredHeads, ...], heads: int) -> FactoredHeads:
    components = []  # (pair, rows of projection, weight over all heads)
    start = 0
    for part in parts:
        assert part.weight is not None and part.rotary_components is not None
        pairs = [p for p, count in enumerate(part.rotary_components) for _ in range(count)]
        for index, pair in enumerate(pairs):
            weight = np.zeros((2, heads))
            weight[:, start : start + part.heads] = part.weight[:, index]
            components.append((pair, part.projection[[index, len(pairs) + index]], weight))
        start += part.heads
    components.sort(key=lambda component: component[0])  # stable: within a pair, group after group
    # All real parts, then all imaginary parts.
    rows = np.concatenate(np.stack([component[1] for component in components], 1))
    counts = tuple(sum(column) for column in zip(*(part.rotary_components or () for part in parts), strict=True))
    return FactoredHeads(
        parts[0].form,
        heads,
        parts[0].head_dim,
        rows,
        np.stack([component[2] for component in components], 1),
        counts,
        parts[0].pairs,
        groups=len(parts),
    )
