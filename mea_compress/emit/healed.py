"""The directory of a healed checkpoint: the student's, with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mea_compress.architectures import open_checkpoint
from mea_compress.architectures.families import MEA_PREFIX, find_family
from mea_compress.checkpoint import (
    CheckpointReader,
    Entry,
    NewTensor,
    TensorInfo,
    as_array,
    torch_dtype,
    write_shard,
)
from mea_compress.checkpoint.files import copy_tree, refusals, replacing_directory, write_json, write_text
from mea_compress.checkpoint.layout import lay_out
from mea_compress.emit.code import write_code
from mea_compress.emit.directory import versions
from mea_compress.errors import RequestError
from mea_compress.report.cards import healed_card
from mea_compress.report.plots import draw_healing, has_matplotlib

PICTURE = "healing.png"
"""The curve, beside the card."""


def names_in_model(student: CheckpointReader) -> dict[str, str]:
    """Return the name in the model of every stored tensor, another one in models for more than text."""
    with suppress(RequestError):  # of what is no checkpoint of a known family
        if find_family(student.config(), str(student.directory / "config.json")).multimodal_classes:
            model_name = open_checkpoint(student.directory).model_name
            return {name: model_name(name) for name in student.tensors}
    return {name: name for name in student.tensors}


def stored_dtypes(student: CheckpointReader, names: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Return the dtype of every stored tensor that torch can compute with, by its name in the model."""
    stored = {}
    for info in student.tensors.values():
        with suppress(KeyError):
            stored[names[info.name]] = torch_dtype(info.dtype)
    return stored


def _write_weights(
    student: CheckpointReader, directory: Path, names: Mapping[str, str], changed: Mapping[str, torch.Tensor]
) -> None:
    """Write the student's weight files again with some tensors replaced: same names, shards, dtypes and metadata.

    The index says the same of the new files and is not written again.
    """

    def entry(info: TensorInfo) -> Entry:
        tensor = changed.get(names[info.name])
        if tensor is None:
            return info
        return NewTensor(info.name, info.dtype, info.shape, lambda: as_array(tensor.to("cpu", torch_dtype(info.dtype))))

    for file in student.files:
        entries = [entry(info) for info in student.tensors.values() if info.file == file]
        write_shard(directory, lay_out(file.name, entries, student.metadata[file.name]))


def publish_healed(
    student: CheckpointReader,
    out: Path,
    names: Mapping[str, str],
    changed: Mapping[str, torch.Tensor],
    healing: Mapping[str, Any],
) -> None:
    """Write the student's directory with new weights and a ``healing.json``, complete or not at all.

    What its card says of healing is replaced, and the curve is drawn where matplotlib is installed.

    Args:
        student: The checkpoint.
        out: Where to; the student's own place, or one that is free.
        names: See `names_in_model`.
        changed: New values by their names in the model, on any device, rounded to the dtype in which they are stored.
        healing: What was done, plain data.

    Raises:
        RequestError: The disk is full or refuses, or the student cannot be read; what was at `out` is as it was.
    """
    with refusals(out), replacing_directory(out, student.directory, "healing") as work:
        copy_tree(student.directory, work, {file.name for file in student.files})
        _write_weights(student, work, names, changed)
        if str(student.config().get("model_type")).startswith(MEA_PREFIX):  # what was run is this release's code
            write_code(work)
        write_json(work / "healing.json", {**healing, "versions": versions()})
        card = work / "README.md"
        if card.is_file():
            write_text(card, healed_card(card.read_text(encoding="utf-8", errors="replace"), dict(healing)))
        (work / PICTURE).unlink(missing_ok=True)
        if has_matplotlib() and healing["curve"]:
            with refusals(work / PICTURE):
                draw_healing(dict(healing), work / PICTURE)


__all__ = ["PICTURE", "names_in_model", "publish_healed", "stored_dtypes"]
