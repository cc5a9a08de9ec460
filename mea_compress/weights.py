"""The weight files of a checkpoint: what does not change is copied as bytes, what was fitted takes its place.

Where the plan says beforehand which tensors a fit makes, the files are written by a thread of their own while layers
are fitted: most of the work is copying, which the system does, and needs neither Python nor PyTorch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from tqdm import tqdm

from mea_compress.architectures import Source
from mea_compress.architectures.source import FLOATS, SIDES, projection_info
from mea_compress.checkpoint import (
    CheckpointReader,
    Entry,
    NewTensor,
    Shard,
    plan_shards,
    read_tensor,
    shard_finished,
    shard_steps,
    write_index,
)
from mea_compress.checkpoint.reader import DTYPE_NAMES
from mea_compress.errors import RequestError
from mea_compress.plan import LayerPlan, Plan, stored_shapes
from mea_compress.recipe import Recipe
from mea_compress.workspace import Workspace

if TYPE_CHECKING:
    import torch

# Most files that are open while they wait for layers.
_MOST_STARTED = 16


def layer_directory(workspace: Workspace, layer: int) -> Path:
    """Where the tensors of a fitted layer are kept."""
    return workspace.work / f"layer-{layer:05d}"


def write_weights(source: Source, plan: Plan, recipe: Recipe, workspace: Workspace, progress: bool) -> None:
    """All shards, when every layer has been fitted: new attention tensors in the place of the old ones."""
    fitted: dict[int, Mapping[str, Entry]] = {}
    for layer in plan.layers:
        if layer.compressed:
            stored = CheckpointReader(layer_directory(workspace, layer.layer)).tensors.values()
            fitted[layer.layer] = {
                info.name: NewTensor(info.name, info.dtype, info.shape, partial(read_tensor, info)) for info in stored
            }
    entries = _entries(source, plan, fitted)
    if recipe.dtype is not None:
        entries = [_cast(entry, recipe.dtype) for entry in entries]
    write_shards(entries, recipe.shard_bytes, workspace, progress)


@contextmanager
def writing_beside(
    source: Source, plan: Plan, recipe: Recipe, workspace: Workspace, progress: bool
) -> Iterator[Callable[[int], None]]:
    """All shards, written by another thread while the block fits the layers; the block ends when both are through.

    An error or interruption of the fit ends the writing at once, and one of the writing the fit, with its layer.

    Yields:
        A function to be called with the number of every layer that the block has stored.
    """
    fit = _Fit()
    fitted: dict[int, Mapping[str, Entry]] = {}
    for layer in plan.layers:
        if layer.compressed:
            fitted[layer.layer] = _promised(source, layer, workspace, fit)
            if workspace.finished("layers", str(layer.layer)) is not None:
                fit.stored[layer.layer].set_result(None)
    entries = _entries(source, plan, fitted)
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
        try:
            writer = pool.submit(write_shards, entries, recipe.shard_bytes, workspace, progress, fit)

            def stored(layer: int) -> None:
                fit.stored[layer].set_result(None)
                if writer.done():  # with an error, or because this was the last layer
                    writer.result()

            yield stored
            writer.result()
        except BaseException:
            fit.given_up.set()
            for waiting in fit.stored.values():
                waiting.cancel()
            raise


class _GivenUpError(Exception):
    """Ends the thread that writes when there is nothing to wait for any more; nobody sees it."""


@dataclass
class _Fit:
    """What a thread that writes knows of the fit beside it.

    Attributes:
        stored: For each layer, done when its tensors have been stored.
        given_up: Set when the fit has failed or was interrupted.
    """

    stored: dict[int, Future[None]] = field(default_factory=dict)
    given_up: Event = field(default_factory=Event)

    def check(self) -> None:
        """Ends the thread that calls it where the fit has ended early."""
        if self.given_up.is_set():
            raise _GivenUpError


@dataclass(frozen=True)
class _Promise:
    """Makes a tensor of a layer as soon as that has been stored."""

    directory: Path
    name: str
    stored: Future[None]

    def __call__(self) -> torch.Tensor:
        self.stored.result()
        return CheckpointReader(self.directory).read(self.name)


def _promised(source: Source, layer: LayerPlan, workspace: Workspace, fit: _Fit) -> dict[str, Entry]:
    """The tensors that the fit of a layer will make, by their names below ``self_attn.``."""
    stored = fit.stored[layer.layer] = Future()
    directory = layer_directory(workspace, layer.layer)
    return {
        name: NewTensor(name, source.dtype, shape, _Promise(directory, name, stored))
        for name, shape in stored_shapes(source, layer).items()
    }


def _ready(shard: Shard) -> bool:
    """Whether nothing that a shard holds has still to be waited for."""
    made = [entry.produce for entry in shard.entries if isinstance(entry, NewTensor)]
    return all(produce.stored.done() for produce in made if isinstance(produce, _Promise))


def write_shards(
    entries: Sequence[Entry], shard_bytes: int, workspace: Workspace, progress: bool, fit: _Fit | None = None
) -> None:
    """Writes all weights of the checkpoint, with a bar; files that an interrupted run has finished stay as they are.

    Args:
        entries: The tensors, in order.
        shard_bytes: Largest sum of tensor bytes in one file.
        workspace: Where to, and what is finished.
        progress: Show a progress bar on stderr.
        fit: The fit that goes on beside, if any; what it makes is waited for last.
    """
    shards = plan_shards(entries, shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    started: deque[tuple[Shard, Generator[None, None, None]]] = deque()
    with tqdm(desc="writing weights", total=total, unit="B", unit_scale=True, disable=not progress) as bar:

        def tell(count: int) -> None:
            if fit is not None:
                fit.check()
            bar.update(count)

        def finish() -> None:
            shard, steps = started[0]
            next(steps, None)
            workspace.record("shards", shard.name, True)
            started.popleft()

        try:
            for shard in shards:
                if shard_finished(workspace.path, shard) and workspace.finished("shards", shard.name):
                    bar.update(shard.nbytes)
                    continue
                started.append((shard, shard_steps(workspace.path, shard, tell)))
                next(started[-1][1])
                while started and (len(started) == _MOST_STARTED or _ready(started[0][0])):
                    finish()
            while started:
                finish()
        finally:
            for _, steps in started:
                steps.close()
    write_index(workspace.path, shards)


def _entries(source: Source, plan: Plan, fitted: Mapping[int, Mapping[str, Entry]]) -> list[Entry]:
    """All tensors of the checkpoint in order, what a layer gets new in the place of the first that gives way.

    Args:
        source: The checkpoint.
        plan: What happens to every layer.
        fitted: For each composed layer, its new tensors by their names below ``self_attn.``.
    """
    family = source.family
    old: dict[str, list[str]] = {}  # names below each layer's attention
    for name in source.reader.tensors:
        before, stem, own = name.partition("self_attn.")
        if stem:
            old.setdefault(before + stem, []).append(own)
    gone: set[str] = set()
    new: dict[str, list[Entry]] = {}
    for layer in plan.layers:
        prefix, dropped = family.attention(layer.layer), set()
        made: dict[str, Entry] = {}
        if family.fused and not source.native:
            made = {f"{side[0]}_proj.weight": projection_info(source, layer.layer, side) for side in SIDES}
            dropped = {f"{family.fused}.weight"}
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


def _cast(info: Entry, dtype: str) -> Entry:
    if info.dtype not in FLOATS or info.dtype == DTYPE_NAMES[dtype] or isinstance(info, NewTensor):
        return info

    def produce() -> torch.Tensor:
        import torch

        tensor = read_tensor(info)
        cast = tensor.to(getattr(torch, dtype))
        if not torch.equal(cast.isfinite(), tensor.isfinite()):
            raise RequestError(f"{info.file}: tensor {info.name} has numbers too large for {dtype}; choose bfloat16")
        return cast

    return NewTensor(info.name, DTYPE_NAMES[dtype], info.shape, produce)
