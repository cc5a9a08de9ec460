"""A layer's attention as heads: projections read in float64, compositions already multiplied out."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from mea_compress.architectures import Source
from mea_compress.architectures.source import projection_info
from mea_compress.checkpoint import TensorInfo, array_dtype, read_array
from mea_compress.checkpoint.dtypes import TORCH_NAMES
from mea_compress.composed import Array, Composed, join_heads, split_heads
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import rotary_pairs


@dataclass(frozen=True)
class AttentionHeads:
    """One layer's attention. All arrays are float64; a bias is the last column of the weight (zeros without one).

    Attributes:
        query: (Hq, d, D + 1).
        key: (H, d, D + 1), before the key norm.
        value: (H, d, D + 1).
        output: (Hq, D, d).
        output_bias: (D,) or None.
        query_norm: (d,) or None.
        key_norm: (d,) or None.
        head_norm: (d,) or None: weight of the RMSNorm on each query head's output.
        rotary_dim: Channels of a head that RoPE turns.
        norm_eps: Epsilon of the norms.
    """

    query: Array
    key: Array
    value: Array
    output: Array
    output_bias: Array | None
    query_norm: Array | None
    key_norm: Array | None
    head_norm: Array | None
    rotary_dim: int
    norm_eps: float

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[0] // self.key.shape[0]

    @property
    def pairs(self) -> tuple[list[int], list[int]]:
        """The two channels of every rotary pair."""
        return rotary_pairs(self.query.shape[1], self.rotary_dim)


def read_composed(source: Source, layer: int, side: str) -> Composed:
    """Keys or values of a layer as the checkpoint holds them: components and composition.

    Args:
        source: The checkpoint.
        layer: Number of the layer.
        side: ``key`` or ``value``.

    Raises:
        RequestError: A weight is not finite.
    """
    spec = source.config.mea["layers"][layer]
    kind = spec[f"{side}_composition"]
    projection = read_projection(source, layer, side)
    name = f"{source.family.attention(layer)}{side}_composition.weight"
    weight = _read(source, name) if source.reader.has(name) else None
    first, second = rotary_pairs(source.head_dim, source.rotary_dim)
    return Composed(
        kind,
        source.config.num_key_value_heads,
        source.head_dim,
        projection,
        weight,
        tuple(spec["rotary_components"]) if kind == "frequency" else None,
        (tuple(first), tuple(second)) if kind == "frequency" else None,
        _latent(source, layer) if kind == "joint" else None,
        groups=spec.get("groups", 1),
    )


def _latent(source: Source, layer: int) -> Array:
    return np.concatenate([read_projection(source, layer, side) for side in ("key", "value")])


def read_side(source: Source, layer: int, side: str) -> Array:
    """The key or value heads that the queries see, (H, d, D + 1): a native MEA layer is multiplied out.

    Frequency keys under a key norm compose weighted keys; the weight is divided out.
    """
    composed = read_composed(source, layer, side)
    heads = composed.composed_heads()
    if side == "key" and composed.kind == "frequency" and source.config.mea["qk_norm"]:
        heads = heads / _read(source, f"{source.family.attention(layer)}k_norm.weight")[:, None]
    return heads


def read_heads(source: Source, layer: int, whole: bool = True) -> AttentionHeads:
    """A layer's attention.

    Args:
        source: The checkpoint.
        layer: Number of the layer.
        whole: Read everything; otherwise `query` and `output` have their shapes, and zeros that take no memory.

    Raises:
        RequestError: A weight is not finite.
    """
    prefix = source.family.attention(layer)

    def norm(name: str) -> Array | None:
        return _read(source, f"{prefix}{name}.weight") if source.reader.has(f"{prefix}{name}.weight") else None

    count, head_dim, hidden = source.config.num_attention_heads, source.head_dim, source.config.hidden_size
    if whole:
        query = split_heads(read_projection(source, layer, "query"), head_dim)
        output = _read(source, f"{prefix}o_proj.weight").reshape(hidden, -1, head_dim).swapaxes(0, 1).copy()
    else:
        query = np.broadcast_to(0.0, (count, head_dim, hidden + 1))
        output = np.broadcast_to(0.0, (count, hidden, head_dim))
    bias = f"{prefix}o_proj.bias"
    return AttentionHeads(
        query=query,
        key=read_side(source, layer, "key"),
        value=read_side(source, layer, "value"),
        output=output,
        output_bias=_read(source, bias) if source.reader.has(bias) else None,
        query_norm=norm("q_norm"),
        key_norm=norm("k_norm"),
        head_norm=norm("head_norm"),
        rotary_dim=source.rotary_dim,
        norm_eps=source.config.rms_norm_eps,
    )


def read_projection(source: Source, layer: int, side: str) -> Array:
    """q_proj, k_proj or v_proj with its bias as last column, (rows, D + 1); cut out where the checkpoint fuses them."""
    info = projection_info(source, layer, side)
    bias = f"{source.family.attention(layer)}{side[0]}_proj.bias"
    projection = np.empty((info.shape[0], info.shape[1] + 1))
    projection[:, :-1] = read_array(info)
    projection[:, -1] = _read(source, bias) if source.reader.has(bias) else 0.0
    return _finite(projection, info)


def _read(source: Source, name: str) -> Array:
    info = source.reader.info(name)
    return _finite(read_array(info).astype(np.float64), info)


def _finite(array: Array, info: TensorInfo) -> Array:
    """The array, unless it holds NaN or infinite numbers; its extremes tell."""
    if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise RequestError(
            f"{info.file}: tensor {info.name} holds NaN or infinite numbers; use an undamaged checkpoint"
        )
    return array


@dataclass(frozen=True)
class ComposedLayer:
    """A layer after surgery: composed keys and values, and what else of its attention changed.

    Attributes:
        key: Components and composition of the keys.
        value: Components and composition of the values.
        query: (Hq, d, D + 1), or None where q_proj stays as it is.
        output: (Hq, D, d), or None where o_proj stays as it is.
        head_norm: (d,), or None where the head norm stays as it is.
    """

    key: Composed
    value: Composed
    query: Array | None = None
    output: Array | None = None
    head_norm: Array | None = None


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
    """Rounds a composed layer to what will be stored.

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
    """Numbers of a composed layer in the dtype that they will be stored in (as safetensors calls it).

    Raises:
        RequestError: It cannot hold them.
    """
    with np.errstate(over="ignore"):
        found = array.astype(array_dtype(dtype), order="C")
    if not np.isfinite(found).all():
        remedy = (
            "choose --dtype bfloat16" if dtype == "F16" else "give other --text, or leave the layer out with --layers"
        )
        raise RequestError(f"{name} of a composed layer has numbers that {TORCH_NAMES[dtype]} cannot hold; {remedy}")
    return found


def layer_tensors(layer: ComposedLayer, bias: dict[str, bool]) -> dict[str, Array]:
    """The tensors that a composed layer is stored as, by their names below ``self_attn.``, float64."""
    tensors: dict[str, Array] = {}

    def put(name: str, rows: Array, has_bias: bool) -> None:
        tensors[f"{name}.weight"] = rows[:, :-1]
        if has_bias:
            tensors[f"{name}.bias"] = rows[:, -1]

    if layer.query is not None:
        put("q_proj", join_heads(layer.query), bias["query"])
    put("k_proj", layer.key.projection, bias["key"])
    put("v_proj", layer.value.projection, bias["value"])
    if layer.output is not None:
        tensors["o_proj.weight"] = layer.output.swapaxes(0, 1).reshape(layer.output.shape[1], -1)
    if layer.head_norm is not None:
        tensors["head_norm.weight"] = layer.head_norm
    for side, composed in (("key", layer.key), ("value", layer.value)):
        if composed.weight is not None:
            tensors[f"{side}_composition.weight"] = composed.weight
    return tensors


def layer_section(layer: ComposedLayer) -> dict[str, Any]:
    """The layer's entry in the ``mea`` section of config.json."""
    section: dict[str, Any] = {}
    for side, composed in (("key", layer.key), ("value", layer.value)):
        section[f"{side}_composition"] = composed.kind
        section[f"{side}_components"] = composed.components
    if layer.key.rotary_components is not None:
        section["rotary_components"] = list(layer.key.rotary_components)
    groups = [side.groups for side in (layer.key, layer.value) if side.kind not in ("none", "pool")]
    if gcd(*groups) > 1:
        section["groups"] = gcd(*groups)
    return section
