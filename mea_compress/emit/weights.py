"""The weight files of a checkpoint: what does not change is copied as bytes, what was fitted takes its place.

Where the plan says beforehand which tensors a fit makes, the files are written by threads of their own while layers
are fitted: most of the work is copying, which the system does, and waiting for the disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mea_compress.architectures.checkpoint import FLOATS, SIDES, kept_in_float32, projection_info
from mea_compress.checkpoint import (
    CheckpointReader,
    Entry,
    NewTensor,
    Shard,
    TensorInfo,
    array_dtype,
    plan_shards,
    read_array,
    shard_finished,
    write_index,
    write_shard,
)
from mea_compress.checkpoint.dtypes import DTYPE_NAMES
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.errors import RequestError, VerificationError
from mea_compress.planning.sizes import stored_shapes
from mea_compress.planning.types import LayerPlan, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One is copied while the disk is waited for at the end of another.
_FILES_AT_ONCE = 2


def layer_directory(workspace: Workspace, layer: int) -> Path:
    """Where the tensors of a fitted layer are kept, those that distillation made of them once it is through."""
    healing = workspace.result_of("healing", "healing")
    return workspace.work / f"{'healed' if healing and healing['kept'] == 'healed' else 'layer'}-{layer:05d}"


def write_weights(plan: Plan, workspace: Workspace, progress: bool) -> None:
    """Write all shards when every layer has been fitted: new attention tensors in the place of the old ones."""
    fitted: dict[int, Mapping[str, Entry]] = {}
    for layer in plan.layers:
        if layer.compressed:
            stored = CheckpointReader(layer_directory(workspace, layer.layer)).tensors.values()
            fitted[layer.layer] = {
                info.name: NewTensor(info.name, info.dtype, info.shape, partial(read_array, info)) for info in stored
            }
    entries, dtype = _entries(plan, fitted), plan.recipe.dtype
    if dtype is not None:
        kept = kept_in_float32(plan.source, dtype)
        scales = plan.source.reader.tensors.keys() - set(plan.source.reader.model_names)
        entries = [entry if entry.name in scales else _cast(entry, dtype, kept) for entry in entries]
    # Tensors of any size are made where all are cast: one of them in memory at a time.
    write_shards(entries, plan.recipe.shard_bytes, workspace, progress, 1 if dtype is not None else _FILES_AT_ONCE)


@contextmanager
def writing_concurrently(plan: Plan, workspace: Workspace, progress: bool) -> Iterator[Callable[[int], None]]:
    """Write all shards in threads while the block fits the layers; the block ends when both are through.

    An error or interruption of the fit ends the writing at once, and one of the writing the fit, with its layer.

    Yields:
        A function to be called with the number of every layer that the block has stored.
    """
    fit = _Fit()
    fitted: dict[int, Mapping[str, Entry]] = {}
    for layer in plan.layers:
        if layer.compressed:
            fitted[layer.layer] = _deferred_tensors(plan, layer, workspace, fit)
            if workspace.result_of("layers", str(layer.layer)) is not None:
                fit.stored[layer.layer].set()
    entries = _entries(plan, fitted)
    with _writing(entries, plan.recipe.shard_bytes, workspace, progress, fit) as files:

        def stored(layer: int) -> None:
            fit.stored[layer].set()
            for file in files:
                if file.done():  # perhaps with an error
                    file.result()

        yield stored


def check_written(plan: Plan, workspace: Workspace) -> None:
    """Check that attention tensors of the checkpoint are, bit for bit, those that were fitted.

    Raises:
        VerificationError: One is not.
    """
    written = CheckpointReader(workspace.path)
    for layer in plan.layers:
        if not layer.compressed:
            continue
        fitted = CheckpointReader(layer_directory(workspace, layer.layer))
        for name in fitted.tensors:
            found = written.read_array(plan.source.attention_tensor(layer.layer, name))
            if found.tobytes() != fitted.read_array(name).tobytes():
                raise VerificationError(f"layer {layer.layer}: {name} was not written as it was fitted; check the disk")


class _Cancelled(Exception):
    """Ends a thread that writes when there is nothing to wait for any more."""


@dataclass
class _Fit:
    """What a thread that writes knows of the fit beside it.

    Attributes:
        stored: For each layer, set when its tensors have been stored.
        given_up: Set when the fit has failed or was interrupted.
    """

    stored: dict[int, Event] = field(default_factory=dict)
    given_up: Event = field(default_factory=Event)

    def check(self) -> None:
        """End the thread that calls it where the fit has ended early."""
        if self.given_up.is_set():
            raise _Cancelled


@dataclass(frozen=True)
class _DeferredTensor:
    """Reads a tensor of a layer as soon as that has been stored."""

    directory: Path
    name: str
    stored: Event
    fit: _Fit

    def __call__(self) -> NDArray[Any]:
        while not self.stored.wait(0.1):
            self.fit.check()
        return CheckpointReader(self.directory).read_array(self.name)


def _deferred_tensors(plan: Plan, layer: LayerPlan, workspace: Workspace, fit: _Fit) -> dict[str, Entry]:
    """Return the tensors that the fit of a layer will make, by their names below ``self_attn.``."""
    stored = fit.stored[layer.layer] = Event()
    directory = layer_directory(workspace, layer.layer)
    return {
        name: NewTensor(name, plan.source.dtype, shape, _DeferredTensor(directory, name, stored, fit))
        for name, shape in stored_shapes(plan.source, layer.layer, layer.spec).items()
    }


def write_shards(
    entries: Sequence[Entry], shard_bytes: int, workspace: Workspace, progress: bool, at_once: int = _FILES_AT_ONCE
) -> None:
    """Write all weights of the checkpoint, with a bar; files that an interrupted run has finished stay as they are.

    Args:
        entries: The tensors, in order.
        shard_bytes: Largest sum of tensor bytes in one file.
        workspace: Where to, and what is finished.
        progress: Show a progress bar on stderr.
        at_once: Files that are written at a time, with a tensor that is made in memory for each.
    """
    with _writing(entries, shard_bytes, workspace, progress, _Fit(), at_once):
        pass


@contextmanager
def _writing(
    entries: Sequence[Entry],
    shard_bytes: int,
    workspace: Workspace,
    progress: bool,
    fit: _Fit,
    at_once: int = _FILES_AT_ONCE,
) -> Iterator[list[Future[None]]]:
    """Write shards in a thread pool while the block runs; tensors still to be fitted are written last in each shard.

    Yields:
        What becomes of every file.
    """
    shards = plan_shards(entries, shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    telling = Lock()
    with (
        tqdm(desc="writing weights", total=total, unit="B", unit_scale=True, disable=not progress) as bar,
        ThreadPoolExecutor(at_once, thread_name_prefix="weights") as pool,
    ):

        def tell(count: int) -> None:
            fit.check()
            with telling:
                bar.update(count)

        def write(shard: Shard) -> None:
            if shard_finished(workspace.path, shard) and workspace.result_of("shards", shard.name):
                tell(shard.nbytes)
                return
            write_shard(workspace.path, shard, tell)
            workspace.commit("shards", shard.name, True)

        files: list[Future[None]] = []
        try:
            for shard in shards:
                files.append(pool.submit(write, shard))
            yield files
            for file in files:
                file.result()
        except BaseException:
            fit.given_up.set()  # ends them all, whatever comes in between
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_index(workspace.path, shards)


def _entries(plan: Plan, fitted: Mapping[int, Mapping[str, Entry]]) -> list[Entry]:
    """Return all tensors of the checkpoint in order, a layer's new ones in the place of the first that gives way.

    Args:
        plan: What happens to every layer.
        fitted: For each composed layer, its new tensors by their names below ``self_attn.``.
    """
    source, family = plan.source, plan.source.family
    if source.at_cache:
        return _entries_at_cache(plan, fitted)
    old: dict[str, list[str]] = {}  # names below each layer's attention
    for name in source.reader.tensors:
        before, stem, own = name.partition("self_attn.")
        if stem:
            old.setdefault(before + stem, []).append(own)
    gone: set[str] = set()
    new: dict[str, list[Entry]] = {}
    for layer in plan.layers:
        prefix = family.attention(layer.layer)
        made: dict[str, Entry] = {}
        dropped: set[str] = set()
        if source.quantised:
            made, dropped = _dequantised(plan, prefix, old[prefix])
        if family.fused and not source.native:
            parts = {f"{side[0]}_proj.weight": projection_info(source, layer.layer, side) for side in SIDES}
            made |= {own: _in_full(plan, info) for own, info in parts.items()}
            made.pop(f"{family.fused}.weight", None)
            dropped.add(f"{family.fused}.weight")
        if layer.compressed:
            made |= fitted[layer.layer]
            stems = ("k_proj.", "v_proj.", "key_composition.", "value_composition.")
            dropped |= {own for own in old[prefix] if own.startswith(stems) or own in made}
        if made:
            first = next(own for own in old[prefix] if own in dropped)
            new[prefix + first] = [replace(entry, name=prefix + own) for own, entry in sorted(made.items())]
            gone |= {prefix + own for own in dropped}
    entries: list[Entry] = []
    for info in source.reader.tensors.values():
        entries += new.get(info.name, [] if info.name in gone else [info])
    return entries


def _dequantised(plan: Plan, prefix: str, names: Sequence[str]) -> tuple[dict[str, Entry], set[str]]:
    """Return a layer's attention weights that are stored in fp8 as they are stored now, and all names that give way.

    Args:
        plan: What happens to every layer.
        prefix: Of the tensors of its attention.
        names: Those tensors, without it.
    """
    reader = plan.source.reader
    kept = [own for own in reader.model_names if own.startswith(prefix)]
    made = {
        name.removeprefix(prefix): _in_full(plan, reader.info(name))
        for name in kept
        if reader.dtype_of(name) != reader.info(name).dtype
    }
    return made, made.keys() | {own for own in names if prefix + own not in kept}


def _in_full(plan: Plan, info: TensorInfo) -> Entry:
    """Return a tensor, or some rows of it, to be stored as it is, or where it is in fp8 as what it stands for."""
    reader = plan.source.reader
    if reader.dtype_of(info.name) == info.dtype:
        return info
    dtype = plan.decisions.stored_dtype
    return NewTensor(info.name, dtype, info.shape, lambda: reader.read_part(info).astype(array_dtype(dtype)))


def _entries_at_cache(plan: Plan, fitted: Mapping[int, Mapping[str, Entry]]) -> list[Entry]:
    """Return all tensors of a checkpoint whose attention stays a block of its family, each layer's new ones behind it.

    Weights of the block itself that were fitted again take the place of what they were.
    """
    source, entries = plan.source, dict[str, Entry](plan.source.reader.tensors)
    order = list(entries)
    for layer, tensors in fitted.items():
        made = {source.attention_tensor(layer, name): tensors[name] for name in sorted(tensors)}
        prefix = source.stored_name(source.attention(layer))
        own = [place for place, name in enumerate(order) if name.startswith(prefix)]
        place = own[-1] + 1 if own else len(order)
        order[place:place] = [name for name in made if name not in entries]
        entries |= {name: replace(entry, name=name) for name, entry in made.items()}
    return [entries[name] for name in order]


def _cast(info: Entry, dtype: str, kept: re.Pattern[str] | None = None) -> Entry:
    """Return a tensor in another dtype, unless transformers keeps it in float32."""
    if kept is not None and kept.search(info.name):
        return info
    if info.dtype not in FLOATS or info.dtype == DTYPE_NAMES[dtype] or isinstance(info, NewTensor):
        return info

    def produce() -> NDArray[Any]:
        import numpy as np

        array = read_array(info)
        with np.errstate(over="ignore"):
            cast = array.astype(array_dtype(DTYPE_NAMES[dtype]))
        if not np.array_equal(np.isfinite(cast), np.isfinite(array)):
            raise RequestError(f"{info.file}: tensor {info.name} has numbers too large for {dtype}; choose bfloat16")
        return cast

    return NewTensor(info.name, DTYPE_NAMES[dtype], info.shape, produce)
