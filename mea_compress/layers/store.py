"""A composed layer as a checkpoint holds it: tensors in their dtype and its entry in the ``mea`` section."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from mea_compress.checkpoint import array_dtype
from mea_compress.checkpoint.dtypes import TORCH_NAMES
from mea_compress.errors import RequestError
from mea_compress.heads.composed import Array, join_heads
from mea_compress.heads.types import ComposedLayer
from mea_compress.modeling.section_mea import side_section


@dataclass(frozen=True)
class StoredLayer:
    """A composed layer as a checkpoint holds it.

    Attributes:
        section: Its entry in the ``mea`` section of config.json.
        tensors: By their names below ``self_attn.``, in the dtype of the checkpoint.
    """

    section: dict[str, Any]
    tensors: dict[str, Array]


def store_layer(layer: ComposedLayer, bias: dict[str, bool], dtype: str) -> StoredLayer:
    """Round a composed layer to what will be stored.

    Args:
        layer: The layer, float64.
        bias: Which projections have a bias.
        dtype: Of the checkpoint, as safetensors calls it.

    Raises:
        RequestError: The dtype has no numbers as large as these.
    """
    tensors = {name: rounded(array, dtype, name) for name, array in layer_tensors(layer, bias).items()}
    return StoredLayer(layer_section(layer), tensors)


def rounded(array: Array, dtype: str, name: str) -> Array:
    """Return numbers of a composed layer in the dtype that they will be stored in (as safetensors calls it).

    Raises:
        RequestError: It cannot hold them.
    """
    with np.errstate(over="ignore"):
        cast = array.astype(array_dtype(dtype), order="C")
    if not np.isfinite(cast).all():
        remedy = (
            "choose `dtype` bfloat16" if dtype == "F16" else "give other `text`, or leave the layer out with `layers`"
        )
        raise RequestError(f"{name} of a composed layer has numbers that {TORCH_NAMES[dtype]} cannot hold; {remedy}")
    return cast


def layer_tensors(layer: ComposedLayer, bias: dict[str, bool]) -> dict[str, Array]:
    """Return the tensors that a composed layer is stored as, by their names below ``self_attn.``, float64."""
    tensors: dict[str, Array] = {}

    def put(name: str, rows: Array, has_bias: bool) -> None:
        tensors[f"{name}.weight"] = rows[:, :-1]
        if has_bias:
            tensors[f"{name}.bias"] = rows[:, -1]

    if layer.block is None:
        put("k_proj", layer.key.projection, bias["key"])
        put("v_proj", layer.value.projection, bias["value"])
    if layer.query is not None:
        put("q_proj", join_heads(layer.query), bias["query"])
    if layer.output is not None:
        tensors["o_proj.weight"] = layer.output.swapaxes(0, 1).reshape(layer.output.shape[1], -1)
    if layer.head_norm is not None:
        tensors["head_norm.weight"] = layer.head_norm
    tensors.update(layer.refitted)
    for side, factored in (("key", layer.key), ("value", layer.value)):
        if factored.weight is not None:
            tensors[f"{side}_composition.weight"] = factored.weight
        if factored.form.encoder_shape is not None:
            tensors[f"{side}_composition.encoder"] = factored.encoder()
    return tensors


def layer_section(layer: ComposedLayer) -> dict[str, Any]:
    """Return the layer's entry in the ``mea`` section of config.json."""
    section: dict[str, Any] = dict(layer.block or {})
    for side, factored in (("key", layer.key), ("value", layer.value)):
        name = factored.composition or factored.form.name
        section |= side_section(side, name, factored.components, factored.form)
    if layer.key.rotary_components is not None:
        section["rotary_components"] = list(layer.key.rotary_components)
    groups = [side.groups for side in (layer.key, layer.value) if not side.form.plain]
    if gcd(*groups) > 1:
        section["groups"] = gcd(*groups)
    return section
