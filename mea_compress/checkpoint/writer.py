"""Writer of safetensors checkpoints: shards of a chosen size, in bounded memory, each complete or absent.

Tensors that do not change are copied as bytes from where a `TensorInfo` says they lie, by the kernel where it can.
Tensors that do change are produced lazily, one at a time. What is written depends only on the entries and the shard
size.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mea_compress.checkpoint.dtypes import array_dtype
from mea_compress.checkpoint.files import FULL, refusal, replacing, write_bytes, write_text
from mea_compress.checkpoint.layout import (
    DEFAULT_METADATA,
    DEFAULT_SHARD_BYTES,
    INDEX_NAME,
    Entry,
    NewTensor,
    Shard,
    TensorInfo,
    index_text,
    plan_shards,
)
from mea_compress.checkpoint.system import PAGE_BYTES, advise, allocate, share_page, start_writeback
from mea_compress.checkpoint.untrusted import open_source, printable_name, printable_path, read_into
from mea_compress.errors import RequestError

_BLOCK_BYTES = 16 << 20
_KERNEL_BYTES = 64 << 20  # that the kernel copies between two looks at whether to go on
_BUFFER_BYTES = 1 << 20
_NO_ROOM = (*FULL, errno.EFBIG)


def write_checkpoint(
    directory: str | os.PathLike[str],
    entries: Sequence[Entry],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] = DEFAULT_METADATA,
    progress: Callable[[int], object] | None = None,
    durable: bool = True,
) -> list[Path]:
    """Write all shards, then the index where there is more than one.

    Args:
        directory: Where to; created if it is not there.
        entries: The tensors, in order.
        shard_bytes: Largest sum of tensor bytes in one file.
        metadata: The `__metadata__` of every header.
        progress: Called with the number of bytes written since its last call.
        durable: Synchronise the files to disk; without it that is left to the caller.

    Returns:
        The files written.

    Raises:
        RequestError: As `plan_shards` and `write_shard`.
    """
    shards = plan_shards(entries, shard_bytes, metadata)
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise refusal(error, directory) from None
    files = [write_shard(directory, shard, progress, durable) for shard in shards]
    index = write_index(directory, shards)
    return files if index is None else [*files, index]


def write_shard(
    directory: str | os.PathLike[str],
    shard: Shard,
    progress: Callable[[int], object] | None = None,
    durable: bool = True,
) -> Path:
    """Write one file: under a temporary name, synchronised to disk, renamed when it is complete.

    Tensors are copied first; new ones are then produced in the order of `shard.entries`, with one of them in memory at
    a time.

    Args:
        directory: An existing directory.
        shard: One of `plan_shards`.
        progress: Called with the number of bytes written since its last call; they add up to `shard.nbytes`.
        durable: Synchronise the file to disk; without it that is left to the caller.

    Returns:
        Path of the file.

    Raises:
        RequestError: The disk is full, the directory cannot be written to, a source cannot be read, the file is itself
            a source, or a produced tensor has another dtype or shape than was declared.
    """
    path = Path(directory) / shard.name
    _refuse_overwriting(path, shard)
    count_bytes = progress or _silent
    with replacing(path, shard.nbytes, durable) as target:
        if not _shares_pages(target, shard):
            _reserve(target, path, shard.nbytes)
        write_bytes(target, shard.header, 0, path, shard.nbytes, count_bytes)
        _copy_tensors(target, shard, path, count_bytes)
        for entry, position in zip(shard.entries, shard.positions, strict=True):
            if isinstance(entry, NewTensor):
                _write_tensor(target, entry, position, path, shard.nbytes, count_bytes)
    return path


def write_index(directory: str | os.PathLike[str], shards: Sequence[Shard]) -> Path | None:
    """Write `model.safetensors.index.json`, atomically; a single file needs none.

    Raises:
        RequestError: The disk is full or the directory cannot be written to.
    """
    if len(shards) < 2:
        return None
    path = Path(directory) / INDEX_NAME
    write_text(path, index_text(shards))
    return path


def shard_finished(directory: str | os.PathLike[str], shard: Shard) -> bool:
    """Return whether `write_shard` has already completed this very shard: the file has its size and its header."""
    try:
        descriptor = os.open(Path(directory) / shard.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        same_size = os.fstat(descriptor).st_size == shard.nbytes
        return same_size and os.pread(descriptor, len(shard.header), 0) == shard.header
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _silent(_: int) -> None:
    pass


def _refuse_overwriting(path: Path, shard: Shard) -> None:
    """Keep a source file from being replaced by its own compressed copy."""
    for source in {entry.file for entry in shard.entries if isinstance(entry, TensorInfo)}:
        try:
            same = os.path.samefile(source, path)
        except (OSError, ValueError):
            continue
        if same:
            raise RequestError(
                f"{printable_path(path)}: this file would be overwritten while it is copied from; "
                "choose another output directory"
            )


def _write_tensor(
    target: int, entry: NewTensor, position: int, path: Path, needed: int, count_bytes: Callable[[int], object]
) -> None:
    """Produce one tensor and write it, row block by row block, so that no second copy of it is ever whole in memory."""
    import numpy as np

    if sys.byteorder != "little":
        raise RequestError(f"{printable_path(path)}: writing weights needs a little-endian machine; use another one")
    array = entry.produce()
    if array.dtype != array_dtype(entry.dtype) or array.shape != tuple(entry.shape):
        raise RequestError(
            f"{printable_path(path)}: tensor {printable_name(entry.name)} came out as {array.dtype} "
            f"{list(array.shape)} instead of {array_dtype(entry.dtype)} {list(entry.shape)}; correct what makes it"
        )
    if not entry.nbytes:
        return
    rows = array if array.ndim else array.reshape(1)
    row_bytes = entry.nbytes // len(rows)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step])
        raw = block.reshape(-1).view(np.uint8).data
        write_bytes(target, raw, position + start * row_bytes, path, needed, count_bytes)


@dataclass(slots=True)
class _Range:
    """Bytes to copy from one place of a source to one place of the target."""

    file: Path
    offset: int
    position: int
    nbytes: int


def _copy_tensors(target: int, shard: Shard, path: Path, count_bytes: Callable[[int], object]) -> None:
    source, file = -1, None
    try:
        for copied in _ranges(shard):
            if copied.file != file:
                if source >= 0:
                    os.close(source)
                source, file = -1, None
                source, file = open_source(copied.file), copied.file
                advise(source, 0, 0, "POSIX_FADV_SEQUENTIAL")
            _copy(source, target, copied, path, shard.nbytes, count_bytes)
    finally:
        if source >= 0:
            os.close(source)


def _ranges(shard: Shard) -> list[_Range]:
    """Return the copies of a shard in the order of the target, ranges that are adjacent on both sides merged."""
    copies = [
        (position, entry)
        for entry, position in zip(shard.entries, shard.positions, strict=True)
        if isinstance(entry, TensorInfo) and entry.nbytes
    ]
    copies.sort(key=lambda pair: pair[0])
    ranges: list[_Range] = []
    for position, entry in copies:
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and last.position + last.nbytes == position
            and last.offset + last.nbytes == entry.offset
            and last.file == entry.file
        ):
            last.nbytes += entry.nbytes
        else:
            ranges.append(_Range(entry.file, entry.offset, position, entry.nbytes))
    return ranges


def _copy(
    source: int, target: int, copied: _Range, path: Path, needed: int, count_bytes: Callable[[int], object]
) -> None:
    """Copy in the kernel; what is left where the kernel cannot goes through a small buffer."""
    kernel_copy = getattr(os, "copy_file_range", None)
    done = 0
    while kernel_copy is not None and done < copied.nbytes:
        block, position = min(copied.nbytes - done, _KERNEL_BYTES), copied.position + done
        if (copied.offset - copied.position) % PAGE_BYTES == 0:  # whole pages by themselves, for they may be shared
            if position % PAGE_BYTES:
                block = min(block, PAGE_BYTES - position % PAGE_BYTES)
            elif block > PAGE_BYTES:
                block -= block % PAGE_BYTES
        # What comes next is fetched meanwhile: from a file that nobody has read, the system would wait for each page.
        advise(source, copied.offset + done + block, _KERNEL_BYTES, "POSIX_FADV_WILLNEED")
        try:
            count = kernel_copy(source, target, block, copied.offset + done, position)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise refusal(error, path, needed) from None
            break  # not supported here (EXDEV, EINVAL, ENOSYS, EOPNOTSUPP), or plain reading and writing will tell
        if not count:  # either the source has shrunk, which reading it will tell, or this file system is odd
            break
        done += count
        start_writeback(target)
        count_bytes(count)
    buffer = memoryview(bytearray(min(copied.nbytes - done, _BUFFER_BYTES)))
    while done < copied.nbytes:
        view = buffer[: copied.nbytes - done]
        read_into(source, view, copied.offset + done, copied.file)
        write_bytes(target, view, copied.position + done, path, needed, count_bytes)
        done += len(view)


def _shares_pages(target: int, shard: Shard) -> bool:
    """Return whether the file system gives the target a page of the source instead of a copy; try with one.

    Btrfs would then keep all of the room that was set aside for the file as long as any of it is used.
    """
    for copied in _ranges(shard):
        skipped = -copied.offset % PAGE_BYTES
        if (copied.offset - copied.position) % PAGE_BYTES == 0 and copied.nbytes >= skipped + PAGE_BYTES:
            source = open_source(copied.file)
            try:
                return share_page(source, target, copied.offset + skipped, copied.position + skipped)
            finally:
                os.close(source)
    return False


def _reserve(target: int, path: Path, needed: int) -> None:
    """Have the file system set the file's room aside, so that a full disk shows at once and writing goes faster."""
    number = allocate(target, needed)
    if number in _NO_ROOM:
        raise refusal(OSError(number, os.strerror(number)), path, needed)


__all__ = ["shard_finished", "write_checkpoint", "write_index", "write_shard"]
