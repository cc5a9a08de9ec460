"""Retrieval over long contexts: numbers hidden in text at several depths, to be found again, after RULER (2404.06654).

`passkey` hides one number under one key (RULER's single needle), `lookup` several under keys of their own and asks for
one (its multi-key needles). The filler is text that the caller gives.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from mea_compress.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS = 4
TASKS = {"passkey": 1, "lookup": 8}
"""Numbers hidden in one prompt, by task."""
_TOKENS_AT_ONCE = 8192
_OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
_NEEDLE = "\nOne of the special magic numbers for {key} is: {value}.\n"
_QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
_KEYS = (
    "anchor",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "marble",
    "needle",
    "orchard",
    "pepper",
    "quarry",
    "ribbon",
    "saddle",
    "temple",
    "umbrella",
    "valley",
    "window",
    "yellow",
)


@dataclass(frozen=True)
class RetrievalPrompt:
    """One prompt with its answer.

    Attributes:
        task: Of `TASKS`.
        length: Tokens, the answer among them.
        depth: Share of the filler in front of the number that is asked for.
        ids: (length,), int64; the last `answer_tokens` are the answer.
        answer_tokens: Tokens that have to be predicted.
    """

    task: str
    length: int
    depth: float
    ids: torch.Tensor
    answer_tokens: int


@dataclass(frozen=True)
class RetrievalScore:
    """Prompts of one task, length and depth.

    Attributes:
        task: ``passkey`` or ``lookup``.
        length: Tokens of each prompt, the answer among them.
        depth: Share of the filler in front of the number that is asked for: 0 is the beginning.
        prompts: Number of prompts.
        exact_match: Share of them answered exactly.
    """

    task: str
    length: int
    depth: float
    prompts: int
    exact_match: float


def check_lengths(longest: int | None, lengths: Sequence[int]) -> None:
    """Check, before any work, that every length fits into the models' context, None where they do not say.

    Raises:
        RequestError: One does not.
    """
    for length in lengths:
        if longest is not None and length > longest:
            raise RequestError(f"`retrieval` {length} is longer than the model's context of {longest}: give no more")


def retrieval_prompts(
    filler: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    front: Sequence[int],
    lengths: Sequence[int],
    *,
    prompts: int = PROMPTS,
    seed: int = 0,
) -> list[RetrievalPrompt]:
    """Hide numbers in text.

    Args:
        filler: Ids of a text: each prompt takes them from a place drawn at random, and begins again where they end.
        tokenizer: Of the models to be measured.
        front: Ids at the beginning of every prompt, such as BOS.
        lengths: Tokens of a prompt, answer included.
        prompts: Prompts of each task, length and depth.
        seed: Of keys, numbers and places; the same for the same tokenizer and text.

    Raises:
        RequestError: A length has no room for a question, or the tokenizer does not know digits.
    """
    made = []
    for length in lengths:
        for task, count in TASKS.items():
            for depth in DEPTHS:
                for number in range(prompts):
                    draw = random.Random(f"{seed} {task} {length} {depth} {number}")
                    made.append(_prompt(draw, filler, tokenizer, front, task, count, length, depth))
    return made


def _prompt(
    draw: random.Random,
    filler: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    front: Sequence[int],
    task: str,
    count: int,
    length: int,
    depth: float,
) -> RetrievalPrompt:
    keys = draw.sample(_KEYS, count)
    values = [str(value) for value in draw.sample(range(10**6, 10**7), count)]
    needles = [
        _encode(_NEEDLE.format(key=key, value=value), tokenizer) for key, value in zip(keys, values, strict=True)
    ]
    question, answer = _question_and_answer(keys[0], values[0], tokenizer)
    opening = [*front, *_encode(_OPENING, tokenizer)]
    room = length - sum(map(len, [opening, *needles, question, answer]))
    if room < 0:
        raise RequestError(
            f"`retrieval` {length} has no room for what is hidden and asked for: give {length - room} tokens or more"
        )
    start = draw.randrange(len(filler))
    text = [filler[(start + index) % len(filler)] for index in range(room)]
    # The number asked for comes first among those at its place.
    places = [round(depth * room), *(draw.randint(0, room) for _ in needles[1:])]
    ids, done = opening, 0
    for place, _, needle in sorted(zip(places, range(count), needles, strict=True)):
        ids = ids + text[done:place] + needle
        done = place
    ids = ids + text[done:] + question + answer
    return RetrievalPrompt(task, length, depth, torch.tensor(ids), len(answer))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _question_and_answer(key: str, value: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of a question and of its answer, cut where the tokens of both together leave those of one."""
    question = _QUESTION.format(key=key)
    alone, both = _encode(question, tokenizer), _encode(f"{question} {value}", tokenizer)
    cut = next((i for i, pair in enumerate(zip(alone, both, strict=False)) if pair[0] != pair[1]), len(alone))
    answer = both[cut:]
    unknown = tokenizer.unk_token_id
    if not answer or (unknown is not None and unknown in answer):
        raise RequestError(
            f"`retrieval` hides numbers, and the tokenizer cannot write {value}: measure a model that knows digits"
        )
    return both[:cut], answer


@torch.no_grad()
def measure_retrieval(
    model: PreTrainedModel,
    prompts: Sequence[RetrievalPrompt],
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[RetrievalScore, ...]:
    """Measure which hidden numbers a model finds.

    One forward pass over prompt and answer: where each token of the answer is the likeliest after those before it,
    greedy decoding says exactly this answer, and where one is not, it says another.

    Args:
        model: Causal language model.
        prompts: Of `retrieval_prompts`.
        batch_size: Prompts at once; without it as many as have 8,192 tokens, at least one.
        progress: Show a bar on stderr.

    Returns:
        A score for each task, length and depth, in the order of the prompts.
    """
    device = next(model.parameters()).device
    found: dict[tuple[str, int, float], list[bool]] = {}
    with tqdm(total=len(prompts), desc="retrieval", unit="prompt", disable=not progress, file=sys.stderr) as bar:
        for batch in _batches(prompts, batch_size):
            rows = torch.stack([prompt.ids for prompt in batch]).to(device)
            longest = max(prompt.answer_tokens for prompt in batch)
            output = model(input_ids=rows, use_cache=False, logits_to_keep=longest + 1)
            same = output.logits[:, :-1].argmax(-1) == rows[:, -longest:]
            for prompt, row in zip(batch, same, strict=True):
                place = (prompt.task, prompt.length, prompt.depth)
                found.setdefault(place, []).append(bool(row[-prompt.answer_tokens :].all()))
            bar.update(len(batch))
    return tuple(RetrievalScore(*place, len(exact), sum(exact) / len(exact)) for place, exact in found.items())


def _batches(prompts: Sequence[RetrievalPrompt], batch_size: int | None) -> Iterator[list[RetrievalPrompt]]:
    """Yield neighbours of one length."""
    batch: list[RetrievalPrompt] = []
    for prompt in prompts:
        size = batch_size or max(1, _TOKENS_AT_ONCE // prompt.length)
        if batch and (len(batch) >= size or batch[0].length != prompt.length):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


__all__ = [
    "DEPTHS",
    "PROMPTS",
    "RetrievalPrompt",
    "RetrievalScore",
    "check_lengths",
    "measure_retrieval",
    "retrieval_prompts",
]
