"""Any composition, within separate groups of heads: block-diagonal over clusters of heads that are alike.

What is cached stays one vector, the groups' components one after another (lanes of `frequency` stay sorted by rotary
pair). Each group can then be a key/value head of its own in a stock checkpoint: narrower, and divisible among devices.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from mea_compress.compositions.pool import group_heads, head_distance, reorder
from mea_compress.compositions.request import Request
from mea_compress.heads.composed import Array, Composed
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads


def cluster(
    heads: AttentionHeads, statistics: LayerStatistics | None, fit: str, groups: int
) -> tuple[AttentionHeads, LayerStatistics | None]:
    """The layer with heads that lose least together next to each other, in groups of one size.

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
    fitter: Any, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request, groups: int
) -> tuple[Composed, AttentionHeads]:
    """One side of a layer, each group of adjacent heads composed on its own.

    Args:
        fitter: ``keys`` or ``values`` of a composition.
        heads: The layer, its heads in order of groups.
        statistics: Of its inputs.
        request: For all groups together; `groups` divides its components.
        groups: Number of groups; it divides H.
    """
    request = replace(request, components=request.components // groups)
    found = []
    for members in np.arange(heads.key.shape[0]).reshape(groups, -1):
        queries = (members[:, None] * heads.group + np.arange(heads.group)).reshape(-1)
        part = replace(
            heads,
            query=heads.query[queries],
            key=heads.key[members],
            value=heads.value[members],
            output=heads.output[queries],
        )
        own = None if statistics is None else statistics.of_heads(members)
        found.append(fitter(part, own, request))
    composed, parts = zip(*found, strict=True)
    sides = ("query", "key", "value", "output")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in sides}
    return join(composed), replace(parts[0], **joined)


def join(parts: tuple[Composed, ...]) -> Composed:
    """Compositions of separate heads as one block-diagonal composition."""
    first, heads = parts[0], sum(part.heads for part in parts)
    if first.kind == "frequency":
        return _join_lanes(parts, heads)
    projection = np.concatenate([part.projection for part in parts])
    weight = None if first.weight is None else _block_diagonal([part.weight for part in parts])
    return Composed(first.kind, heads, first.head_dim, projection, weight, groups=len(parts))


def _block_diagonal(blocks: list[Any]) -> Array:
    rows, columns = (sum(block.shape[i] for block in blocks) for i in (0, 1))
    whole = np.zeros((rows, columns))
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _join_lanes(parts: tuple[Composed, ...], heads: int) -> Composed:
    lanes = []  # (pair, rows of projection, weight over all heads)
    start = 0
    for part in parts:
        assert part.weight is not None and part.rotary_components is not None
        pairs = [p for p, count in enumerate(part.rotary_components) for _ in range(count)]
        for lane, pair in enumerate(pairs):
            weight = np.zeros((2, heads))
            weight[:, start : start + part.heads] = part.weight[:, lane]
            lanes.append((pair, part.projection[[lane, len(pairs) + lane]], weight))
        start += part.heads
    lanes.sort(key=lambda lane: lane[0])  # stable: within a pair, group after group
    rows = np.concatenate(np.stack([lane[1] for lane in lanes], 1))  # all real parts, then all imaginary parts
    counts = tuple(sum(column) for column in zip(*(part.rotary_components or () for part in parts), strict=True))
    return Composed(
        "frequency",
        heads,
        parts[0].head_dim,
        rows,
        np.stack([lane[2] for lane in lanes], 1),
        counts,
        parts[0].pairs,
        groups=len(parts),
    )
