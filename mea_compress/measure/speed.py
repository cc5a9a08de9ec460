"""What running a checkpoint takes: prefill, decoding, cache and memory, against context and batch, beside its original.

Every model of a line takes turns with the others, round after round, on the same tokens; what counts are the ratios.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mea_compress.checkpoint.system import release
from mea_compress.decoding import run_cached
from mea_compress.errors import RequestError
from mea_compress.modeling.section_mea import side_form
from mea_compress.text import context_length

_ROUNDS = 3
_DECODED_TOKENS = 16
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """One model at one context and batch; times are medians over rounds, memory is the most of them.

    Attributes:
        model: ``checkpoint``, ``checkpoint, expanded`` (composed heads are built at every step) or ``reference``.
        context: tokens of a sequence that are cached in the end.
        batch: sequences.
        prefill_seconds: of all tokens but the last few.
        decode_milliseconds: of one step, which decodes one token of every sequence.
        cache_bytes: of all tensors of the cache in the end.
        peak_bytes: memory at its peak above that of the loaded models; None where the system does not tell.
    """

    model: str
    context: int
    batch: int
    prefill_seconds: float
    decode_milliseconds: float
    cache_bytes: int
    peak_bytes: int | None


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor reachable from a cache through attributes, lists, tuples and dictionaries, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from _tensors(vars(value), seen)


def cache_bytes(cache: Any) -> int:
    """Bytes that a filled cache keeps alive: the storages of all its tensors, each storage once.

    Counters (tensors of fewer than two dimensions) do not count. A view counts as much as the storage behind it.
    """
    storages = {}
    for tensor in _tensors(cache, set()):
        if tensor.ndim >= 2:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def check_contexts(models: dict[str, Any], contexts: Sequence[int]) -> None:
    """Refuses what cannot be measured, before any work.

    Raises:
        RequestError: a context is too short to decode in, or longer than a model's.
    """
    for context in contexts:
        longest = min((limit for limit in map(context_length, models.values()) if limit), default=context)
        if not 2 <= context <= longest:
            raise RequestError(
                f"--contexts {context} cannot be measured: give contexts between 2 and the model's {longest}."
            )


@torch.no_grad()
def measure_speed(
    models: dict[str, Any],
    ids: torch.Tensor,
    contexts: Sequence[int],
    batches: Sequence[int],
    progress: bool = True,
) -> list[Timing]:
    """Measures models at every context and batch.

    Args:
        models: causal language models by name, on one device; ``checkpoint`` is also measured with expanded heads
            where it is an MEA model that could be read without.
        ids: int64 (T,), tokens of real text; repeated as often as needed.
        contexts: cached tokens of a sequence.
        batches: numbers of sequences.
        progress: show a bar on stderr.

    Raises:
        RequestError: as `check_contexts`.
    """
    check_contexts(models, contexts)
    variants: list[tuple[str, Any, str | None]] = [(name, model, None) for name, model in models.items()]
    mea = getattr(models["checkpoint"].config, "mea", None)
    if mea and not all(side_form(layer, side).plain for layer in mea["layers"] for side in ("key", "value")):
        variants.insert(1, ("checkpoint, expanded", models["checkpoint"], "expand"))
    timings = []
    total = len(contexts) * len(batches) * len(variants) * _ROUNDS
    with tqdm(total=total, desc="timing", unit="run", disable=not progress, file=sys.stderr) as bar:
        for context in contexts:
            for batch in batches:
                rows = ids.repeat(-(-context // len(ids)))[:context].expand(batch, -1)
                runs: dict[str, list[tuple[float, float, int, int | None]]] = {}
                for _ in range(_ROUNDS):
                    for name, model, decode in variants:
                        with _reading(model, decode):
                            runs.setdefault(name, []).append(_run(model, rows))
                        bar.update()
                for name, found in runs.items():
                    prefill, step, cached, peaks = zip(*found, strict=True)
                    peak = None if None in peaks else max(peaks)
                    medians = statistics.median(prefill), statistics.median(step) * 1000
                    timings.append(Timing(name, context, batch, *medians, cached[0], peak))
    return timings


def _run(model: Any, rows: torch.Tensor) -> tuple[float, float, int, int | None]:
    """Seconds of prefill and of one decoding step, bytes of the cache, bytes at the peak."""
    device = next(model.parameters()).device
    rows = rows.to(device)
    decoded = min(_DECODED_TOKENS, rows.shape[1] // 2)
    release()
    with _peak(device) as peak:
        began = _now(device)
        _, cache = run_cached(model, rows[:, :-decoded], logits_to_keep=1)
        prefill = _now(device) - began
        steps = []
        for column in range(rows.shape[1] - decoded, rows.shape[1]):
            began = _now(device)
            token = rows[:, column : column + 1]
            _, cache = run_cached(model, token, cache)
            steps.append(_now(device) - began)
    return prefill, statistics.median(steps), cache_bytes(cache), peak[0] if peak else None


@contextlib.contextmanager
def _reading(model: Any, decode: str | None) -> Iterator[None]:
    """Lets a model read its cache in another way for a while; see ``decode`` in the ``mea`` section."""
    if decode is None:
        yield
        return
    before = model.config.mea
    model.config.mea = {**before, "decode": decode}
    try:
        yield
    finally:
        model.config.mea = before


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """A list that holds, after the block, the bytes at its peak above those before; empty where nobody tells."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    told = device.type == "cpu" and _STATUS.is_file()
    if told:
        try:
            _REFERENCES.write_text("5")  # Linux: the high-water mark starts anew
        except OSError:
            told = False
    before = _resident("VmRSS") if told else 0
    yield found
    if told:
        found.append(max(0, _resident("VmHWM") - before))


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


__all__ = ["Timing", "cache_bytes", "measure_speed"]
