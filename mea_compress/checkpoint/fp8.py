"""Checkpoints whose matrices are stored in fp8 with scales beside them, read as the numbers that they stand for.

A matrix W of shape (N, K) in 8 bits comes with scales S of shape (n, k), one for each block of rows and columns; what
it stands for is W * S, each scale over its block. Two layouts are published widely: ``weight_scale_inv`` of
transformers' ``quant_method: fp8`` (DeepSeek's layout), and ``weight_scale`` of compressed-tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from mea_compress.checkpoint.dtypes import DTYPE_NAMES, array_dtype
from mea_compress.checkpoint.reader import CheckpointReader, read_array
from mea_compress.checkpoint.tensors import TensorInfo
from mea_compress.checkpoint.untrusted import DOWNLOAD_AGAIN, printable_name, printable_path
from mea_compress.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SCALES = ("weight_scale_inv", "weight_scale")
# Of inputs, which are quantised when a layer is run: what it computes with instead is not theirs to say.
_BESIDE = ("input_scale", "activation_scale")
_COMPRESSED_TENSORS = "compressed-tensors"
_SKIPPED = {"fp8": "modules_to_not_convert", _COMPRESSED_TENSORS: "ignore"}
DEFAULT_DTYPE = "BF16"


@dataclass(frozen=True)
class Fp8Layout:
    """How the weights of a checkpoint are stored in fp8.

    Attributes:
        method: ``quant_method`` of its ``quantization_config``.
        block: Rows and columns of a block, or None where the shape of the scales says it (a scale a row, or one).
        dtype: Safetensors name of the dtype that its weights are read as.
    """

    method: str
    block: tuple[int, int] | None
    dtype: str


def fp8_layout(config: Mapping[str, Any]) -> Fp8Layout | None:
    """Return how a config.json says that weights are stored, None where it is not in fp8 with scales.

    Args:
        config: The parsed file.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = DTYPE_NAMES.get(str(name).removeprefix("torch."), DEFAULT_DTYPE)
    blocks: list[object] = []
    if method == "fp8" and not settings.get("modules_to_convert") and settings.get("expert_dtype", "fp8") == "fp8":
        blocks = [settings.get("weight_block_size", (128, 128))]
    elif method == _COMPRESSED_TENSORS and settings.get("format") == "float-quantized":
        groups = settings.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, dict) else []
        weights: list[Any] = [scheme.get("weights") if isinstance(scheme, dict) else None for scheme in schemes]
        # Scales of a cache would be of heads that are not cached any more.
        if not settings.get("kv_cache_scheme") and not settings.get("sparsity_config"):
            blocks = [scheme.get("block_structure") if _is_fp8(scheme) else () for scheme in weights]
    if not blocks or not all(_is_block(block) and block == blocks[0] for block in blocks):
        return None
    block: Any = blocks[0]
    return Fp8Layout(str(method), None if block is None else (block[0], block[1]), dtype)


def _is_fp8(scheme: Any) -> bool:
    if not isinstance(scheme, dict):
        return False
    symmetric = scheme.get("symmetric", True) is True
    known = scheme.get("strategy") in ("tensor", "channel", "block")
    return scheme.get("type") == "float" and scheme.get("num_bits") == 8 and symmetric and known


def _is_block(sizes: Any) -> bool:
    """Return whether this is rows and columns of a block, or None, with which the shape of the scales says it."""
    if not isinstance(sizes, list | tuple):
        return sizes is None
    return len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)


class Fp8Reader(CheckpointReader):
    """A checkpoint with fp8 weights: reading one gives the numbers it stands for, copying it what is stored.

    Args:
        directory: The checkpoint.
        layout: How its weights are stored.

    Raises:
        RequestError: As `CheckpointReader`, or a matrix in 8 bits has no scales, or scales of another shape.
    """

    def __init__(self, directory: str | os.PathLike[str], layout: Fp8Layout) -> None:
        super().__init__(directory)
        self.layout = layout
        self.scales: dict[str, TensorInfo] = {}
        for name in self.tensors:
            stem, _, own = name.rpartition(".")
            if own in _SCALES and self.has(f"{stem}.weight"):
                self.scales[f"{stem}.weight"] = self.tensors[name]
        for name, info in self.tensors.items():
            if info.dtype == "F8_E4M3" and name.endswith(".weight"):
                self._check(info)

    def _check(self, info: TensorInfo) -> None:
        scale = self.scales.get(info.name)
        if scale is None:
            problem = "is in 8 bits and has no scales beside it"
        elif len(info.shape) != 2 or not self._fits(info.shape, scale.shape):
            problem = f"of shape {list(info.shape)} has scales of shape {list(scale.shape)}"
        else:
            return
        raise RequestError(
            f"{printable_path(info.file)}: tensor {printable_name(info.name)} {problem}; {DOWNLOAD_AGAIN}"
        )

    def _fits(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> bool:
        if prod(scales) == 1 or scales == (shape[0], 1):
            return True
        return self.layout.block is not None and scales == tuple(
            -(-size // block) for size, block in zip(shape, self.layout.block, strict=True)
        )

    @property
    def model_names(self) -> list[str]:
        """Names of the tensors that the model itself has, without scales."""
        return [name for name in self.tensors if not self.is_scale(name)]

    def is_scale(self, name: str) -> bool:
        """Return whether a tensor only scales another, or what that is multiplied with."""
        stem, _, own = name.rpartition(".")
        return f"{stem}.weight" in self.scales and own in (*_SCALES, *_BESIDE)

    def dtype_of(self, name: str) -> str:
        """Return the safetensors name of the dtype that a tensor is read as."""
        return self.layout.dtype if name in self.scales else super().dtype_of(name)

    def read_part(self, info: TensorInfo) -> NDArray[Any]:
        """Return a tensor, or some of its rows, as the numbers it stands for.

        Raises:
            RequestError: As `read_array`.
        """
        import numpy as np

        scale = self.scales.get(info.name)
        array = read_array(info)
        if scale is None:
            return array
        whole = self.tensors[info.name]
        start = (info.offset - whole.offset) * whole.shape[0] // whole.nbytes
        factors = read_array(scale)
        # An exponent a byte where it says U8, as MXFP8 stores them.
        factors = np.exp2(factors.astype(np.float32) - 127) if scale.dtype == "U8" else factors.astype(np.float32)
        if factors.size == 1:
            factors = factors.reshape(1, 1)
        elif scale.shape == (whole.shape[0], 1):
            factors = factors[start : start + info.shape[0]]
        else:
            assert self.layout.block is not None
            rows, columns = self.layout.block
            factors = factors.repeat(rows, 0)[start : start + info.shape[0]].repeat(columns, 1)[:, : info.shape[1]]
        return (array.astype(np.float32) * factors).astype(array_dtype(self.layout.dtype))


def keep_in_full(config: dict[str, Any], reader: CheckpointReader, blocks: list[str]) -> dict[str, Any]:
    """Return a ``quantization_config`` in which modules are not quantised any more.

    Args:
        config: config.json of the source.
        reader: The source.
        blocks: Modules whose weights are stored in full, with all that is in them.
    """
    settings = dict(config["quantization_config"])
    key = _SKIPPED[settings["quant_method"]]
    skipped = settings.get(key, settings.get("ignored_layers") if key == "modules_to_not_convert" else None)
    if skipped is None:  # then transformers looks for the head itself, which it does not where anything is listed
        matrices = [info for info in reader.tensors.values() if len(info.shape) == 2 and info.dtype != "F8_E4M3"]
        skipped = [info.name.removesuffix(".weight") for info in matrices if info.name.endswith(".weight")]
    if key == "ignore":
        blocks = [f"re:{block.replace('.', '[.]')}[.].*" for block in blocks]
    settings[key] = [*skipped, *(block for block in blocks if block not in skipped)]
    return settings


__all__ = ["Fp8Layout", "Fp8Reader", "fp8_layout", "keep_in_full"]
