"""Measuring checkpoints: loss, divergence from the original, the bytes a cache holds, speed, tasks, retrieval."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import exp, inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import torch
from tqdm.auto import tqdm

from mea_compress.errors import RequestError
from mea_compress.layers.runner import fast_products
from mea_compress.loading import (
    check_context,
    check_ids,
    choose_sequence_length,
    load_model,
    load_tokenizer,
    shared_context,
    vocabulary_size,
)
from mea_compress.measure.agreement import choose_prompts, continue_greedily, measure_agreement
from mea_compress.measure.cache import measure_cache_bytes
from mea_compress.measure.metrics import NOTHING, Comparison, check_same_vocabulary, compare, max_batch_size, predict
from mea_compress.measure.results import Evaluation, Evaluations, ReferenceEvaluation
from mea_compress.measure.retrieval import PROMPTS, check_lengths, measure_retrieval, retrieval_prompts
from mea_compress.measure.speed import WARM_UP_TOKENS, check_contexts, measure_decode_speed, measure_speed
from mea_compress.measure.tasks import check_chat_template, find_tasks, measure_tasks
from mea_compress.text.reading import TextChoice, read_documents
from mea_compress.text.sequences import Bos, padded_sequences, sequence_prefix

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

    from mea_compress.measure.agreement import Agreement
    from mea_compress.measure.retrieval import RetrievalScore
    from mea_compress.measure.speed import Timing
    from mea_compress.measure.tasks import TaskScore

_MAX_BATCH = 16
_CACHED_TOKENS = 64
_TIMED_TOKENS = 48


class Measuring(TypedDict, total=False):
    """All that `evaluate` takes beside checkpoints, for type checkers."""

    text: TextChoice | None
    reference: Path | str | None
    sequence_length: int | None
    batch_size: int | None
    limit: int | None
    bos: Bos
    device: str
    dtype: str | None
    seed: int
    contexts: Sequence[int] | None
    batches: Sequence[int] | None
    tasks: Sequence[str] | None
    task_dir: Path | str | None
    few_shot: int | None
    chat_template: bool
    retrieval: Sequence[int] | None
    agreement: int | None
    progress: bool


@overload
def evaluate(checkpoint: Path | str, **settings: Unpack[Measuring]) -> Evaluation: ...


@overload
def evaluate(checkpoint: list[Path | str] | tuple[Path | str, ...], **settings: Unpack[Measuring]) -> Evaluations: ...


def evaluate(
    checkpoint: Path | str | list[Path | str] | tuple[Path | str, ...],
    *,
    text: TextChoice | None = None,
    reference: Path | str | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tasks: Sequence[str] | None = None,
    task_dir: Path | str | None = None,
    few_shot: int | None = None,
    chat_template: bool = False,
    retrieval: Sequence[int] | None = None,
    agreement: int | None = None,
    progress: bool = True,
) -> Evaluation | Evaluations:
    """Measure a checkpoint, or several side by side, on text or tasks, and against the original where that is given.

    Every sequence starts with what the tokenizer puts in front of a text. Of many documents (``.jsonl``): the first
    ``sequence_length`` tokens of each, shorter ones padded and masked. A text file: consecutive windows from its
    beginning. The tokens are those of the (first) checkpoint's tokenizer. All models are in memory at once, and the
    reference runs once for all checkpoints.

    Args:
        checkpoint: Directory or hub id of a causal language model, or a list of several of one vocabulary.
        text: One text or several, as `read_documents` takes them; may be left out where there are tasks.
        reference: Directory or hub id of the original, of the same vocabulary.
        sequence_length: Tokens of a sequence, the prefix included; None takes the model's context, at most 1024.
        batch_size: Sequences at once; None suits it to the vocabulary.
        limit: Measure the first so many sequences, examples of a task, and prompts of a place of retrieval only.
        bos: What stands in front of every sequence; see `sequence_prefix`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: Dtype all models run in; None keeps each checkpoint's.
        seed: Of what retrieval hides and where.
        contexts: Numbers of cached tokens, such as ``[1024, 8192]``, at which speed and memory are measured too;
            see `measure_speed`.
        batches: Numbers of sequences for that; None is one.
        tasks: Tasks of lm-evaluation-harness, such as ``["arc_easy", "piqa"]``; needs the extra ``eval``.
        task_dir: Directory of task files of your own.
        few_shot: Solved examples in front of each of a task; None as the task says.
        chat_template: Put the tokenizer's chat template around the prompts of tasks.
        retrieval: Lengths in tokens, such as ``[1024, 4096]``, at which numbers hidden in the text are to be found; see
            `measure_retrieval`.
        agreement: Decode so many tokens after beginnings of the sequences, and count those before the first that is
            not the reference's; see `measure_agreement`.
        progress: Show bars on stderr; the harness of tasks shows its own in any case.

    Returns:
        An `Evaluation`, or for a list `Evaluations`.

    Raises:
        RequestError: A path is wrong, the text is shorter than a sequence, vocabularies differ, a task is unknown, or a
            number makes no sense.

    Example:
        >>> evaluation = evaluate("HALF", text="held-out.txt", reference="SRC", progress=False)
        >>> evaluation.kv_bytes_per_token / evaluation.reference.kv_bytes_per_token
        0.5
    """
    paths = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    _check_checkpoints(paths)
    if agreement is not None and reference is None:
        raise RequestError("`agreement` is that with the original: give `reference` too")
    tokenizer = load_tokenizer(paths[0])
    if tasks and chat_template:
        check_chat_template(tokenizer)
    manager = check_settings(
        text=text,
        batch_size=batch_size,
        limit=limit,
        contexts=contexts,
        batches=batches,
        tasks=tasks,
        task_dir=task_dir,
        few_shot=few_shot,
        chat_template=chat_template,
        retrieval=retrieval,
        agreement=agreement,
    )
    documents = None if text is None else read_documents(text)
    models = [load_model(path, dtype, device) for path in paths]
    original = None if reference is None else load_model(reference, dtype, device)
    everyone = [*models, *([] if original is None else [original])]
    if dtype is None:
        _warn_of_slow_products(models[0])
    vocabulary, length = vocabulary_size(models[0]), choose_sequence_length(models[0], sequence_length)
    for path, model in zip([*paths, reference], everyone, strict=False):
        check_same_vocabulary(models[0], model, (paths[0], path or ""))
        choose_sequence_length(model, length)
    context = shared_context(everyone)
    check_contexts(context, contexts or ())
    check_lengths(context, retrieval or ())

    losses: Sequence[Comparison | None] = [None] * len(models)
    speeds: Sequence[tuple[Timing, ...] | None] = [None] * len(models)
    agreements: Sequence[Agreement | None] = [None] * len(models)
    found: Sequence[tuple[RetrievalScore, ...] | None] = [None] * len(everyone)
    scores: Sequence[tuple[TaskScore, ...] | None] = [None] * len(everyone)
    front = sequence_prefix(tokenizer, bos)
    longest = torch.arange(min(length, _CACHED_TOKENS + WARM_UP_TOKENS + _TIMED_TOKENS)) % vocabulary
    if documents is not None:
        ids, mask = padded_sequences(documents, tokenizer, length, limit=limit, bos=bos)
        check_ids(ids, vocabulary, paths[0])
        longest = ids[int(mask.sum(1).argmax())]
        # What cannot be measured is said before anything that takes long.
        if retrieval:
            filler = ids[:, len(front) :][mask[:, len(front) :]].tolist()
            hidden = retrieval_prompts(filler, tokenizer, front, retrieval, prompts=limit or PROMPTS, seed=seed)
        if agreement is not None:
            prompts = choose_prompts(ids, mask, agreement, context)
    cached = [measure_cache_bytes(model, longest[None, :_CACHED_TOKENS]) for model in everyone]
    if documents is not None:
        size = batch_size or min(_MAX_BATCH, max_batch_size(ids.shape[1], vocabulary))
        losses = _compare(models, original, ids, mask, size, progress)
        _check_numbers(paths, reference, losses)
        if contexts:
            speeds = [_speed(model, original, ids[mask], contexts, batches or (1,), progress) for model in models]
        if retrieval:
            found = [measure_retrieval(model, hidden, batch_size=batch_size, progress=progress) for model in everyone]
        if agreement is not None and original is not None:
            expected = continue_greedily(original, prompts, agreement, batch_size)
            agreements = [measure_agreement(model, prompts, expected, batch_size) for model in models]
    if manager is not None and tasks is not None:
        scores = [
            measure_tasks(
                model,
                tokenizer,
                tasks,
                manager,
                limit=limit,
                few_shot=few_shot,
                batch_size=batch_size,
                chat_template=chat_template,
            )
            for model in everyone
        ]

    measured_reference = None
    if original is not None:
        loss = _mean(losses[0], "reference_cross_entropy")
        measured_reference = ReferenceEvaluation(loss, _perplexity(loss), cached[-1], scores[-1], found[-1])
    evaluations = {}
    for index, (path, model) in enumerate(zip(paths, models, strict=True)):
        total = losses[index]
        loss = _mean(total, "cross_entropy")
        evaluations[str(path)] = Evaluation(
            tokens=None if total is None else total.tokens,
            cross_entropy=loss,
            perplexity=_perplexity(loss),
            kl=None if original is None else _mean(total, "kl"),
            top1_agreement=None if original is None else _mean(total, "agreements"),
            kv_bytes_per_token=cached[index],
            reference=measured_reference,
            decode_tokens_per_second=_decode_speed(model, longest),
            prefix_ids=None if documents is None else front,
            speed=speeds[index],
            tasks=scores[index],
            retrieval=found[index],
            agreement=agreements[index],
        )
    return evaluations[str(checkpoint)] if isinstance(checkpoint, str | Path) else Evaluations(evaluations)


def check_settings(
    *,
    context: int | None = None,
    text: TextChoice | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tasks: Sequence[str] | None = None,
    task_dir: Path | str | None = None,
    few_shot: int | None = None,
    chat_template: bool = False,
    retrieval: Sequence[int] | None = None,
    agreement: int | None = None,
    **_: Any,
) -> TaskManager | None:
    """Check what can be checked of the settings of `evaluate` while no model is loaded, and return the tasks asked for.

    Others of its settings may be given too, and are not looked at. The context is the number of positions that the
    models were made for, None where that is not known yet.

    Raises:
        RequestError: Nothing is asked for, settings do not go together, a number makes no sense or is beyond the
            context, or a task cannot be loaded.
    """
    _check_counts(batch_size, limit, agreement, contexts, batches)
    _check_needs(
        asked=text or tasks,
        of_text={"contexts": contexts, "retrieval": retrieval, "agreement": agreement} if text is None else {},
        of_tasks={} if tasks else {"task_dir": task_dir, "few_shot": few_shot, "chat_template": chat_template or None},
    )
    if context is not None:
        check_context(context, sequence_length or 0)
        check_contexts(context, contexts or ())
        check_lengths(context, retrieval or ())
    return None if tasks is None else find_tasks(tasks, task_dir)


def _warn_of_slow_products(model: PreTrainedModel) -> None:
    """Say on stderr where a processor only imitates the products of a model in bfloat16."""
    stored = model.dtype == torch.bfloat16 and model.device.type == "cpu"
    if stored and fast_products(model.dtype, model.device) != model.dtype:
        print(
            "warning: this processor has no products in bfloat16, and imitates them slowly: with dtype float32 "
            "the same weights are measured several times as fast",
            file=sys.stderr,
        )


def _check_checkpoints(paths: Sequence[Path | str]) -> None:
    """Raise `RequestError` for no checkpoint, or the same one twice."""
    if not paths:
        raise RequestError("no checkpoint is given: give one or more directories")
    names = [str(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"{name} is given twice: give every checkpoint once")


def _check_counts(
    batch_size: int | None,
    limit: int | None,
    agreement: int | None,
    contexts: Sequence[int] | None,
    batches: Sequence[int] | None,
) -> None:
    """Raise `RequestError` for counts that leave nothing to measure."""
    counts = [("batch_size", batch_size), ("limit", limit), ("agreement", agreement)]
    for name, value in [*counts, *(("batches", batch) for batch in batches or ())]:
        if value is not None and value < 1:
            raise RequestError(f"`{name}` {value} measures nothing: give 1 or more")
    if batches and not contexts:
        numbers = ",".join(map(str, batches))
        raise RequestError(f"`batches` {numbers} measures nothing without `contexts`: give both")


def _check_needs(asked: object, of_text: Mapping[str, object], of_tasks: Mapping[str, object]) -> None:
    """Raise `RequestError` where nothing is asked for, or what is given needs a text or tasks that are not.

    Args:
        asked: What is to be measured on.
        of_text: What needs a text, by name, where there is none.
        of_tasks: What needs tasks, by name, where there are none.
    """
    if not asked:
        raise RequestError("nothing says what to measure on: give `text`, or `tasks`")
    for needed, given in (("text", of_text), ("tasks", of_tasks)):
        for name, value in given.items():
            if value is not None:
                raise RequestError(f"`{name}` measures nothing without `{needed}`: give both")


def _compare(
    models: Sequence[PreTrainedModel],
    original: PreTrainedModel | None,
    ids: torch.Tensor,
    mask: torch.Tensor,
    batch_size: int,
    progress: bool,
) -> list[Comparison]:
    """Sum the comparisons of all sequences for each model, each batch cut to its longest and once by the original."""
    totals = [NOTHING] * len(models)
    with tqdm(total=len(ids), desc="evaluating", unit="seq", disable=not progress, file=sys.stderr) as bar:
        for rows, present in zip(ids.split(batch_size), mask.split(batch_size), strict=True):
            width = int(present.sum(1).max())
            batch = rows[:, :width], present[:, :width]
            expected = None if original is None else predict(original, *batch)
            totals = [
                total + compare(predict(model, *batch), expected) for total, model in zip(totals, models, strict=True)
            ]
            bar.update(len(rows))
    return totals


def _check_numbers(paths: Sequence[Path | str], reference: Path | str | None, losses: Sequence[Comparison]) -> None:
    """Raise `RequestError` where a model's logits are NaN, of which every figure would be one."""
    sums = [(path, total.cross_entropy) for path, total in zip(paths, losses, strict=True)]
    if reference is not None:
        sums.append((reference, losses[0].reference_cross_entropy))
    for path, total in sums:
        if isnan(total):
            raise RequestError(
                f"the logits of {path} are not all numbers: look for NaN in its weights, or give `dtype` float32"
            )


def _speed(
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    ids: torch.Tensor,
    contexts: Sequence[int],
    batches: Sequence[int],
    progress: bool,
) -> tuple[Timing, ...]:
    """Time a checkpoint, and its original in turns with it."""
    models = {"checkpoint": model} | ({} if original is None else {"reference": original})
    return tuple(measure_speed(models, ids, contexts, batches, progress))


def _decode_speed(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Time greedy decoding after the first tokens of ids (T,), within T positions where they suffice."""
    tokens = max(1, min(_TIMED_TOKENS, len(ids) // 2))
    prompt = max(1, min(_CACHED_TOKENS, len(ids) - tokens - WARM_UP_TOKENS))
    return measure_decode_speed(model, ids[None, :prompt], tokens)


def _mean(total: Comparison | None, name: str) -> float | None:
    """Return a sum of a comparison per token, None where nothing was compared."""
    return None if total is None else getattr(total, name) / total.tokens


def _perplexity(cross_entropy: float | None) -> float | None:
    if cross_entropy is None:
        return None
    try:
        return exp(cross_entropy)
    except OverflowError:
        return inf


__all__ = ["check_settings", "evaluate"]
