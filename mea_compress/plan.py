"""What will happen to every layer, in bytes and parameters; from headers alone."""

from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from mea_compress.architectures import Source, open_source
from mea_compress.architectures.source import composition_shape
from mea_compress.checkpoint.reader import DTYPE_BITS
from mea_compress.errors import RequestError
from mea_compress.recipe import Recipe, select_layers

SCALAR_NORM_KINDS = ("head", "prune", "share", "frequency")


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part of the plan.

    Attributes:
        layer: Its number.
        compressed: Whether anything happens to it.
        key_composition: How its keys are composed afterwards.
        value_composition: How its values are composed afterwards.
        key_components: Component heads of keys that are cached afterwards.
        value_components: Component heads of values that are cached afterwards.
        bytes_before: Cache bytes per token in the source.
        bytes_after: Cache bytes per token afterwards.
        parameters_before: Numbers in its attention's tensors in the source.
        parameters_after: Numbers in its attention's tensors afterwards.
    """

    layer: int
    compressed: bool
    key_composition: str
    value_composition: str
    key_components: int
    value_components: int
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int

    def to_json(self) -> dict[str, Any]:
        """The entry of ``layers`` in `plan --json`."""
        return {
            "layer": self.layer,
            "key_components": self.key_components,
            "value_components": self.value_components,
            "key_composition": self.key_composition,
            "value_composition": self.value_composition,
            "kv_bytes_per_token": {"before": self.bytes_before, "after": self.bytes_after},
        }


@dataclass(frozen=True)
class Plan:
    """All layers, and the model as a whole.

    Attributes:
        layers: In order.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        choice: Why these compositions, where the recipe left it open; empty where it named them.
    """

    layers: tuple[LayerPlan, ...]
    parameters_before: int
    parameters_after: int
    choice: str = ""

    @property
    def bytes_before(self) -> int:
        """Cache bytes per token of the source."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Cache bytes per token of what is emitted."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """`plan --json`."""
        return {
            "kv_bytes_per_token": {"before": self.bytes_before, "after": self.bytes_after},
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "layers": [layer.to_json() for layer in self.layers],
        }


def make_plan(directory: Path, recipe: Recipe) -> Plan:
    """The plan for a checkpoint directory; reads headers only.

    Raises:
        RequestError: The checkpoint is not usable or the recipe asks for what it cannot give.
    """
    return plan_source(open_source(directory), recipe)


def plan_source(source: Source, recipe: Recipe) -> Plan:
    """The plan for an opened checkpoint."""
    config = source.config
    heads, head_dim = config.num_key_value_heads, source.head_dim
    chosen = set(select_layers(recipe.layers, config.num_hidden_layers))
    keys, values, choice = choose_compositions(source, recipe)
    key_components = _components(recipe.key_components, "key", recipe.kv_ratio, heads)
    value_components = _components(recipe.value_components, "value", recipe.kv_ratio, heads)
    bias = config.mea["bias"]
    itemsize = DTYPE_BITS[_dtype(source, recipe)] // 8
    layers = []
    for layer, spec in enumerate(config.mea["layers"]):
        after = (keys, key_components, values, value_components)
        before = tuple(spec[f"{side}_{what}"] for side in ("key", "value") for what in ("composition", "components"))
        if layer not in chosen:
            after = before
        norm = config.mea["qk_norm"]
        layers.append(
            LayerPlan(
                layer,
                layer in chosen,
                key_composition=after[0],
                key_components=after[1],
                value_composition=after[2],
                value_components=after[3],
                bytes_before=_cached_bytes(before, heads, head_dim, itemsize, norm),
                bytes_after=_cached_bytes(after, heads, head_dim, itemsize, norm),
                parameters_before=_parameters(before, heads, head_dim, config.hidden_size, bias),
                parameters_after=_parameters(after, heads, head_dim, config.hidden_size, bias),
            )
        )
    total = sum(prod(info.shape) for info in source.reader.tensors.values())
    grown = sum(layer.parameters_after - layer.parameters_before for layer in layers)
    return Plan(tuple(layers), total, total + grown, choice)


def choose_compositions(source: Source, recipe: Recipe) -> tuple[str, str, str]:
    """Compositions of keys and values, and the reason where the recipe left them open."""
    keys, values, reason = recipe.key_composition, recipe.value_composition, ""
    if keys is None or values is None:
        keys, values = keys or "head", values or "head"
        reason = "head-level linear composition"
    return keys, values, reason


def _dtype(source: Source, recipe: Recipe) -> str:
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return names[recipe.dtype] if recipe.dtype else source.dtype


def _components(count: int | None, side: str, ratio: float | None, heads: int) -> int:
    if count is not None:
        if not 1 <= count <= heads:
            raise RequestError(
                f"--{side}-components {count} is impossible: the model has {heads} key/value heads, choose 1 to {heads}"
            )
        return count
    if ratio is None:
        raise RequestError(
            "say how much of the cache to keep: --kv-ratio 0.5, or --key-components and --value-components"
        )
    exact = Fraction(ratio).limit_denominator(10_000) * heads
    if exact.denominator != 1 or exact < 1:
        options = ", ".join(f"{c / heads:g}" for c in range(1, heads + 1))
        raise RequestError(
            f"--kv-ratio {ratio:g} is {float(exact):g} of {heads} key/value heads; choose one of {options}, "
            "or name counts with --key-components and --value-components"
        )
    return int(exact)


def _cached_bytes(spec: tuple[Any, ...], heads: int, head_dim: int, itemsize: int, qk_norm: bool) -> int:
    keys, key_components, _, value_components = spec
    scalars = heads if qk_norm and keys in SCALAR_NORM_KINDS else 0
    return itemsize * ((key_components + value_components) * head_dim + scalars)


def _parameters(spec: tuple[Any, ...], heads: int, head_dim: int, hidden: int, bias: dict[str, bool]) -> int:
    total = 0
    for side, kind, components in (("key", *spec[:2]), ("value", *spec[2:])):
        total += components * head_dim * (hidden + bias[side])
        shape = composition_shape(kind, components, heads, head_dim)
        total += prod(shape) if shape else 0
    return total
