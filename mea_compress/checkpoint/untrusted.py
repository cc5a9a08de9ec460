"""Untrusted input: every violation raises RequestError with a one-line message.

Links that leave the checkpoint's directory, names that lead elsewhere, JSON and headers that lie, files that block when
they are opened or shrink while they are read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.checkpoint.tensors import TensorInfo
from mea_compress.errors import RequestError

HEADER_LIMIT = 100_000_000
"""Largest header in bytes, the limit of the safetensors library; also applied to JSON files."""

DOWNLOAD_AGAIN = "download or save the file again"
"""The remedy for a damaged file."""


def printable_path(path: str | os.PathLike[str]) -> str:
    """Return a path as it can stand in a one-line message."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def printable_name(name: str) -> str:
    """Return a tensor name or key as it can stand in a one-line message: escaped, and cut where it is absurdly long."""
    return ascii(name if len(name) <= 120 else name[:120] + "...")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "not a valid path"


def allowed_folders(directory: Path) -> list[Path]:
    """Return where links of a directory may lead: into itself and, in a Hugging Face cache, into the blobs next to it.

    Raises:
        RequestError: It is no directory.
    """
    try:
        mode = os.stat(directory).st_mode
        real = Path(os.path.realpath(directory))
    except FileNotFoundError:
        raise RequestError(
            f"{printable_path(directory)}: there is no such directory; give the path of a checkpoint, or its id "
            "on the hub (OWNER/NAME)"
        ) from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{printable_path(directory)}: the directory cannot be opened ({_reason(error)}); give another path"
        ) from None
    if not stat.S_ISDIR(mode):
        raise RequestError(
            f"{printable_path(directory)}: this is not a directory; give the directory that holds the checkpoint"
        )
    snapshots = next((parent for parent in real.parents if parent.name == "snapshots"), None)
    return [real] if snapshots is None else [real, snapshots.parent / "blobs"]


def check_inside(path: Path, allowed: list[Path]) -> None:
    """Raise a RequestError if a path leads, by links, to none of the allowed folders."""
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise RequestError(
            f"{printable_path(path)}: this symbolic link leaves the checkpoint directory; "
            "replace it by the file it points to"
        )


def check_regular(path: Path) -> None:
    """Raise a RequestError if this is not a regular file; it is not opened, since a FIFO or a device can hang then."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        problem = "is a broken symbolic link" if path.is_symlink() else "does not exist"
        raise RequestError(f"{printable_path(path)}: the file {problem}; download the missing file") from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{printable_path(path)}: the file cannot be opened ({_reason(error)}); replace it by a readable file"
        ) from None
    if not stat.S_ISREG(mode):
        raise RequestError(
            f"{printable_path(path)}: this is not a regular file; replace it by the file itself or remove it"
        )


def open_source(path: Path) -> int:
    """Return a read-only descriptor of a regular file; never block.

    Raises:
        RequestError: The file is missing, not regular (a FIFO, a device, a folder) or may not be read.
    """
    check_regular(path)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RequestError(
            f"{printable_path(path)}: the file cannot be opened ({_reason(error)}); make it readable for this user"
        ) from None


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """Yield descriptor and size of a regular file.

    Raises:
        RequestError: As `open_source`.
    """
    descriptor = open_source(path)
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from position `offset` of an open file.

    Raises:
        RequestError: The file ends early or reading fails; `path` is only for the sentence.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise RequestError(
                f"{printable_path(path)}: reading failed ({_reason(error)}); check the disk and {DOWNLOAD_AGAIN}"
            ) from None
        if not count:
            raise RequestError(
                f"{printable_path(path)}: the file ends before byte {offset + len(view)}, it is truncated or was "
                f"changed while it was read; {DOWNLOAD_AGAIN}"
            )
        done += count


def list_names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted.

    Raises:
        RequestError: It may not be read.
    """
    try:
        return sorted(os.listdir(directory))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{printable_path(directory)}: the directory cannot be listed ({_reason(error)}); "
            "make it readable for this user"
        ) from None


class _DoubledKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DoubledKeyError(key)
            seen.add(key)
    return value


def _parse_json(raw: bytes | bytearray, path: Path, what: str) -> dict[str, Any]:
    problem = None
    value = None
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except _DoubledKeyError as error:
        problem = f"has the key {printable_name(error.args[0])} twice"
    except (RecursionError, MemoryError):
        problem = "is nested too deeply or too large"
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON (at character {error.pos})"
    except ValueError:
        problem = "is not valid JSON (it has an absurdly long number)"
    if problem is None and not isinstance(value, dict):
        problem = "is not a JSON object"
    if problem is not None:
        raise RequestError(f"{printable_path(path)}: {what} {problem}; {DOWNLOAD_AGAIN}")
    assert isinstance(value, dict)
    return value


def read_json(path: Path, allowed: list[Path]) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RequestError: It holds no such thing, or leads outside the allowed folders.
    """
    check_inside(path, allowed)
    with opened(path) as (descriptor, size):
        if size > HEADER_LIMIT:
            raise RequestError(
                f"{printable_path(path)}: the file has {size} bytes, far too many for what it should be; "
                f"{DOWNLOAD_AGAIN}"
            )
        raw = bytearray(size)
        read_into(descriptor, memoryview(raw), 0, path)
    return _parse_json(raw, path, "the file")


def check_weight_map(path: Path, weight_map: object) -> dict[str, str]:
    """Return the weight map of an index, each tensor in a safetensors file with a plain name.

    Raises:
        RequestError: It is something else; `path` is only for the sentence.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(
            f'{printable_path(path)}: the index has no "weight_map" object with tensors; {DOWNLOAD_AGAIN}'
        )
    checked: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise RequestError(
                f"{printable_path(path)}: the file of tensor {printable_name(name)} is not a string; {DOWNLOAD_AGAIN}"
            )
        if shard in checked:
            continue
        if (
            not shard
            or "/" in shard
            or "\\" in shard
            or "\0" in shard
            or shard.startswith(".")
            or not _encodable(shard)
        ):
            raise RequestError(
                f"{printable_path(path)}: tensor {printable_name(name)} is said to be in {printable_name(shard)}, "
                f"which is no plain file name inside the directory; {DOWNLOAD_AGAIN}, from a source you trust"
            )
        if not shard.endswith(".safetensors"):
            raise RequestError(
                f"{printable_path(path)}: tensor {printable_name(name)} is said to be in {printable_name(shard)}, "
                "which is no safetensors file (pickles are never read); save the checkpoint as safetensors"
            )
        checked.add(shard)
    return weight_map


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_header(path: Path, allowed: list[Path]) -> tuple[dict[str, object], dict[str, str], int, int]:
    """Read the header of a safetensors file.

    Returns:
        What it says of each tensor, still to be checked (`check_entry`), its metadata, the position at which the data
        begin, and the size of the file.

    Raises:
        RequestError: It is no such header, or the file leads outside the allowed folders.
    """
    check_inside(path, allowed)
    with opened(path) as (descriptor, size):
        if size < 8:
            raise RequestError(
                f"{printable_path(path)}: the file is truncated, it has only {size} bytes; {DOWNLOAD_AGAIN}"
            )
        prefix = bytearray(8)
        read_into(descriptor, memoryview(prefix), 0, path)
        if prefix == b"version ":
            raise RequestError(
                f"{printable_path(path)}: this is a Git LFS pointer instead of weights; run `git lfs pull`"
            )
        length = int.from_bytes(prefix, "little")
        if length > HEADER_LIMIT or length > size - 8:
            limit = f"the file's {size}" if length > size - 8 else f"the limit of {HEADER_LIMIT}"
            raise RequestError(
                f"{printable_path(path)}: the header claims {length} bytes, more than {limit}, so the file is "
                f"truncated or not safetensors; {DOWNLOAD_AGAIN}"
            )
        raw = bytearray(length)
        read_into(descriptor, memoryview(raw), 8, path)
    if raw[:1] != b"{":
        raise RequestError(f"{printable_path(path)}: the header is not a JSON object; {DOWNLOAD_AGAIN}")
    header = _parse_json(raw, path, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RequestError(
            f"{printable_path(path)}: the header's __metadata__ is not an object of strings; {DOWNLOAD_AGAIN}"
        )
    return header, metadata, 8 + length, size


def check_entry(path: Path, name: str, spec: object) -> tuple[str, tuple[int, ...], int, int]:
    """Check what a header says of one tensor, by itself.

    Returns:
        Dtype, shape, and the offsets at which the tensor begins and ends within the data.

    Raises:
        RequestError: It cannot be so; `path` is only for the sentence.
    """

    def refuse(problem: str) -> RequestError:
        return RequestError(f"{printable_path(path)}: tensor {printable_name(name)} {problem}; {DOWNLOAD_AGAIN}")

    if not _encodable(name):
        raise refuse("has a name that is not valid text")
    if not isinstance(spec, dict):
        raise refuse("is not described by a JSON object")
    dtype, shape, offsets = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
    if not isinstance(dtype, str) or not 0 < len(dtype) <= 32 or not dtype.isidentifier() or not dtype.isascii():
        raise refuse("has no dtype name")
    if not isinstance(shape, list) or len(shape) > 64:
        raise refuse("has no shape of at most 64 dimensions")
    for length in shape:
        if type(length) is not int or not 0 <= length < 2**63:
            raise refuse("has a shape with something else than whole numbers from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not (type(offsets[0]) is type(offsets[1]) is int):
        raise refuse("has no data_offsets of two whole numbers")
    begin, end = offsets
    if not 0 <= begin <= end < 2**63:
        raise refuse("has data_offsets out of range")
    nbytes = end - begin
    count = math.prod(shape)
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        consistent = nbytes * 8 % count == 0 and 1 <= nbytes * 8 // count <= 128 if count else nbytes == 0
    else:
        consistent = count * bits == nbytes * 8
    if not consistent:
        raise refuse(f"has {nbytes} bytes, which does not fit its shape and dtype {dtype}")
    return dtype, tuple(shape), begin, end


def check_cover(path: Path, tensors: Sequence[TensorInfo], start: int, size: int) -> None:
    """Raise a RequestError if the data of a file are not covered exactly once by its tensors.

    Args:
        path: The file, for the sentence.
        tensors: Sorted by offset.
        start: Where the data begin.
        size: Of the file.
    """
    end = start
    for info in tensors:
        if info.offset != end:
            problem = "overlaps another tensor" if info.offset < end else "leaves a gap before it"
            raise RequestError(
                f"{printable_path(path)}: tensor {printable_name(info.name)} {problem} in the file; {DOWNLOAD_AGAIN}"
            )
        end += info.nbytes
        if end > size:
            raise RequestError(
                f"{printable_path(path)}: tensor {printable_name(info.name)} ends at byte {end} but the file has only "
                f"{size}, so it is truncated or its header is wrong; {DOWNLOAD_AGAIN}"
            )
    if end < size:
        raise RequestError(
            f"{printable_path(path)}: the file has {size - end} bytes that belong to no tensor; {DOWNLOAD_AGAIN}"
        )


__all__ = [
    "DOWNLOAD_AGAIN",
    "HEADER_LIMIT",
    "allowed_folders",
    "check_cover",
    "check_entry",
    "check_inside",
    "check_regular",
    "check_weight_map",
    "list_names",
    "open_source",
    "opened",
    "printable_name",
    "printable_path",
    "read_header",
    "read_into",
    "read_json",
]
