"""Lazy reader of safetensors checkpoints: headers only, until a tensor is asked for.

Nothing in a checkpoint is trusted (see `mea_compress.checkpoint.untrusted`). Files are only ever opened for reading,
and tensors are read into fresh buffers instead of being mapped, so that the resident memory is that of the tensors in
use.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.checkpoint.dtypes import array_dtype, as_tensor
from mea_compress.checkpoint.layout import INDEX_NAME, SINGLE_NAME, TensorInfo
from mea_compress.checkpoint.untrusted import (
    DOWNLOAD_AGAIN,
    allowed_folders,
    check_cover,
    check_entry,
    check_inside,
    check_regular,
    check_weight_map,
    list_names,
    opened,
    printable_name,
    printable_path,
    read_header,
    read_into,
    read_json,
)
from mea_compress.errors import RequestError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

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


class CheckpointReader:
    """A directory of safetensors weights, checked when it is opened and read one tensor at a time.

    Reads `model.safetensors.index.json` and the shards it names, or `model.safetensors`, or where there is neither
    every `*.safetensors` file of the directory, provided that no tensor comes twice.

    Attributes:
        directory: The directory as it was given.
        files: Weight files, sorted by name.
        tensors: Every tensor by name, ordered by file name, then by offset.
        metadata: For each file's name, the `__metadata__` of its header.
    """

    directory: Path
    files: list[Path]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, Mapping[str, str]]

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Read and check the headers and the index.

        Args:
            directory: A checkpoint in Hugging Face layout.

        Raises:
            RequestError: The path is no directory, holds no safetensors weights, or its index or a header is damaged
                or lies; the sentence names the file and the remedy.
        """
        self.directory = Path(directory)
        self._allowed = allowed_folders(self.directory)
        names, weight_map = _find_weights(self.directory, self._allowed)
        self.files = [self.directory / name for name in names]
        self.tensors = {}
        self.metadata = {}
        for file in self.files:
            tensors, self.metadata[file.name] = _read_header(file, self._allowed)
            for info in tensors:
                first = self.tensors.setdefault(info.name, info)
                if first is not info:
                    raise RequestError(
                        f"{printable_path(self.directory)}: tensor {printable_name(info.name)} is in "
                        f"{printable_path(first.file.name)} and again in {printable_path(file.name)}; "
                        "remove the file that does not belong to the checkpoint or save it again"
                    )
        if weight_map is not None:
            self._check_index(weight_map)
        if not self.tensors:
            raise RequestError(
                f"{printable_path(self.directory)}: the safetensors files hold no tensors; {DOWNLOAD_AGAIN}"
            )

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = printable_path(self.directory / INDEX_NAME)
        for name, shard in weight_map.items():
            info = self.tensors.get(name)
            if info is None or info.file.name != shard:
                raise RequestError(
                    f"{index}: tensor {printable_name(name)} is not in {printable_path(shard)} as the index says; "
                    "download the index and the shards again, from one revision"
                )
        if len(self.tensors) > len(weight_map):
            name = next(name for name in self.tensors if name not in weight_map)
            raise RequestError(
                f"{index}: tensor {printable_name(name)} of {printable_path(self.tensors[name].file.name)} is missing "
                "from the index; download the index and the shards again, from one revision"
            )

    def has(self, name: str) -> bool:
        """Return whether the checkpoint holds a tensor of this name."""
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of one tensor.

        Raises:
            RequestError: There is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise RequestError(
                f"{printable_path(self.directory)}: the weights have no tensor {printable_name(name)}; "
                "check that config.json belongs to these weights and that the download is complete"
            )
        return info

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its own dtype, in memory of its own.

        Raises:
            RequestError: There is no such tensor, or as `read_tensor`.
        """
        info = self.info(name)
        return _computable(self.read_part(info), info)

    def read_array(self, name: str) -> NDArray[Any]:
        """Return one tensor as a NumPy array.

        Raises:
            RequestError: There is no such tensor, or as `read_array`.
        """
        return self.read_part(self.info(name))

    def read_part(self, info: TensorInfo) -> NDArray[Any]:
        """Return a tensor, or some of its rows, as a NumPy array.

        Args:
            info: Where it lies: one of `tensors`, or a range of rows of it.

        Raises:
            RequestError: As `read_array`.
        """
        return read_array(info)

    @property
    def model_names(self) -> list[str]:
        """Names of the tensors that the model itself has."""
        return list(self.tensors)

    def is_scale(self, name: str) -> bool:
        """Return whether a tensor only scales another of the model."""
        return False

    def dtype_of(self, name: str) -> str:
        """Return the safetensors name of the dtype that a tensor is read as.

        Raises:
            RequestError: There is no such tensor.
        """
        return self.info(name).dtype

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` (exclusive) of a tensor of shape (N, ...), of shape (stop - start, ...).

        Raises:
            RequestError: As `read`.
            ValueError: Unless 0 <= start <= stop <= N.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {name} with shape {info.shape}")
        row = info.nbytes // max(1, info.shape[0])
        shape = (stop - start, *info.shape[1:])
        part = TensorInfo(name, info.dtype, shape, info.file, info.offset + start * row, (stop - start) * row)
        return _computable(self.read_part(part), part)

    def config(self) -> dict[str, Any]:
        """Return the parsed `config.json`.

        Raises:
            RequestError: It is missing, unreadable, or not one JSON object.
        """
        path = self.directory / "config.json"
        if not os.path.lexists(path):
            raise RequestError(
                f"{printable_path(path)}: the file is missing; give the directory of a whole Hugging Face checkpoint, "
                "with its config.json"
            )
        return read_json(path, self._allowed)

    def check_generation_config(self) -> None:
        """Check that `generation_config.json`, where there is one, can be used.

        Raises:
            RequestError: It is unreadable, or not one JSON object.
        """
        path = self.directory / "generation_config.json"
        if os.path.lexists(path):
            read_json(path, self._allowed)

    def other_files(self) -> list[Path]:
        """Return the paths of all that is not weights: tokenizer, chat template, generation config, code, licence, ...

        Weights of every format and their indices are left out, and so are the top-level `config.json`, hidden folders
        and `__pycache__`.

        Returns:
            Paths relative to the directory, sorted. They may be links (to be followed when copied).

        Raises:
            RequestError: There is a link that leaves the directory or something that is not a regular file.
        """
        others: list[Path] = []
        folders = [""]
        while folders:
            folder = folders.pop()
            for name in list_names(self.directory / folder):
                relative = os.path.join(folder, name)
                path = self.directory / relative
                if os.path.isdir(path) and (name.startswith(".") or name == "__pycache__"):
                    continue
                if os.path.isdir(path) and not os.path.islink(path):
                    folders.append(relative)
                elif relative != "config.json" and not _is_weights(name):
                    check_inside(path, self._allowed)
                    check_regular(path)
                    others.append(Path(relative))
        return sorted(others)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read one tensor, in its own dtype, into memory of its own.

    Raises:
        RequestError: As `read_array`, or torch has no such dtype.
    """
    return _computable(read_array(info), info)


def _computable(array: NDArray[Any], info: TensorInfo) -> torch.Tensor:
    """Return what was read as a torch tensor.

    Raises:
        RequestError: Torch has no such dtype.
    """
    try:
        return as_tensor(array)
    except KeyError:
        raise _not_computed(info) from None


def read_array(info: TensorInfo) -> NDArray[Any]:
    """Read one tensor, in its own dtype, into memory of its own.

    Raises:
        RequestError: The dtype is none to compute with, the file cannot be read or has shrunk, or there is too
            little memory.
    """
    import numpy as np

    try:
        dtype = array_dtype(info.dtype)
    except KeyError:
        raise _not_computed(info) from None
    if sys.byteorder != "little":
        raise RequestError(
            f"{printable_path(info.file)}: reading weights needs a little-endian machine; use another one"
        )
    try:
        array = np.empty(info.shape, dtype)
    except (ValueError, MemoryError):
        raise RequestError(
            f"{printable_path(info.file)}: tensor {printable_name(info.name)} needs {info.nbytes} bytes of memory, "
            "more than there is; use a machine with more memory"
        ) from None
    if info.nbytes:
        with opened(info.file) as (descriptor, _):
            read_into(descriptor, array.reshape(-1).view(np.uint8).data, info.offset, info.file)
    return array


def _not_computed(info: TensorInfo) -> RequestError:
    return RequestError(
        f"{printable_path(info.file)}: tensor {printable_name(info.name)} has dtype {info.dtype}, which can be copied "
        "but not computed with; convert the checkpoint to bfloat16 first"
    )


def _is_weights(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(_WEIGHTS) or _WEIGHT_INDEX.search(lower) is not None


def _find_weights(directory: Path, allowed: list[Path]) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the weight files, sorted, and the index's weight map where there is an index."""
    names = list_names(directory)
    files = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if INDEX_NAME in names:
        index = directory / INDEX_NAME
        weight_map = check_weight_map(index, read_json(index, allowed).get("weight_map"))
        shards = sorted(set(weight_map.values()))
        if SINGLE_NAME in files and SINGLE_NAME not in shards:
            raise RequestError(
                f"{printable_path(directory)}: holds both {SINGLE_NAME} and {INDEX_NAME}; "
                "remove the one that is not meant"
            )
        missing = next((shard for shard in shards if shard not in names), None)
        if missing is not None:
            raise RequestError(
                f"{printable_path(directory / missing)}: the index names this file but it is missing; download it"
            )
        return shards, weight_map
    if SINGLE_NAME in files:
        return [SINGLE_NAME], None
    if files:
        _check_numbering(directory, files)
        return files, None
    if any(name.lower().endswith(_PICKLES) for name in names):
        raise RequestError(
            f"{printable_path(directory)}: has only pickled weights (*.bin, *.pt, *.pth), which are never read because "
            "they can run code; convert them with a version of transformers that reads them, by "
            "save_pretrained(directory, safe_serialization=True)"
        )
    raise RequestError(
        f"{printable_path(directory)}: has no *.safetensors weights; "
        "give the directory of a checkpoint saved as safetensors"
    )


def _check_numbering(directory: Path, files: list[str]) -> None:
    """Refuse an incomplete download of numbered shards that came without their index."""
    series: dict[tuple[str, int], set[int]] = {}
    for name in files:
        if match := _SHARD_NAME.fullmatch(name):
            series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in series.items():
        absent = next((number for number in range(1, count + 1) if number not in numbers), None)
        if absent is not None:
            name = f"{stem}-{absent:05d}-of-{count:05d}.safetensors"
            raise RequestError(
                f"{printable_path(directory / name)}: this shard is missing among its siblings; download it"
            )


def _read_header(path: Path, allowed: list[Path]) -> tuple[list[TensorInfo], dict[str, str]]:
    """Return the tensors of one file in the order of their offsets, checked, and the metadata of its header."""
    specs, metadata, start, size = read_header(path, allowed)
    tensors = []
    for name, spec in specs.items():
        dtype, shape, begin, end = check_entry(path, name, spec)
        tensors.append(TensorInfo(name, dtype, shape, path, start + begin, end - begin))
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    check_cover(path, tensors, start, size)
    return tensors, metadata


__all__ = ["CheckpointReader", "TensorInfo", "read_array", "read_tensor"]
