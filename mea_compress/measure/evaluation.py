"""Measuring a checkpoint: loss, divergence from the original, the bytes its cache holds, decode speed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from mea_compress.errors import RequestError
from mea_compress.loading import check_ids, choose_sequence_length, load_model, load_tokenizer, vocabulary_size
from mea_compress.measure.cache import measure_cache_bytes
from mea_compress.measure.metrics import NOTHING, Comparison, check_same_vocabulary, compare_models, max_batch_size
from mea_compress.measure.speed import WARM_UP_TOKENS, Timing, check_contexts, measure_decode_speed, measure_speed
from mea_compress.report.showing import Shown
from mea_compress.report.tables import evaluation_report
from mea_compress.text import padded_sequences, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_BATCH = 16
_CACHED_TOKENS = 64
_TIMED_TOKENS = 48


@dataclass(frozen=True)
class ReferenceEvaluation:
    """The original's figures.

    Attributes:
        cross_entropy: Nats per token.
        perplexity: Its exponential.
        kv_bytes_per_token: Bytes of one sequence's cache per token, from the tensors it holds.
    """

    cross_entropy: float
    perplexity: float
    kv_bytes_per_token: float


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What `evaluate` measures.

    Attributes:
        tokens: Predictions compared.
        cross_entropy: Nats per token.
        perplexity: Its exponential.
        kl: KL(reference ‖ checkpoint) in nats per token, None without a reference.
        top1_agreement: Share of positions where both find the same token likeliest, None without a reference.
        kv_bytes_per_token: Bytes of one sequence's cache per token, from the tensors it holds.
        reference: The same of the reference.
        decode_tokens_per_second: Greedy, one sequence.
        speed: Times, caches and memory at the contexts and batches asked for, None where none were.
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
        """Return plain data; what was not measured is None, and ``speed`` is there where it was asked for."""
        return {key: value for key, value in asdict(self).items() if key != "speed" or value is not None}

    def report(self) -> str:
        """Return what people read."""
        return evaluation_report(self.to_json())


def evaluate(
    checkpoint: Path | str,
    *,
    text: Path | str,
    reference: Path | str | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a checkpoint on text, and against its original where that is given.

    Every sequence starts with BOS where the tokenizer has one. A document a line (``.jsonl``): the first
    ``sequence_length`` tokens of each, shorter ones padded and masked. One document (``.txt``): consecutive windows.
    The tokens are those of the checkpoint's tokenizer.

    Args:
        checkpoint: Directory of a causal language model.
        text: ``.txt`` or ``.jsonl``.
        reference: Directory of the original, of the same vocabulary.
        sequence_length: Tokens of a sequence, BOS included; None takes the model's context, at most 1024.
        batch_size: Sequences at once; None suits it to the vocabulary.
        limit: Measure the first so many sequences only.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: Dtype both models run in; None keeps each checkpoint's.
        contexts: Numbers of cached tokens, such as ``[1024, 8192]``, at which speed and memory are measured too;
            see `measure_speed`.
        batches: Numbers of sequences for that; None is one.
        progress: Show a bar on stderr.

    Raises:
        RequestError: A path is wrong, the text is shorter than a sequence, vocabularies differ, or a number makes
            no sense.

    Example:
        >>> evaluation = evaluate("HALF", text="held-out.txt", reference="SRC", progress=False)
        >>> evaluation.kv_bytes_per_token / evaluation.reference.kv_bytes_per_token
        0.5
    """
    _check_counts(batch_size, limit, contexts, batches)
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
    check_contexts(models, contexts or ())
    ids, mask = padded_sequences(documents, tokenizer, length, limit=limit)
    vocabulary = vocabulary_size(model)
    check_ids(ids, vocabulary, checkpoint)

    size = batch_size or min(_MAX_BATCH, max_batch_size(ids.shape[1], vocabulary))
    total = _compare(model, original, ids, mask, size, progress)
    speed = measure_speed(models, ids[mask.bool()], contexts, batches or (1,), progress) if contexts else None

    longest = ids[int(mask.sum(1).argmax())]
    sample = longest[None, :_CACHED_TOKENS]
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
        decode_tokens_per_second=_decode_speed(model, longest),
        speed=None if speed is None else tuple(speed),
    )


def _check_counts(
    batch_size: int | None, limit: int | None, contexts: Sequence[int] | None, batches: Sequence[int] | None
) -> None:
    """Raise `RequestError` for counts that leave nothing to measure."""
    for name, value in (("batch_size", batch_size), ("limit", limit), *(("batches", batch) for batch in batches or ())):
        if value is not None and value < 1:
            raise RequestError(f"`{name}` {value} measures nothing: give 1 or more")
    if batches and not contexts:
        numbers = ",".join(map(str, batches))
        raise RequestError(f"`batches` {numbers} measures nothing without `contexts`: give both")


def _compare(
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    ids: torch.Tensor,
    mask: torch.Tensor,
    batch_size: int,
    progress: bool,
) -> Comparison:
    """Sum the comparisons of all sequences, each batch cut to its longest."""
    total = NOTHING
    with tqdm(total=len(ids), desc="evaluating", unit="seq", disable=not progress, file=sys.stderr) as bar:
        for rows, present in zip(ids.split(batch_size), mask.split(batch_size), strict=True):
            width = int(present.sum(1).max())
            total += compare_models(model, original, rows[:, :width], present[:, :width])
            bar.update(len(rows))
    return total


def _decode_speed(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Time greedy decoding after the first tokens of ids (T,), within T positions where they suffice."""
    tokens = max(1, min(_TIMED_TOKENS, len(ids) // 2))
    prompt = max(1, min(_CACHED_TOKENS, len(ids) - tokens - WARM_UP_TOKENS))
    return measure_decode_speed(model, ids[None, :prompt], tokens)


def _perplexity(cross_entropy: float) -> float:
    try:
        return exp(cross_entropy)
    except OverflowError:
        return inf


__all__ = ["Evaluation", "ReferenceEvaluation", "evaluate"]
