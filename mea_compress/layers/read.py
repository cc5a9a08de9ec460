"""Read a layer of a checkpoint as heads: projections in float64, compositions multiplied out."""

from dataclasses import replace

import numpy as np

from mea_compress.architectures import Checkpoint
from mea_compress.architectures.checkpoint import FLOATS, projection_info
from mea_compress.checkpoint import TensorInfo, read_array
from mea_compress.errors import RequestError
from mea_compress.heads.composed import Array, FactoredHeads, split_heads
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import cached_width, rotary_pairs, side_form


def read_composed(source: Checkpoint, layer: int, side: str) -> FactoredHeads:
    """Return keys or values of a layer as the checkpoint holds them: components and composition.

    Args:
        source: The checkpoint.
        layer: Number of the layer.
        side: ``key`` or ``value``.

    Raises:
        RequestError: A weight is not finite.
    """
    spec = source.config.mea["layers"][layer]
    form = side_form(spec, side)
    projection = read_projection(source, layer, side)
    name = f"{source.family.attention(layer)}{side}_composition.weight"
    weight = _read(source, name) if source.reader.has(name) else None
    first, second = rotary_pairs(source.head_dim, source.rotary_dim)
    return FactoredHeads(
        form,
        source.config.num_key_value_heads,
        source.head_dim,
        projection,
        weight,
        tuple(spec["rotary_components"]) if form.per_pair else None,
        (tuple(first), tuple(second)) if form.per_pair else None,
        _latent(source, layer) if form.joint else None,
        groups=spec.get("groups", 1),
        composition=spec[f"{side}_composition"],
    )


def read_coded(source: Checkpoint, layer: int, side: str) -> FactoredHeads:
    """Return keys or values of a layer that is composed at its cache: encoder and decoder, whose inputs are the heads.

    Raises:
        RequestError: A weight is not finite.
    """
    spec, geometry = source.config.mea["layers"][layer], source.geometry(layer)
    assert geometry is not None
    form, heads, dim = side_form(spec, side), geometry.heads, geometry.dim(side)
    width = cached_width(spec[f"{side}_components"], dim)
    first, second = geometry.pairs
    factored = FactoredHeads(
        form,
        heads,
        dim,
        np.eye(width, heads * dim + 1),  # of a side that is cached as it is
        rotary_components=tuple(spec["rotary_components"]) if form.per_pair else None,
        pairs=(tuple(first), tuple(second)) if form.per_pair else None,
        composition=spec[f"{side}_composition"],
    )
    if form.encoder_shape is None:
        return factored
    name = source.stored_name(f"{source.attention(layer)}{side}_composition.")
    factored = replace(factored, weight=_read(source, f"{name}weight"))
    return factored.with_encoder(_read(source, f"{name}encoder"))


def _latent(source: Checkpoint, layer: int) -> Array:
    return np.concatenate([read_projection(source, layer, side) for side in ("key", "value")])


def read_side(source: Checkpoint, layer: int, side: str) -> Array:
    """Return the key or value heads that the queries see, (H, d, D + 1): a native MEA layer is multiplied out.

    Where a form rebuilds keys that the key norm's weight has multiplied, the weight is divided out.
    """
    factored = read_composed(source, layer, side)
    heads = factored.reconstruct()
    if side == "key" and factored.form.weighted_keys and source.config.mea["qk_norm"]:
        heads = heads / _read(source, f"{source.family.attention(layer)}k_norm.weight")[:, None]
    return heads


def read_heads(source: Checkpoint, layer: int, with_queries: bool = True) -> AttentionHeads:
    """Return a layer's attention.

    Args:
        source: The checkpoint.
        layer: Number of the layer.
        with_queries: Read q_proj and o_proj too; otherwise they are broadcast zeros of the right shape.

    Raises:
        RequestError: A weight is not finite.
    """
    prefix = source.family.attention(layer)

    def norm(name: str) -> Array | None:
        return _read(source, f"{prefix}{name}.weight") if source.reader.has(f"{prefix}{name}.weight") else None

    count, head_dim, hidden = source.config.num_attention_heads, source.head_dim, source.config.hidden_size
    if with_queries:
        query = split_heads(read_projection(source, layer, "query"), head_dim)
        output = _read(source, f"{prefix}o_proj.weight").reshape(hidden, -1, head_dim).swapaxes(0, 1).copy()
    else:
        query = np.broadcast_to(0.0, (count, head_dim, hidden + 1))
        output = np.broadcast_to(0.0, (count, hidden, head_dim))
    return AttentionHeads(
        query=query,
        key=read_side(source, layer, "key"),
        value=read_side(source, layer, "value"),
        output=output,
        key_norm=norm("k_norm"),
        head_norm=norm("head_norm"),
        rotary_dim=source.rotary_dim,
        norm_eps=source.config.rms_norm_eps,
    )


def read_projection(source: Checkpoint, layer: int, side: str) -> Array:
    """Return q_proj, k_proj or v_proj with its bias as last column, (rows, D + 1), cut out where they are fused."""
    info = projection_info(source, layer, side)
    bias = f"{source.family.attention(layer)}{side[0]}_proj.bias"
    projection = np.empty((info.shape[0], info.shape[1] + 1))
    projection[:, :-1] = source.reader.read_part(info)
    projection[:, -1] = _read(source, bias) if source.reader.has(bias) else 0.0
    return _finite(projection, info)


def check_finite(source: Checkpoint) -> None:
    """Check that every number of a checkpoint is one, a tensor at a time.

    Raises:
        RequestError: One is NaN or infinite; the message names its tensor.
    """
    for info in source.reader.tensors.values():
        if info.dtype in FLOATS:
            _finite(read_array(info).astype(np.float32), info)


def _read(source: Checkpoint, name: str) -> Array:
    info = source.reader.info(name)
    return _finite(source.reader.read_part(info).astype(np.float64), info)


def _finite(array: Array, info: TensorInfo) -> Array:
    """Return the array, or raise if it has NaN or Inf (seen from its minimum and maximum)."""
    if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise RequestError(
            f"{info.file}: tensor {info.name} holds NaN or infinite numbers; use an undamaged checkpoint"
        )
    return array
