"""Any composition, within separate groups of heads: block-diagonal over clusters of heads that are alike.

What is cached stays one vector, the groups' components one after another (lanes of `frequency` stay sorted by rotary
pair). Each group can then be a key/value head of its own in a stock checkpoint: narrower, and divisible among devices.
"""

from dataclasses import replace
from typing import Any

import torch

from mea_compress.calibration import LayerStatistics
from mea_compress.composed import Composed
from mea_compress.compositions.pool import group_heads, head_distance, reorder
from mea_compress.compositions.request import Request
from mea_compress.heads import AttentionHeads
from mea_compress.modeling.attention_mea import LatentComposition, MeaAttention


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
    for members in torch.arange(heads.key.shape[0]).chunk(groups):
        queries = (members[:, None] * heads.group + torch.arange(heads.group)).flatten()
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
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("query", "key", "value", "output")}
    return join(composed), replace(parts[0], **joined)


def join(parts: tuple[Composed, ...]) -> Composed:
    """Compositions of separate heads as one block-diagonal composition."""
    first, heads = parts[0], sum(part.heads for part in parts)
    if first.kind == "frequency":
        return _join_lanes(parts, heads)
    projection = torch.cat([part.projection for part in parts])
    weight = None if first.weight is None else torch.block_diag(*(part.weight for part in parts))
    return Composed(first.kind, heads, first.head_dim, projection, weight, groups=len(parts))


def _join_lanes(parts: tuple[Composed, ...], heads: int) -> Composed:
    lanes = []  # (pair, rows of projection, weight over all heads)
    start = 0
    for part in parts:
        assert part.weight is not None and part.rotary_components is not None
        pairs = [p for p, count in enumerate(part.rotary_components) for _ in range(count)]
        for lane, pair in enumerate(pairs):
            weight = part.weight.new_zeros(2, heads)
            weight[:, start : start + part.heads] = part.weight[:, lane]
            lanes.append((pair, part.projection[[lane, len(pairs) + lane]], weight))
        start += part.heads
    lanes.sort(key=lambda lane: lane[0])  # stable: within a pair, group after group
    rows = torch.stack([lane[1] for lane in lanes], 1).flatten(0, 1)  # all real parts, then all imaginary parts
    counts = tuple(sum(column) for column in zip(*(part.rotary_components or () for part in parts), strict=True))
    return Composed(
        "frequency",
        heads,
        parts[0].head_dim,
        rows,
        torch.stack([lane[2] for lane in lanes], 1),
        counts,
        parts[0].pairs,
        groups=len(parts),
    )


def hold_groups(model: torch.nn.Module) -> None:
    """Keeps what lies between groups at zero while a model or an attention module is trained."""
    for module in model.modules():
        if not isinstance(module, MeaAttention):
            continue
        attention: Any = module
        groups = attention.config.mea["layers"][attention.layer_idx].get("groups", 1)
        for composition in (attention.key_composition, attention.value_composition):
            if groups > 1 and composition is not None and composition.weight.requires_grad:
                within = _within_groups(composition, groups)
                composition.weight.register_hook(lambda gradient, within=within: gradient * within)


def _within_groups(composition: Any, groups: int) -> torch.Tensor:
    """Where a composition's weight connects a component with the heads of its group, in the weight's shape."""
    used = composition.weight.detach() != 0
    if isinstance(composition, LatentComposition):  # (H * d, m)
        blocks = used.unflatten(0, (groups, -1)).any(1)
        return blocks.repeat_interleave(len(used) // groups, dim=0)
    blocks = used.unflatten(-1, (groups, -1)).any(-1)  # heads come last
    if blocks.dim() == 3:  # real and imaginary parts
        blocks = blocks.any(0)
    return blocks.repeat_interleave(used.shape[-1] // groups, dim=-1).expand_as(used)
