"""What running a checkpoint takes: prefill, decoding, cache and memory, by context and batch, and beside its original.

Models are timed in turns, round after round, on the same tokens: their ratios are what counts.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm

from mea_compress.checkpoint.system import trim_heap
from mea_compress.decoding import run_cached
from mea_compress.errors import RequestError
from mea_compress.loading import shared_context
from mea_compress.measure.cache import cache_bytes
from mea_compress.modeling.section_mea import side_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDS = 3
_DECODED_TOKENS = 16
WARM_UP_TOKENS = 4
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """One model at one context and batch; times are medians over rounds, memory is their maximum.

    Attributes:
        model: ``checkpoint``, ``checkpoint, expanded`` (reconstructed heads are built at every step) or ``reference``.
        context: Cached tokens of a sequence in the end.
        batch: Sequences.
        prefill_seconds: For all tokens but the last few.
        decode_milliseconds: For one step, which decodes one token of every sequence.
        cache_bytes: Of all tensors of the cache in the end.
        peak_bytes: Peak memory above that of the loaded models; None where the platform has no counter.
    """

    model: str
    context: int
    batch: int
    prefill_seconds: float
    decode_milliseconds: float
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class _Run:
    """One prefill and the decode steps after it."""

    prefill_seconds: float
    step_seconds: float
    cache_bytes: int
    peak_bytes: int | None


def check_contexts(longest: int | None, contexts: Sequence[int]) -> None:
    """Check, before any work, that every context can be measured.

    Args:
        longest: The models' own, None where they do not say.
        contexts: Numbers of cached tokens.

    Raises:
        RequestError: A context is too short to decode in, or longer than the models'.
    """
    for context in contexts:
        if not 2 <= context <= (longest or context):
            raise RequestError(
                f"`contexts` {context} cannot be measured: give contexts between 2 and the model's {longest or context}"
            )


@torch.no_grad()
def measure_speed(
    models: Mapping[str, PreTrainedModel],
    ids: torch.Tensor,
    contexts: Sequence[int],
    batches: Sequence[int] = (1,),
    progress: bool = True,
) -> list[Timing]:
    """Measure models at every context and batch.

    Args:
        models: Causal language models by name, on one device; ``checkpoint`` is also measured with expanded heads
            where it is an MEA model that could be read without.
        ids: (T,), int64, tokens of real text; repeated as often as needed.
        contexts: Cached tokens of a sequence.
        batches: Numbers of sequences.
        progress: Show a bar on stderr.

    Raises:
        RequestError: As `check_contexts`.
    """
    check_contexts(shared_context(models.values()), contexts)
    variants: list[tuple[str, PreTrainedModel, Literal["expand"] | None]] = [
        (name, model, None) for name, model in models.items()
    ]
    mea = getattr(models["checkpoint"].config, "mea", None)
    if mea and not all(side_form(layer, side).plain for layer in mea["layers"] for side in ("key", "value")):
        variants.insert(1, ("checkpoint, expanded", models["checkpoint"], "expand"))
    timings = []
    total = len(contexts) * len(batches) * len(variants) * _ROUNDS
    with tqdm(total=total, desc="timing", unit="run", disable=not progress, file=sys.stderr) as bar:
        for context in contexts:
            for batch in batches:
                rows = ids.repeat(-(-context // len(ids)))[:context].expand(batch, -1)
                runs: dict[str, list[_Run]] = {name: [] for name, _, _ in variants}
                for _ in range(_ROUNDS):
                    for name, model, mode in variants:
                        with _decode_mode(model, mode):
                            runs[name].append(_run(model, rows))
                        bar.update()
                timings += [_summary(name, context, batch, rounds) for name, rounds in runs.items()]
    return timings


@torch.no_grad()
def measure_decode_speed(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    """Measure tokens per second of greedy decoding after a prompt, without its prefill and a warm-up.

    Args:
        model: Causal language model with a cache.
        prompt: (1, T), int64.
        tokens: Tokens timed.
    """
    device = next(model.parameters()).device
    logits, cache = run_cached(model, prompt.to(device))
    began = 0.0
    for step in range(WARM_UP_TOKENS + tokens):
        if step == WARM_UP_TOKENS:
            began = _clock(device)
        logits, cache = run_cached(model, logits[:, -1:].argmax(-1), cache)
    return tokens / (_clock(device) - began)


def _summary(name: str, context: int, batch: int, rounds: Sequence[_Run]) -> Timing:
    peaks = [run.peak_bytes for run in rounds if run.peak_bytes is not None]
    return Timing(
        model=name,
        context=context,
        batch=batch,
        prefill_seconds=statistics.median(run.prefill_seconds for run in rounds),
        decode_milliseconds=statistics.median(run.step_seconds for run in rounds) * 1000,
        cache_bytes=rounds[0].cache_bytes,
        peak_bytes=max(peaks) if len(peaks) == len(rounds) else None,
    )


def _run(model: PreTrainedModel, rows: torch.Tensor) -> _Run:
    """Time a prefill and the decoding of the last tokens of rows (B, T)."""
    device = next(model.parameters()).device
    rows = rows.to(device)
    decoded = min(_DECODED_TOKENS, rows.shape[1] // 2)
    trim_heap()
    with _peak_memory(device) as peak:
        began = _clock(device)
        _, cache = run_cached(model, rows[:, :-decoded], logits_to_keep=1)
        prefill = _clock(device) - began
        steps = []
        for column in range(rows.shape[1] - decoded, rows.shape[1]):
            began = _clock(device)
            _, cache = run_cached(model, rows[:, column : column + 1], cache)
            steps.append(_clock(device) - began)
    return _Run(prefill, statistics.median(steps), cache_bytes(cache), peak[0] if peak else None)


@contextlib.contextmanager
def _decode_mode(model: PreTrainedModel, mode: Literal["expand"] | None) -> Iterator[None]:
    """Set ``decode`` of the ``mea`` section inside the block; None leaves the model as it is."""
    if mode is None:
        yield
        return
    before = model.config.mea
    model.config.mea = {**before, "decode": mode}
    try:
        yield
    finally:
        model.config.mea = before


def _clock(device: torch.device) -> float:
    """Return the time in seconds at which all work on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds, after the block, its peak bytes above those before; empty without a counter for it."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    available = device.type == "cpu" and _STATUS.is_file()
    if available:
        try:
            _REFERENCES.write_text("5")  # Linux: resets the high-water mark
        except OSError:
            available = False
    before = _resident("VmRSS") if available else 0
    yield peak
    if available:
        peak.append(max(0, _resident("VmHWM") - before))


def _resident(name: str) -> int:
    """Return a memory counter of this process from ``/proc/self/status``, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


__all__ = ["WARM_UP_TOKENS", "Timing", "check_contexts", "measure_decode_speed", "measure_speed"]
