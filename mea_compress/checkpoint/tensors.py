"""Where one tensor of a checkpoint lies."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; ``dataclasses.replace(info, name=...)`` is the same bytes under another name.

    Attributes:
        name: Name in the checkpoint.
        dtype: Safetensors name of the dtype, e.g. ``"BF16"``.
        shape: Sizes of the dimensions.
        file: File that holds it.
        offset: Absolute position of its first byte in the file.
        nbytes: Length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
