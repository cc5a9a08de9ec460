"""Measuring a checkpoint: loss, divergence from the original, the bytes its cache holds, decode speed."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mea_compress.decoding import run_cached
from mea_compress.errors import RequestError
from mea_compress.healing import NOTHING, check_same_vocabulary, compare_models, rows_at_once
from mea_compress.measure.speed import Timing, cache_bytes, check_contexts, measure_speed
from mea_compress.text import (
    choose_sequence_length,
    load_model,
    load_tokenizer,
    padded_sequences,
    read_documents,
)

__all__ = [
    "Evaluation",
    "ReferenceEvaluation",
    "evaluate",
    "load_model",
    "load_tokenizer",
    "measure_cache_bytes",
    "measure_decode_speed",
]

_BATCH_AT_MOST = 16
_CACHE_TOKENS = 64
_DECODED_TOKENS = 48
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class ReferenceEvaluation:
    """The original's part: nats per token, and bytes per token of one sequence."""

    cross_entropy: float
    perplexity: float
    kv_bytes_per_token: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures.

    Attributes:
        tokens: predictions judged.
        cross_entropy: nats per token.
        perplexity: its exponential.
        kl: KL(reference ‖ checkpoint) in nats per token, None without a reference.
        top1_agreement: share of positions where both find the same token likeliest, None without a reference.
        kv_bytes_per_token: bytes of one sequence's cache per token, from the tensors it holds.
        reference: the same of the reference.
        decode_tokens_per_second: greedy, one sequence.
        speed: times, caches and memory at the contexts and batches asked for, None where none were.
    """

    tokens: int
    cross_entropy: float
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    kv_bytes_per_token: float
    reference: ReferenceEvaluation | None
    decode_tokens_per_second: float
    speed: tuple[Timing, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; what was not measured is None, and ``speed`` is there where it was asked for."""
        return {key: value for key, value in asdict(self).items() if key != "speed" or value is not None}


def _perplexity(cross_entropy: float) -> float:
    try:
        return exp(cross_entropy)
    except OverflowError:
        return float("inf")


@torch.no_grad()
def measure_cache_bytes(model: Any, ids: torch.Tensor | None = None) -> float:
    """Bytes of KV cache per token and sequence, from the tensors a real cache holds after a forward pass.

    Args:
        model: causal language model with a cache.
        ids: int64 (B, T); None takes ids 0, 1, 2, … of a length the model allows.

    Returns:
        `cache_bytes` divided by B·T.

    Raises:
        RequestError: the model keeps no cache.
    """
    if ids is None:
        length = choose_sequence_length(model, None)
        ids = torch.arange(min(length, _CACHE_TOKENS))[None] % model.config.get_text_config().vocab_size
    ids = ids.to(next(model.parameters()).device)
    _, cache = run_cached(model, ids)
    total = cache_bytes(cache)
    if not total:
        raise RequestError(f"The model ({model.config.model_type}) keeps no KV cache, so there is nothing to measure.")
    return total / ids.numel()


@torch.no_grad()
def measure_decode_speed(model: Any, prompt: torch.Tensor, tokens: int = _DECODED_TOKENS) -> float:
    """Tokens per second of greedy decoding after a prompt, one sequence, the prefill and a warm-up not counted.

    Args:
        model: causal language model with a cache.
        prompt: int64 (1, T).
        tokens: tokens timed.
    """
    device = next(model.parameters()).device
    logits, cache = run_cached(model, prompt.to(device))
    began = 0.0
    for step in range(_WARM_UP_TOKENS + tokens):
        if step == _WARM_UP_TOKENS:
            _synchronize(device)
            began = time.perf_counter()
        logits, cache = run_cached(model, logits[:, -1:].argmax(-1), cache)
    _synchronize(device)
    return tokens / (time.perf_counter() - began)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _speed(model: Any, ids: torch.Tensor) -> float:
    """Decode speed after the first tokens of ids (T,), within as many positions as a sequence has."""
    tokens = max(1, min(_DECODED_TOKENS, ids.shape[0] // 2))
    prompt = max(1, min(_CACHE_TOKENS, ids.shape[0] - tokens - _WARM_UP_TOKENS))
    return measure_decode_speed(model, ids[None, :prompt], tokens)


def evaluate(
    checkpoint: Path | str,
    text: Path | str,
    reference: Path | str | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    contexts: str | None = None,
    batches: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures a checkpoint on text, and against its original where that is given.

    Every sequence starts with BOS where the tokenizer has one. A document a line (``.jsonl``): the first
    ``sequence_length`` tokens of each, shorter ones padded and masked. One document (``.txt``): consecutive windows.
    The tokens are those of the checkpoint's tokenizer.

    Args:
        checkpoint: directory of a causal language model.
        text: ``.txt`` or ``.jsonl``.
        reference: directory of the original, of the same vocabulary.
        sequence_length: tokens of a sequence, BOS included; None takes the model's context, at most 1024.
        batch_size: sequences at once; None suits it to the vocabulary.
        limit: measure the first so many sequences only.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: dtype both models run in; None keeps each checkpoint's.
        contexts: numbers of cached tokens, ``"1024,8192"``, at which speed and memory are measured too; see `speed`.
        batches: numbers of sequences for that; None is one.
        progress: show a bar on stderr.

    Raises:
        RequestError: a path is wrong, the text is shorter than a sequence, vocabularies differ, or a number makes
            no sense.
    """
    for flag, value in (("--batch-size", batch_size), ("--limit", limit)):
        if value is not None and value < 1:
            raise RequestError(f"{flag} {value} measures nothing: give 1 or more.")
    if batches and not contexts:
        raise RequestError(f"--batches {batches} measures nothing without --contexts: give both.")
    documents = read_documents(text)
    model = load_model(checkpoint, dtype, device)
    tokenizer = load_tokenizer(checkpoint)
    length = choose_sequence_length(model, sequence_length)
    original = None
    if reference is not None:
        original = load_model(reference, dtype, device)
        check_same_vocabulary(model, original, (checkpoint, reference))
        choose_sequence_length(original, length)
    models = {"checkpoint": model} | ({} if original is None else {"reference": original})
    lengths = _numbers(contexts) if contexts else []
    check_contexts(models, lengths)
    ids, mask = padded_sequences(documents, tokenizer, length, limit=limit)
    vocabulary = model.config.get_text_config().vocab_size
    if int(ids.max()) >= vocabulary:
        raise RequestError(
            f"The tokenizer of {checkpoint} makes id {int(ids.max())}, and the model has {vocabulary}: "
            "put the tokenizer that belongs to it into the directory."
        )

    size = batch_size or min(_BATCH_AT_MOST, rows_at_once(ids.shape[1], vocabulary))
    total = NOTHING
    with tqdm(total=len(ids), desc="evaluating", unit="seq", disable=not progress, file=sys.stderr) as bar:
        for rows, present in zip(ids.split(size), mask.split(size), strict=True):
            width = int(present.sum(1).max())
            total += compare_models(model, original, rows[:, :width], present[:, :width])
            bar.update(len(rows))
    speed = measure_speed(models, ids[mask.bool()], lengths, _numbers(batches or "1"), progress) if lengths else None

    longest = ids[int(mask.sum(1).argmax())]
    sample = longest[None, :_CACHE_TOKENS]
    measured_reference = None
    if original is not None:
        loss = total.reference_cross_entropy / total.tokens
        measured_reference = ReferenceEvaluation(loss, _perplexity(loss), measure_cache_bytes(original, sample))
    loss = total.cross_entropy / total.tokens
    return Evaluation(
        tokens=total.tokens,
        cross_entropy=loss,
        perplexity=_perplexity(loss),
        kl=None if original is None else total.kl / total.tokens,
        top1_agreement=None if original is None else total.agreements / total.tokens,
        kv_bytes_per_token=measure_cache_bytes(model, sample),
        reference=measured_reference,
        decode_tokens_per_second=_speed(model, longest),
        speed=None if speed is None else tuple(speed),
    )
