"""Lazy reader of safetensors checkpoints: headers only, until a tensor is asked for.

Nothing in a checkpoint is trusted. Headers and indices are parsed here rather than by a library, so that every way in
which they can lie ends in one sentence. Files are only ever opened for reading, and tensors are read into fresh buffers
instead of being mapped, so that the resident memory is that of the tensors in use.

The format: 8 bytes little-endian length N, N bytes of JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`,
then the data, which the offsets (relative to the end of the header) cover without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.checkpoint.dtypes import DTYPE_BITS, array_dtype, as_tensor
from mea_compress.errors import RequestError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HEADER_LIMIT = 100_000_000
"""Largest header in bytes, the limit of the safetensors library; also applied to JSON files."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FOREIGN = (
    ".gguf",
    ".ggml",
    ".h5",
    ".hdf5",
    ".msgpack",
    ".ot",
    ".npz",
    ".npy",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".nemo",
)
_WEIGHTS = (".safetensors", *_PICKLES, *_FOREIGN)
_WEIGHT_INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")
_SHARD_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_AGAIN = "download or save the file again"


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


class CheckpointReader:
    """A directory of safetensors weights, checked when it is opened and read one tensor at a time.

    Reads `model.safetensors.index.json` and the shards it names, or `model.safetensors`, or where there is neither
    every `*.safetensors` file of the directory, provided that no tensor comes twice.

    Attributes:
        directory: The directory as it was given.
        files: Weight files, sorted by name.
        tensors: Every tensor by name, ordered by file name, then by offset.
    """

    directory: Path
    files: list[Path]
    tensors: dict[str, TensorInfo]

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Reads and checks the headers and the index.

        Args:
            directory: A checkpoint in Hugging Face layout.

        Raises:
            RequestError: If the path is no directory, holds no safetensors weights, or if its index or a header is
                damaged or lies; the sentence names the file and the remedy.
        """
        self.directory = Path(directory)
        self._allowed = _allowed_folders(self.directory)
        names, weight_map = _find_weights(self.directory, self._allowed)
        self.files = [self.directory / name for name in names]
        self.tensors = {}
        for file in self.files:
            for info in _read_header(file, self._allowed):
                first = self.tensors.setdefault(info.name, info)
                if first is not info:
                    raise RequestError(
                        f"{show(self.directory)}: tensor {quote(info.name)} is in {show(first.file.name)} and again in "
                        f"{show(file.name)}; remove the file that does not belong to the checkpoint or save it again"
                    )
        if weight_map is not None:
            self._check_index(weight_map)
        if not self.tensors:
            raise RequestError(f"{show(self.directory)}: the safetensors files hold no tensors; {_AGAIN}")

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = show(self.directory / INDEX_NAME)
        for name, shard in weight_map.items():
            info = self.tensors.get(name)
            if info is None or info.file.name != shard:
                raise RequestError(
                    f"{index}: tensor {quote(name)} is not in {show(shard)} as the index says; "
                    "download the index and the shards again, from one revision"
                )
        if len(self.tensors) > len(weight_map):
            name = next(name for name in self.tensors if name not in weight_map)
            raise RequestError(
                f"{index}: tensor {quote(name)} of {show(self.tensors[name].file.name)} is missing from the index; "
                "download the index and the shards again, from one revision"
            )

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of this name."""
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor.

        Raises:
            RequestError: If there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise RequestError(
                f"{show(self.directory)}: the weights have no tensor {quote(name)}; "
                "check that config.json belongs to these weights and that the download is complete"
            )
        return info

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its own dtype, in memory of its own.

        Raises:
            RequestError: If there is no such tensor, or as `read_tensor`.
        """
        return read_tensor(self.info(name))

    def read_array(self, name: str) -> NDArray[Any]:
        """The same as a NumPy array.

        Raises:
            RequestError: If there is no such tensor, or as `read_array`.
        """
        return read_array(self.info(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of a tensor of shape (N, ...), as a tensor of shape (stop - start, ...).

        Raises:
            RequestError: As `read`.
            ValueError: Unless 0 <= start <= stop <= N.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {name} with shape {info.shape}")
        row = info.nbytes // max(1, info.shape[0])
        shape = (stop - start, *info.shape[1:])
        return read_tensor(
            TensorInfo(name, info.dtype, shape, info.file, info.offset + start * row, (stop - start) * row)
        )

    def config(self) -> dict[str, Any]:
        """The parsed `config.json`.

        Raises:
            RequestError: If it is missing, unreadable, or not one JSON object.
        """
        path = self.directory / "config.json"
        if not os.path.lexists(path):
            raise RequestError(
                f"{show(path)}: the file is missing; give the directory of a whole Hugging Face checkpoint, "
                "with its config.json"
            )
        return _read_json(path, self._allowed)

    def other_files(self) -> list[Path]:
        """Everything that is not weights: tokenizer, chat template, generation config, code, licence, ...

        Weights of every format and their indices are left out, and so are the top-level `config.json`, hidden folders
        and `__pycache__`.

        Returns:
            Paths relative to the directory, sorted. They may be links (to be followed when copied).

        Raises:
            RequestError: If there is a link that leaves the directory or something that is not a regular file.
        """
        found: list[Path] = []
        folders = [""]
        while folders:
            folder = folders.pop()
            for name in _list(self.directory / folder):
                relative = os.path.join(folder, name)
                path = self.directory / relative
                if os.path.isdir(path) and (name.startswith(".") or name == "__pycache__"):
                    continue
                if os.path.isdir(path) and not os.path.islink(path):
                    folders.append(relative)
                elif relative != "config.json" and not _is_weights(name):
                    _check_inside(path, self._allowed)
                    _check_regular(path)
                    found.append(Path(relative))
        return sorted(found)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Reads one tensor, in its own dtype, into memory of its own.

    Raises:
        RequestError: As `read_array`, or torch has no such dtype.
    """
    array = read_array(info)
    try:
        return as_tensor(array)
    except KeyError:
        raise _not_computed(info) from None


def read_array(info: TensorInfo) -> NDArray[Any]:
    """Reads one tensor, in its own dtype, into memory of its own.

    Raises:
        RequestError: If the dtype is none to compute with, the file cannot be read or has shrunk, or there is too
            little memory.
    """
    import numpy as np

    try:
        dtype = array_dtype(info.dtype)
    except KeyError:
        raise _not_computed(info) from None
    if sys.byteorder != "little":
        raise RequestError(f"{show(info.file)}: reading weights needs a little-endian machine; use another one")
    try:
        array = np.empty(info.shape, dtype)
    except (ValueError, MemoryError):
        raise RequestError(
            f"{show(info.file)}: tensor {quote(info.name)} needs {info.nbytes} bytes of memory, more than there is; "
            "use a machine with more memory"
        ) from None
    if info.nbytes:
        with _opened(info.file) as (descriptor, _):
            read_into(descriptor, array.reshape(-1).view(np.uint8).data, info.offset, info.file)
    return array


def _not_computed(info: TensorInfo) -> RequestError:
    return RequestError(
        f"{show(info.file)}: tensor {quote(info.name)} has dtype {info.dtype}, which can be copied but not "
        "computed with; convert the checkpoint to bfloat16 first"
    )


def read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills `view` from position `offset` of an open file.

    Raises:
        RequestError: If the file ends early or reading fails; `path` is only for the sentence.
    """
    done = 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise RequestError(
                f"{show(path)}: reading failed ({_reason(error)}); check the disk and {_AGAIN}"
            ) from None
        if not got:
            raise RequestError(
                f"{show(path)}: the file ends before byte {offset + len(view)}, it is truncated or was changed "
                f"while it was read; {_AGAIN}"
            )
        done += got


def open_source(path: Path) -> int:
    """A read-only descriptor of a regular file; never blocks.

    Raises:
        RequestError: If the file is missing, not regular (a FIFO, a device, a folder) or may not be read.
    """
    _check_regular(path)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RequestError(
            f"{show(path)}: the file cannot be opened ({_reason(error)}); make it readable for this user"
        ) from None


def show(path: str | os.PathLike[str]) -> str:
    """A path as it can stand in a one-line message."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def quote(name: str) -> str:
    """A tensor name or key as it can stand in a one-line message: escaped, and cut where it is absurdly long."""
    return ascii(name if len(name) <= 120 else name[:120] + "...")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "not a valid path"


def _check_regular(path: Path) -> None:
    """Refuses what is not a regular file before it is opened, since opening a FIFO or a device can hang."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        problem = "is a broken symbolic link" if path.is_symlink() else "does not exist"
        raise RequestError(f"{show(path)}: the file {problem}; download the missing file") from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{show(path)}: the file cannot be opened ({_reason(error)}); replace it by a readable file"
        ) from None
    if not stat.S_ISREG(mode):
        raise RequestError(f"{show(path)}: this is not a regular file; replace it by the file itself or remove it")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a regular file."""
    descriptor = open_source(path)
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _list(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{show(directory)}: the directory cannot be listed ({_reason(error)}); make it readable for this user"
        ) from None


def _allowed_folders(directory: Path) -> list[Path]:
    """Where links of this directory may lead: into itself and, in a Hugging Face cache, into the blobs beside it."""
    try:
        mode = os.stat(directory).st_mode
        real = Path(os.path.realpath(directory))
    except FileNotFoundError:
        raise RequestError(
            f"{show(directory)}: there is no such directory; give the path of a downloaded checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{show(directory)}: the directory cannot be opened ({_reason(error)}); give another path"
        ) from None
    if not stat.S_ISDIR(mode):
        raise RequestError(f"{show(directory)}: this is not a directory; give the directory that holds the checkpoint")
    snapshots = next((parent for parent in real.parents if parent.name == "snapshots"), None)
    return [real] if snapshots is None else [real, snapshots.parent / "blobs"]


def _check_inside(path: Path, allowed: list[Path]) -> None:
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise RequestError(
            f"{show(path)}: this symbolic link leaves the checkpoint directory; replace it by the file it points to"
        )


def _is_weights(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(_WEIGHTS) or _WEIGHT_INDEX.search(lower) is not None


def _find_weights(directory: Path, allowed: list[Path]) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, sorted, and the index's weight map where there is an index."""
    names = _list(directory)
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if INDEX_NAME in names:
        weight_map = _read_index(directory / INDEX_NAME, allowed)
        shards = sorted(set(weight_map.values()))
        if SINGLE_NAME in found and SINGLE_NAME not in shards:
            raise RequestError(
                f"{show(directory)}: holds both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is not meant"
            )
        missing = next((shard for shard in shards if shard not in names), None)
        if missing is not None:
            raise RequestError(f"{show(directory / missing)}: the index names this file but it is missing; download it")
        return shards, weight_map
    if SINGLE_NAME in found:
        return [SINGLE_NAME], None
    if found:
        _check_numbering(directory, found)
        return found, None
    if any(name.lower().endswith(_PICKLES) for name in names):
        raise RequestError(
            f"{show(directory)}: has only pickled weights (*.bin, *.pt, *.pth), which are never read because they can "
            "run code; convert them with a version of transformers that reads them, by "
            "save_pretrained(directory, safe_serialization=True)"
        )
    raise RequestError(
        f"{show(directory)}: has no *.safetensors weights; give the directory of a checkpoint saved as safetensors"
    )


def _check_numbering(directory: Path, found: list[str]) -> None:
    """Refuses an incomplete download of numbered shards that came without their index."""
    series: dict[tuple[str, int], set[int]] = {}
    for name in found:
        if match := _SHARD_NAME.fullmatch(name):
            series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in series.items():
        absent = next((number for number in range(1, count + 1) if number not in numbers), None)
        if absent is not None:
            name = f"{stem}-{absent:05d}-of-{count:05d}.safetensors"
            raise RequestError(f"{show(directory / name)}: this shard is missing beside its siblings; download it")


def _read_index(path: Path, allowed: list[Path]) -> dict[str, str]:
    weight_map = _read_json(path, allowed).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f'{show(path)}: the index has no "weight_map" object with tensors; {_AGAIN}')
    good: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise RequestError(f"{show(path)}: the file of tensor {quote(name)} is not a string; {_AGAIN}")
        if shard in good:
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
                f"{show(path)}: tensor {quote(name)} is said to be in {quote(shard)}, which is no plain file name "
                f"inside the directory; {_AGAIN}, from a source you trust"
            )
        if not shard.endswith(".safetensors"):
            raise RequestError(
                f"{show(path)}: tensor {quote(name)} is said to be in {quote(shard)}, which is no safetensors file "
                "(pickles are never read); save the checkpoint as safetensors"
            )
        good.add(shard)
    return weight_map


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        problem = f"has the key {quote(error.args[0])} twice"
    except (RecursionError, MemoryError):
        problem = "is nested too deeply or too large"
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON (at character {error.pos})"
    except ValueError:
        problem = "is not valid JSON (it has an absurdly long number)"
    if problem is None and not isinstance(value, dict):
        problem = "is not a JSON object"
    if problem is not None:
        raise RequestError(f"{show(path)}: {what} {problem}; {_AGAIN}")
    assert isinstance(value, dict)
    return value


def _read_json(path: Path, allowed: list[Path]) -> dict[str, Any]:
    _check_inside(path, allowed)
    with _opened(path) as (descriptor, size):
        if size > HEADER_LIMIT:
            raise RequestError(f"{show(path)}: the file has {size} bytes, far too many for what it should be; {_AGAIN}")
        raw = bytearray(size)
        read_into(descriptor, memoryview(raw), 0, path)
    return _parse_json(raw, path, "the file")


def _read_header(path: Path, allowed: list[Path]) -> list[TensorInfo]:
    """Reads and checks the header of one file; the tensors come in the order of their offsets."""
    _check_inside(path, allowed)
    with _opened(path) as (descriptor, size):
        if size < 8:
            raise RequestError(f"{show(path)}: the file is truncated, it has only {size} bytes; {_AGAIN}")
        prefix = bytearray(8)
        read_into(descriptor, memoryview(prefix), 0, path)
        if prefix == b"version ":
            raise RequestError(f"{show(path)}: this is a Git LFS pointer instead of weights; run `git lfs pull`")
        length = int.from_bytes(prefix, "little")
        if length > HEADER_LIMIT or length > size - 8:
            limit = f"the file's {size}" if length > size - 8 else f"the limit of {HEADER_LIMIT}"
            raise RequestError(
                f"{show(path)}: the header claims {length} bytes, more than {limit}, so the file is truncated or not "
                f"safetensors; {_AGAIN}"
            )
        raw = bytearray(length)
        read_into(descriptor, memoryview(raw), 8, path)
    if raw[:1] != b"{":
        raise RequestError(f"{show(path)}: the header is not a JSON object; {_AGAIN}")
    header = _parse_json(raw, path, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RequestError(f"{show(path)}: the header's __metadata__ is not an object of strings; {_AGAIN}")
    start = 8 + length
    tensors = [_tensor_info(path, name, spec, start) for name, spec in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(path, tensors, start, size)
    return tensors


def _tensor_info(path: Path, name: str, spec: Any, start: int) -> TensorInfo:
    """Checks one entry of a header by itself; `start` is the position of the data in the file."""

    def refuse(problem: str) -> RequestError:
        return RequestError(f"{show(path)}: tensor {quote(name)} {problem}; {_AGAIN}")

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
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, nbytes)


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Refuses data that is not covered exactly once by the tensors, which must be sorted by offset."""
    end = start
    for info in tensors:
        if info.offset != end:
            problem = "overlaps another tensor" if info.offset < end else "leaves a gap before it"
            raise RequestError(f"{show(path)}: tensor {quote(info.name)} {problem} in the file; {_AGAIN}")
        end += info.nbytes
        if end > size:
            raise RequestError(
                f"{show(path)}: tensor {quote(info.name)} ends at byte {end} but the file has only {size}, "
                f"so it is truncated or its header is wrong; {_AGAIN}"
            )
    if end < size:
        raise RequestError(f"{show(path)}: the file has {size - end} bytes that belong to no tensor; {_AGAIN}")
