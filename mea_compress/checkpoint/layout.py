"""What lies where in the files of a checkpoint: tensors, shards, headers and the index.

The format: 8 bytes little-endian length N, N bytes of JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`,
then the data, which the offsets (relative to the end of the header) cover without gap or overlap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.checkpoint.system import PAGE_BYTES
from mea_compress.checkpoint.tensors import TensorInfo
from mea_compress.checkpoint.untrusted import HEADER_LIMIT, printable_name
from mea_compress.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in one shard, as transformers saves them."""
DEFAULT_METADATA: Mapping[str, str] = {"format": "pt"}
"""The `__metadata__` that transformers asks for."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is produced lazily, when it is written.

    Attributes:
        name: Name in the checkpoint.
        dtype: Safetensors name of the dtype, one to compute with, e.g. ``"BF16"``.
        shape: Sizes of the dimensions.
        produce: Called once for each time the tensor is written; returns it with this dtype and shape (`as_array`
            makes one of a torch tensor).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


Entry: TypeAlias = TensorInfo | NewTensor
"""A tensor to write: a `TensorInfo` is copied as bytes under its name, a `NewTensor` is produced."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write.

    Attributes:
        name: File name.
        header: The first bytes of the file: length, JSON and padding.
        entries: What it holds, in the order in which it was asked for.
        positions: Absolute byte position of each entry in the file.
        nbytes: Size of the whole file in bytes.
    """

    name: str
    header: bytes
    entries: tuple[Entry, ...]
    positions: tuple[int, ...]
    nbytes: int


def plan_shards(
    entries: Sequence[Entry], shard_bytes: int = DEFAULT_SHARD_BYTES, metadata: Mapping[str, str] = DEFAULT_METADATA
) -> list[Shard]:
    """Divide tensors among files, in order, as the files that they are copied from do, and further by `shard_bytes`.

    What is copied lies as in its source within a page of the system (see `lay_out`), so that pages are copied whole,
    or, on file systems that can (XFS, Btrfs), shared instead of copied. A tensor larger than `shard_bytes` has a file
    to itself.

    Args:
        entries: The tensors of the checkpoint.
        shard_bytes: Largest sum of tensor bytes in one file.
        metadata: The `__metadata__` of every header.

    Returns:
        The files, named `model.safetensors` if there is one and else `model-00001-of-0000N.safetensors`.

    Raises:
        RequestError: There is nothing to write, two tensors have one name, or `shard_bytes` is unusable.
    """
    if shard_bytes < 1:
        raise RequestError(f"the shard size must be at least 1 byte, not {shard_bytes}; give a larger one")
    if not entries:
        raise RequestError("there are no tensors to write; check that the source has weights")
    names: set[str] = {"__metadata__"}
    groups: list[list[Entry]] = [[]]
    filled = 0
    source = None
    for entry in entries:
        if entry.name in names:
            raise RequestError(
                f"two tensors would be written as {printable_name(entry.name)}; "
                "remove or rename one of them in the source"
            )
        names.add(entry.name)
        another = isinstance(entry, TensorInfo) and source not in (None, entry.file)
        if groups[-1] and (another or filled + entry.nbytes > shard_bytes):
            groups.append([])
            filled = 0
        if isinstance(entry, TensorInfo):
            source = entry.file
        groups[-1].append(entry)
        filled += entry.nbytes
    if len(groups) > 99_999:
        raise RequestError(f"a shard size of {shard_bytes} bytes would make {len(groups)} files; give a larger one")
    if len(groups) == 1:
        return [lay_out(SINGLE_NAME, groups[0], metadata)]
    return [
        lay_out(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for number, group in enumerate(groups, 1)
    ]


def lay_out(name: str, entries: Sequence[Entry], metadata: Mapping[str, str] = DEFAULT_METADATA) -> Shard:
    """Lay one file out.

    Tensors of wider dtypes lie first, and those of one width in the order given, so that every tensor is aligned to its
    element size, as the safetensors library does it. The data begin, within a page, where those of the source do, and
    stay in step with them: new tensors that are not whole pages would put what follows out of step and come last of
    their dtype's width.

    Args:
        name: File name.
        entries: Its tensors, no two of one name.
        metadata: The `__metadata__` of its header.

    Raises:
        RequestError: The header is larger than the safetensors library reads.
    """
    copying = any(isinstance(entry, TensorInfo) for entry in entries)

    def rank(i: int) -> tuple[int, bool]:
        entry = entries[i]
        odd = isinstance(entry, NewTensor) and entry.nbytes % PAGE_BYTES != 0
        return -(DTYPE_BITS.get(entry.dtype, 0) // 8), copying and odd

    order = sorted(range(len(entries)), key=rank)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins = [0] * len(entries)
    end = 0
    for i in order:
        entry = entries[i]
        begins[i] = end
        end += entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (begins[i], end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    for i in order:
        entry = entries[i]
        if isinstance(entry, TensorInfo) and entry.nbytes:
            text += b" " * ((entry.offset - begins[i] - 8 - len(text)) % PAGE_BYTES // 8 * 8)
            break
    if len(text) > HEADER_LIMIT:
        raise RequestError(f"{name}: a header of {len(text)} bytes is above the limit; give a smaller shard size")
    raw = len(text).to_bytes(8, "little") + text
    return Shard(name, raw, tuple(entries), tuple(len(raw) + begin for begin in begins), len(raw) + end)


def index_text(shards: Sequence[Shard]) -> str:
    """Return the index of several files, as JSON."""
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


__all__ = [
    "DEFAULT_METADATA",
    "DEFAULT_SHARD_BYTES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "Entry",
    "NewTensor",
    "Shard",
    "TensorInfo",
    "index_text",
    "lay_out",
    "plan_shards",
]
