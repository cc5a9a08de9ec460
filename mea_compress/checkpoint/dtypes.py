"""Dtypes of safetensors, in NumPy (with ml_dtypes) and in PyTorch.

Headers need neither, and importing them takes time: each is loaded where it is used.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element of each safetensors dtype."""

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
"""What PyTorch, NumPy and ml_dtypes call each safetensors dtype that can be computed with."""
DTYPE_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
"""What safetensors calls each of them."""


@cache
def array_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a safetensors dtype name.

    Raises:
        KeyError: Nobody computes with that dtype, such as `F4`.
    """
    import ml_dtypes
    import numpy as np

    numpy_name = TORCH_NAMES[name]
    return np.dtype(getattr(ml_dtypes, numpy_name, numpy_name))


@cache
def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name.

    Raises:
        KeyError: This torch cannot compute with that dtype, such as `F4`.
    """
    import torch

    dtype = getattr(torch, TORCH_NAMES[name], None)
    if not isinstance(dtype, torch.dtype):  # a float8 newer than this torch
        raise KeyError(name)
    return dtype


def dtype_name(dtype: torch.dtype | np.dtype[Any]) -> str:
    """Return the safetensors name of a torch or NumPy dtype.

    Raises:
        KeyError: Safetensors has no such dtype.
    """
    return DTYPE_NAMES[str(dtype).removeprefix("torch.")]


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor on any device as an array of its dtype; memory of a CPU tensor is shared where it can be."""
    import torch

    contiguous = tensor.detach().cpu().contiguous()
    if contiguous.dtype != torch.bfloat16 and contiguous.element_size() > 1:
        return contiguous.numpy()
    raw = contiguous.reshape(-1).view(torch.uint8).numpy()
    return raw.view(array_dtype(dtype_name(contiguous.dtype))).reshape(contiguous.shape)


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return an array as a CPU tensor of its dtype; memory is shared where it can be.

    Raises:
        KeyError: PyTorch has no such dtype.
    """
    import numpy as np
    import torch

    dtype = torch_dtype(dtype_name(array.dtype))
    contiguous = np.require(array, requirements=("C", "W"))
    return torch.from_numpy(contiguous.reshape(-1).view(np.uint8)).view(dtype).reshape(array.shape)
