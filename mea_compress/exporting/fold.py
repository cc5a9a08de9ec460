"""Compositions folded into q_proj and o_proj, exactly, in NumPy.

With E the map from components to reconstructed heads, query head i of group g becomes q̃_i = s · E_gᵀ q_i and its
columns of o_proj W̃_i = W_i E_g. s keeps the softmax scale: √(new head_dim / old head_dim), times the square of the
factor that the source's RoPE puts on cos and sin. Rows of k_proj are put in the order of RoPE's halves; values stay as
they are. See `mea_compress.exporting.form` for what can be exported.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mea_compress.architectures import Checkpoint
from mea_compress.errors import RequestError
from mea_compress.exporting.form import StockForm, rotary
from mea_compress.heads.composed import Array, FactoredHeads, join_heads, split_heads
from mea_compress.layers.read import read_composed, read_projection
from mea_compress.modeling.section_mea import rotary_pairs, side_form


def folded(source: Checkpoint, form: StockForm, layer: int) -> dict[str, Array]:
    """Return what folding makes of a layer's projections, by name, float64; those that stay as they are, are not in it.

    Args:
        source: The compressed checkpoint.
        form: Of the export.
        layer: Its index.
    """
    spec = source.config.mea["layers"][layer]
    prefix = source.family.attention(layer)
    tensors: dict[str, Array] = {}

    def add(name: str, rows: Array) -> None:
        tensors[f"{name}.weight"] = rows[:, :-1]
        if source.reader.has(f"{prefix}{name}.bias"):
            tensors[f"{name}.bias"] = rows[:, -1]

    if folds_keys(spec, form):
        add("q_proj", absorbed_queries(source, form, layer))
        add("k_proj", ordered_keys(source, form, layer))
    if folds_values(spec, form, source.head_dim):
        tensors["o_proj.weight"] = absorbed_output(source, form, layer)
    return tensors


def folds_keys(spec: Mapping[str, Any], form: StockForm) -> bool:
    """Return whether q_proj and k_proj of a layer change."""
    return not side_form(spec, "key").plain or not form.keeps_rope


def folds_values(spec: Mapping[str, Any], form: StockForm, head_dim: int) -> bool:
    """Return whether o_proj of a layer changes."""
    return not side_form(spec, "value").plain or form.head_dim != head_dim


def absorbed_queries(source: Checkpoint, form: StockForm, layer: int) -> Array:
    """Return q_proj with the key composition in it: (Hq · head_dim of the form, D + 1), float64."""
    composed = read_composed(source, layer, "key")
    blocks = _blocks(composed, form, _key_rows(composed, form, source.rotary_dim))  # (H, d, width)
    scale = 1.0
    if not form.keeps_rope:
        _, factor = rotary(source)
        scale = factor**2 * math.sqrt(form.head_dim / source.head_dim)
    query = read_projection(source, layer, "query")
    query = query.reshape(len(blocks), -1, source.head_dim, query.shape[1])  # (H, group, d, D + 1)
    return scale * (blocks.mT[:, None] @ query).reshape(-1, query.shape[-1])


def ordered_keys(source: Checkpoint, form: StockForm, layer: int) -> Array:
    """Return k_proj with its rows in the order of the form: (groups · head_dim of the form, D + 1), float64."""
    composed = read_composed(source, layer, "key")
    return composed.projection[_key_rows(composed, form, source.rotary_dim)]


def absorbed_output(source: Checkpoint, form: StockForm, layer: int) -> Array:
    """Return o_proj with the value composition in it: (D, Hq · head_dim of the form), float64."""
    blocks = _blocks(read_composed(source, layer, "value"), form)
    weight = source.reader.read_array(f"{source.family.attention(layer)}o_proj.weight").astype(np.float64)
    weight = weight.reshape(len(weight), len(blocks), -1, source.head_dim)  # (D, H, group, d)
    return (weight @ blocks).reshape(len(weight), -1)


def _blocks(composed: FactoredHeads, form: StockForm, order: list[int] | None = None) -> Array:
    """Return the map to every head from the components of its group, put in an order: (H, d, head_dim of the form).

    Raises:
        RequestError: A head reads components of another group.
    """
    expansion = composed.expansion()  # (H · d, groups · width)
    if order is not None:
        expansion = expansion[:, order]
    groups, channels = form.groups, len(expansion) // form.groups
    blocks = expansion.reshape(groups, channels, groups, -1).swapaxes(1, 2)  # (groups, groups, H / groups · d, width)
    diagonal = np.eye(groups, dtype=bool)
    if blocks[~diagonal].any():
        raise RequestError(
            "heads are composed across the groups that config.json says; set groups to 1 in its mea section, or "
            "compress again with --kv-groups and --rotary-allocation uniform"
        )
    return split_heads(join_heads(blocks[diagonal]), composed.head_dim)


class _ComplexComponent(NamedTuple):
    """Where a complex component of keys lies, sorted as in an exported head."""

    group: int
    pair: int
    first_row: int
    second_row: int


def _complex_components(composed: FactoredHeads, groups: int, rotary_dim: int) -> list[_ComplexComponent]:
    """Return the complex components of keys; a component that is a head has one for each rotary pair."""
    if composed.form.per_pair:
        counts = composed.rotary_components
        assert counts is not None
        places = [(pair, i * groups // count) for pair, count in enumerate(counts) for i in range(count)]
        return [_ComplexComponent(group, pair, row, len(places) + row) for row, (pair, group) in enumerate(places)]
    first, second = rotary_pairs(composed.head_dim, rotary_dim)
    heads = len(composed.projection) // composed.head_dim
    return [
        _ComplexComponent(head * groups // heads, pair, start + first[pair], start + second[pair])
        for head, start in enumerate(range(0, len(composed.projection), composed.head_dim))
        for pair in range(len(first))
    ]


def _key_rows(composed: FactoredHeads, form: StockForm, rotary_dim: int) -> list[int]:
    """Return the rows of k_proj in the form's order: for each group, first channels of its pairs, then second ones."""
    ordered = sorted(_complex_components(composed, form.groups, rotary_dim))
    rows = []
    for group in range(form.groups):
        members = [component for component in ordered if component.group == group]
        rows += [component.first_row for component in members] + [component.second_row for component in members]
    return rows
