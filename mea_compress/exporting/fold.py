"""Compositions folded into q_proj and o_proj, exactly, in NumPy.

With E the map from components to reconstructed heads, query head i of group g becomes q̃_i = s · E_gᵀ q_i and its
columns of o_proj W̃_i = W_i E_g. s keeps the softmax scale: √(new head_dim / old head_dim), times the square of the
factor that the source's RoPE puts on cos and sin. Rows of k_proj are put in the order of RoPE's halves; values stay as
they are. See `mea_compress.exporting.form` for what can be exported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mea_compress.architectures import Checkpoint
from mea_compress.errors import RequestError
from mea_compress.exporting.form import StockForm, rotary
from mea_compress.heads.composed import Array, FactoredHeads, join_heads, split_heads
from mea_compress.layers.read import read_composed, read_projection
from mea_compress.modeling.section_mea import rotary_pairs, side_form


@dataclass(frozen=True)
class HeadBasis:
    """A change of basis inside the exported heads of a layer, which its queries and o_proj take back.

    Attributes:
        key: A, (heads, width, width), float64, invertible and such that it commutes with RoPE; queries become A⁻ᵀ q.
        value: B, likewise, any invertible matrices; columns of o_proj become W B⁻¹.
    """

    key: Array
    value: Array

    def queries(self, rows: Array) -> Array:
        """Return the rows of q_proj (Hq · width, D + 1) for keys in this basis."""
        heads = split_heads(rows, self.key.shape[-1])
        inverse = np.linalg.inv(self.key).mT
        return join_heads(inverse.repeat(len(heads) // len(self.key), axis=0) @ heads)

    def keys(self, rows: Array) -> Array:
        """Return the rows of k_proj (heads · width, D + 1) in this basis."""
        return join_heads(self.key @ split_heads(rows, self.key.shape[-1]))

    def values(self, rows: Array) -> Array:
        """Return the rows of v_proj (heads · width, D + 1) in this basis."""
        return join_heads(self.value @ split_heads(rows, self.value.shape[-1]))

    def output(self, weight: Array) -> Array:
        """Return o_proj (D, Hq · width) for values in this basis."""
        width = self.value.shape[-1]
        heads = weight.reshape(len(weight), -1, width).swapaxes(0, 1)  # (Hq, D, width)
        inverse = np.linalg.inv(self.value)
        mapped = heads @ inverse.repeat(len(heads) // len(inverse), axis=0)
        return mapped.swapaxes(0, 1).reshape(weight.shape)


def folded(source: Checkpoint, form: StockForm, layer: int, basis: HeadBasis | None = None) -> dict[str, Array]:
    """Return what folding makes of a layer's projections, by name, float64; those that stay as they are, are not in it.

    Args:
        source: The compressed checkpoint.
        form: Of the export.
        layer: Its index.
        basis: Of the exported heads; None leaves it as it is.
    """
    prefix = source.family.attention(layer)
    tensors: dict[str, Array] = {}
    for name, produce in changed_projections(source, form, layer, basis).items():
        rows = produce()
        if name == "o_proj":
            tensors["o_proj.weight"] = rows
            continue
        tensors[f"{name}.weight"] = rows[:, :-1]
        if source.reader.has(f"{prefix}{name}.bias"):
            tensors[f"{name}.bias"] = rows[:, -1]
    return tensors


def changed_projections(
    source: Checkpoint, form: StockForm, layer: int, basis: HeadBasis | None = None
) -> dict[str, Callable[[], Array]]:
    """Return what makes the projections of a layer that are others in the export, by name.

    Those of q_proj, k_proj and v_proj are made with the bias as last column, (rows, D + 1), o_proj without, float64.

    Args:
        source: The compressed checkpoint.
        form: Of the export.
        layer: Its index.
        basis: Of the exported heads; None leaves it as it is.
    """
    spec = source.config.mea["layers"][layer]
    changed: dict[str, Callable[[], Array]] = {}
    if folds_keys(spec, form):
        changed["q_proj"] = lambda: absorbed_queries(source, form, layer)
        changed["k_proj"] = lambda: ordered_keys(source, form, layer)
    if folds_values(spec, form, source.head_dim):
        changed["o_proj"] = lambda: absorbed_output(source, form, layer)
    if basis is None:
        return changed
    before = {**unchanged_projections(source, layer), **changed}
    return {
        "q_proj": lambda: basis.queries(before["q_proj"]()),
        "k_proj": lambda: basis.keys(before["k_proj"]()),
        "v_proj": lambda: basis.values(before["v_proj"]()),
        "o_proj": lambda: basis.output(before["o_proj"]()),
    }


def unchanged_projections(source: Checkpoint, layer: int) -> dict[str, Callable[[], Array]]:
    """Return what reads the projections as the compressed checkpoint has them; as `changed_projections`."""
    return {
        "q_proj": lambda: read_projection(source, layer, "query"),
        "k_proj": lambda: read_projection(source, layer, "key"),
        "v_proj": lambda: read_projection(source, layer, "value"),
        "o_proj": lambda: _output(source, layer),
    }


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
    weight = _output(source, layer)
    weight = weight.reshape(len(weight), len(blocks), -1, source.head_dim)  # (D, H, group, d)
    return (weight @ blocks).reshape(len(weight), -1)


def _output(source: Checkpoint, layer: int) -> Array:
    return source.reader.read_array(f"{source.family.attention(layer)}o_proj.weight").astype(np.float64)


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
