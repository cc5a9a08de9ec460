"""Writer of safetensors checkpoints: shards of a chosen size, in bounded memory, each complete or absent.

Tensors that do not change are copied as bytes from where a `TensorInfo` says they lie, by the kernel where it can.
Tensors that do change are made when their turn comes, one at a time. What is written depends only on the entries and
the shard size.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mea_compress.checkpoint.dtypes import DTYPE_BITS, array_dtype
from mea_compress.checkpoint.reader import (
    HEADER_LIMIT,
    INDEX_NAME,
    SINGLE_NAME,
    TensorInfo,
    open_source,
    quote,
    read_into,
    show,
)
from mea_compress.errors import DiskFullError, RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in one shard, as transformers saves them."""

_METADATA = {"format": "pt"}
_BLOCK_BYTES = 16 << 20
_PAGE_BYTES = 4096
_KERNEL_BYTES = 64 << 20  # that the kernel copies between two looks at whether to go on
_WRITE_BYTES = 1 << 20  # one system call; larger ones have been measured to be up to ten times slower on ext4
_CLONE_RANGE = 0x4020940D  # FICLONERANGE of Linux
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is made when its turn comes.

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
"""A tensor to write: a `TensorInfo` is copied as bytes under its name, a `NewTensor` is made."""


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
    entries: Sequence[Entry], shard_bytes: int = DEFAULT_SHARD_BYTES, metadata: Mapping[str, str] = _METADATA
) -> list[Shard]:
    """Divides tensors among files, in order, as the files that they are copied from do, and further by `shard_bytes`.

    What is copied lies as in its source within a page of the system (see `_shard`), so that pages are copied whole, or,
    on file systems that can (XFS, Btrfs), shared instead of copied.

    A tensor larger than that has a file to itself. Within a file, tensors of wider dtypes lie first, and those of one
    width in the order given, so that every tensor is aligned to its element size, as the safetensors library does it.

    Args:
        entries: The tensors of the checkpoint.
        shard_bytes: Largest sum of tensor bytes in one file.
        metadata: The `__metadata__` of every header.

    Returns:
        The files, named `model.safetensors` if there is one and else `model-00001-of-0000N.safetensors`.

    Raises:
        RequestError: If there is nothing to write, two tensors have one name, or `shard_bytes` is unusable.
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
                f"two tensors would be written as {quote(entry.name)}; remove or rename one of them in the source"
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
        return [_shard(SINGLE_NAME, groups[0], metadata)]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for number, group in enumerate(groups, 1)
    ]


def _shard(name: str, entries: list[Entry], metadata: Mapping[str, str]) -> Shard:
    """Lays a file out: the data begin, within a page, where those of the source do, and stay in step with them.

    New tensors that are not whole pages would put what follows out of step and come last of their dtype's width.
    """
    copying = any(isinstance(entry, TensorInfo) for entry in entries)

    def rank(i: int) -> tuple[int, bool]:
        entry = entries[i]
        odd = isinstance(entry, NewTensor) and entry.nbytes % _PAGE_BYTES != 0
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
            text += b" " * ((entry.offset - begins[i] - 8 - len(text)) % _PAGE_BYTES // 8 * 8)
            break
    if len(text) > HEADER_LIMIT:
        raise RequestError(f"{name}: a header of {len(text)} bytes is above the limit; give a smaller shard size")
    raw = len(text).to_bytes(8, "little") + text
    return Shard(name, raw, tuple(entries), tuple(len(raw) + begin for begin in begins), len(raw) + end)


def required_bytes(
    entries: Sequence[Entry], shard_bytes: int = DEFAULT_SHARD_BYTES, metadata: Mapping[str, str] = _METADATA
) -> int:
    """Bytes on disk of what `write_checkpoint` writes with the same arguments: all shards and the index.

    Raises:
        RequestError: As `plan_shards`.
    """
    shards = plan_shards(entries, shard_bytes, metadata)
    return sum(shard.nbytes for shard in shards) + (len(_index(shards)) if len(shards) > 1 else 0)


def write_checkpoint(
    directory: str | os.PathLike[str],
    entries: Sequence[Entry],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] = _METADATA,
    progress: Callable[[int], object] | None = None,
    durable: bool = True,
) -> list[Path]:
    """Writes all shards, then the index where there is more than one.

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
        raise _refusal(error, directory, 0) from None
    files = [write_shard(directory, shard, progress, durable) for shard in shards]
    index = write_index(directory, shards)
    return files if index is None else [*files, index]


def write_shard(
    directory: str | os.PathLike[str],
    shard: Shard,
    progress: Callable[[int], object] | None = None,
    durable: bool = True,
) -> Path:
    """Writes one file: under a temporary name, synchronised to disk, renamed when it is complete.

    Tensors are copied first; new ones are then made in the order of `shard.entries`, with one of them in memory at a
    time.

    Args:
        directory: An existing directory.
        shard: One of `plan_shards`.
        progress: Called with the number of bytes written since its last call; they add up to `shard.nbytes`.
        durable: Synchronise the file to disk; without it that is left to the caller.

    Returns:
        Path of the file.

    Raises:
        RequestError: If the disk is full, the directory cannot be written to, a source cannot be read, the file is
            itself a source, or a produced tensor has another dtype or shape than was declared.
    """
    path = Path(directory) / shard.name
    _refuse_overwriting(path, shard)
    tell = progress or _silent
    with _replacing(path, shard.nbytes, durable) as target:
        if not _shares_pages(target, shard):
            _allocate(target, path, shard.nbytes)
        _write(target, memoryview(shard.header), 0, path, shard.nbytes, tell)
        _copy_tensors(target, shard, path, tell)
        for entry, position in zip(shard.entries, shard.positions, strict=True):
            if isinstance(entry, NewTensor):
                _write_tensor(target, entry, position, path, shard.nbytes, tell)
    return path


def write_index(directory: str | os.PathLike[str], shards: Sequence[Shard]) -> Path | None:
    """Writes `model.safetensors.index.json`, atomically; does nothing for a single file, which needs none.

    Raises:
        RequestError: If the disk is full or the directory cannot be written to.
    """
    if len(shards) < 2:
        return None
    path = Path(directory) / INDEX_NAME
    text = _index(shards)
    with _replacing(path, len(text), True) as target:
        _write(target, memoryview(text), 0, path, len(text), _silent)
    return path


def shard_finished(directory: str | os.PathLike[str], shard: Shard) -> bool:
    """Whether `write_shard` has already completed this very shard: the file has its size and its header."""
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


def _index(shards: Sequence[Shard]) -> bytes:
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _silent(_: int) -> None:
    pass


def _refusal(error: OSError | ValueError, path: Path, needed: int) -> RequestError:
    """What went wrong when writing `path`, which needs `needed` bytes."""
    number = error.errno if isinstance(error, OSError) else errno.EINVAL
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"{show(path)}: the disk or quota is full and this file needs {needed} bytes; free some space and run the "
            "same command again"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RequestError(
            f"{show(path)}: cannot be written ({os.strerror(number)}); choose an output directory that this user may "
            "write to"
        )
    if number == errno.EFBIG:
        return RequestError(
            f"{show(path)}: {needed} bytes are more than this file system or limit allows for one file; "
            "give a smaller shard size"
        )
    reason = os.strerror(number) if number else str(error)
    return RequestError(f"{show(path)}: writing failed ({reason}); choose another output directory or check the disk")


def _refuse_overwriting(path: Path, shard: Shard) -> None:
    """Keeps a source file from being replaced by its own compressed copy."""
    for source in {entry.file for entry in shard.entries if isinstance(entry, TensorInfo)}:
        try:
            same = os.path.samefile(source, path)
        except (OSError, ValueError):
            continue
        if same:
            raise RequestError(
                f"{show(path)}: this file would be overwritten while it is copied from; choose another output directory"
            )


@contextmanager
def _replacing(path: Path, needed: int, durable: bool) -> Iterator[int]:
    """Descriptor of a new file that takes the place of `path` if, and only if, the block ends well."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        target = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:
        raise _refusal(error, temporary, needed) from None
    try:
        try:
            yield target
        except BaseException:
            os.close(target)
            raise
        try:
            try:
                if durable:
                    os.fsync(target)
            finally:
                os.close(target)
            os.replace(temporary, path)
        except OSError as error:
            raise _refusal(error, path, needed) from None
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if not durable:
        return
    with suppress(OSError):  # not every file system can synchronise a directory
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(
    target: int, view: memoryview, position: int, path: Path, needed: int, tell: Callable[[int], object]
) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.pwrite(target, view[done : done + _WRITE_BYTES], position + done)
        except OSError as error:
            raise _refusal(error, path, needed) from None
        done += count
        tell(count)


def _write_tensor(
    target: int, entry: NewTensor, position: int, path: Path, needed: int, tell: Callable[[int], object]
) -> None:
    """Makes one tensor and writes it, row block by row block, so that no second copy of it is ever whole in memory."""
    import numpy as np

    if sys.byteorder != "little":
        raise RequestError(f"{show(path)}: writing weights needs a little-endian machine; use another one")
    made = entry.produce()
    if made.dtype != array_dtype(entry.dtype) or made.shape != tuple(entry.shape):
        raise RequestError(
            f"{show(path)}: tensor {quote(entry.name)} came out as {made.dtype} {list(made.shape)} instead of "
            f"{array_dtype(entry.dtype)} {list(entry.shape)}; correct what makes it"
        )
    if not entry.nbytes:
        return
    rows = made if made.ndim else made.reshape(1)
    row_bytes = entry.nbytes // len(rows)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step])
        raw = block.reshape(-1).view(np.uint8).data
        _write(target, raw, position + start * row_bytes, path, needed, tell)


@dataclass(slots=True)
class _Range:
    """Bytes to copy from one place of a source to one place of the target."""

    file: Path
    offset: int
    position: int
    count: int


def _copy_tensors(target: int, shard: Shard, path: Path, tell: Callable[[int], object]) -> None:
    source, opened = -1, None
    try:
        for part in _ranges(shard):
            if part.file != opened:
                if source >= 0:
                    os.close(source)
                source, opened = -1, None
                source, opened = open_source(part.file), part.file
                _advise(source, 0, 0, "POSIX_FADV_SEQUENTIAL")
            _copy(source, target, part, path, shard.nbytes, tell)
    finally:
        if source >= 0:
            os.close(source)


def _ranges(shard: Shard) -> list[_Range]:
    """The copies of a shard in the order of the target, ranges that are adjacent on both sides merged."""
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
            and last.position + last.count == position
            and last.offset + last.count == entry.offset
            and last.file == entry.file
        ):
            last.count += entry.nbytes
        else:
            ranges.append(_Range(entry.file, entry.offset, position, entry.nbytes))
    return ranges


def _copy(source: int, target: int, part: _Range, path: Path, needed: int, tell: Callable[[int], object]) -> None:
    """Copies in the kernel; what is left where the kernel cannot goes through a small buffer."""
    kernel_copy = getattr(os, "copy_file_range", None)
    done = 0
    while kernel_copy is not None and done < part.count:
        block, position = min(part.count - done, _KERNEL_BYTES), part.position + done
        if (part.offset - part.position) % _PAGE_BYTES == 0:  # whole pages by themselves, for they may be shared
            if position % _PAGE_BYTES:
                block = min(block, _PAGE_BYTES - position % _PAGE_BYTES)
            elif block > _PAGE_BYTES:
                block -= block % _PAGE_BYTES
        # What comes next is fetched meanwhile: from a file that nobody has read, the system would wait for each page.
        _advise(source, part.offset + done + block, _KERNEL_BYTES, "POSIX_FADV_WILLNEED")
        try:
            count = kernel_copy(source, target, block, part.offset + done, position)
        except OSError as error:
            if error.errno in _FULL:
                raise _refusal(error, path, needed) from None
            break  # not supported here (EXDEV, EINVAL, ENOSYS, EOPNOTSUPP), or plain reading and writing will tell
        if not count:  # either the source has shrunk, which reading it will tell, or this file system is odd
            break
        done += count
        _write_out(target)
        tell(count)
    buffer = memoryview(bytearray(min(part.count - done, _WRITE_BYTES)))
    while done < part.count:
        view = buffer[: part.count - done]
        read_into(source, view, part.offset + done, part.file)
        _write(target, view, part.position + done, path, needed, tell)
        done += len(view)


def _shares_pages(target: int, shard: Shard) -> bool:
    """Whether the file system gives the target a page of the source instead of a copy (Btrfs, XFS); tries with one.

    Btrfs would then keep all of the room that was set aside for the file as long as any of it is used.
    """
    for part in _ranges(shard) if sys.platform == "linux" else ():
        skipped = -part.offset % _PAGE_BYTES
        if (part.offset - part.position) % _PAGE_BYTES == 0 and part.count >= skipped + _PAGE_BYTES:
            with suppress(OSError):
                source = open_source(part.file)
                try:
                    page = struct.pack("qQQQ", source, part.offset + skipped, _PAGE_BYTES, part.position + skipped)
                    fcntl.ioctl(target, _CLONE_RANGE, page)
                finally:
                    os.close(source)
                return True
            return False
    return False


def _allocate(target: int, path: Path, needed: int) -> None:
    """Has the file system set the file's room aside, where it can: a full disk shows at once, and writing goes faster.

    The C library's own `posix_fallocate` would write to every block where the file system cannot.
    """
    error = _system("fallocate", target, 0, ctypes.c_int64(0), ctypes.c_int64(needed)) if needed else 0
    if error in _FULL:
        raise _refusal(OSError(error, ""), path, needed)


def _write_out(target: int) -> None:
    """Has the system begin to write out what is copied, so that little is left at the end."""
    everything, begin = ctypes.c_int64(0), 2  # SYNC_FILE_RANGE_WRITE of Linux
    _system("sync_file_range", target, everything, everything, begin)


def _system(name: str, *arguments: Any) -> int:
    """Calls a function of the C library that Python does not have, where there is one; its error number, or 0."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    return ctypes.get_errno() if function is not None and function(*arguments) else 0


def _advise(descriptor: int, offset: int, count: int, advice: str) -> None:
    """Tells the system how a file will be used, where it listens."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        with suppress(OSError):
            advise(descriptor, offset, count, getattr(os, advice))
