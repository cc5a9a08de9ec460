"""Read a layer of a checkpoint as heads: projections in float64, compositions already multiplied out."""

import numpy as np

from mea_compress.architectures import Source
from mea_compress.architectures.checkpoint import projection_info
from mea_compress.checkpoint import TensorInfo, read_array
from mea_compress.errors import RequestError
from mea_compress.heads.composed import Array, Composed, split_heads
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import rotary_pairs


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
