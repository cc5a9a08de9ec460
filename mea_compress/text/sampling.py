"""Text that a model writes itself, from several kinds of beginnings, for calibration and healing without a text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from mea_compress.errors import RequestError
from mea_compress.loading import check_context, context_length, end_tokens, placeholder_tokens, seeded, vocabulary_size
from mea_compress.text.sequences import Bos, sequence_prefix

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

_USER, _ANSWER = "Zqxuserxqz", "Zqxanswerxqz"
# A beginning that leaves less of a row to the model is not used.
_LONGEST_OPENING = 0.5


@dataclass(frozen=True)
class _Start:
    """How a row begins.

    Attributes:
        ids: Its first tokens.
        ends: End tokens that the model may write in it, since they only end a turn.
    """

    ids: tuple[int, ...]
    ends: frozenset[int] = frozenset()


@torch.no_grad()
def sample_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    length: int,
    seed: int = 0,
    *,
    bos: Bos = "auto",
    batch_size: int = 64,
    progress: bool = True,
) -> torch.Tensor:
    """Sample text from a model itself: temperature 1, the whole vocabulary except the end tokens.

    A model that always begins in the same way says narrow things. So rows are dealt out evenly to the kinds of
    beginnings that there are, and shuffled:

    - what the tokenizer writes in front of a text (`sequence_prefix`); where that is nothing, as the next kind;
    - the same and one token drawn at random: of text with a letter, nothing special;
    - with a chat template, its opening of a user's turn, so that the model writes question and answer. There it may
      write the end tokens with which the template ends turns.

    Args:
        model: Causal language model; it computes in the dtype that it is in.
        tokenizer: Its tokenizer; without one the model's ``bos_token_id`` stands in front, and any token may be drawn.
        count: Rows.
        length: Tokens of each row, its beginning included.
        seed: Same seed, model and machine: same ids. Global random state is left alone.
        bos: See `sequence_prefix`.
        batch_size: Rows sampled at once.
        progress: Show a bar on stderr.

    Returns:
        Ids (count, length), int64, on the CPU.

    Raises:
        RequestError: `count` or `length` is below 1, `length` is beyond the model's context, there is no BOS that `bos`
            asks for or it is beyond the model's vocabulary, or the model's logits are not finite.
    """
    if count < 1 or length < 1:
        raise RequestError(f"sampling {count} sequences of {length} tokens makes no text: ask for 1 or more of each")
    check_context(context_length(model), length)
    device = next(model.parameters()).device
    vocabulary = vocabulary_size(model)
    ends = [token for token in end_tokens(model) if 0 <= token < vocabulary]
    starts = _starts(model, tokenizer, count, length, seed, bos)
    largest = max(max(start.ids) for start in starts)
    if largest >= vocabulary:
        raise RequestError(
            f"the BOS token {largest} is beyond the model's vocabulary of {vocabulary}, so no text can be sampled: "
            "correct bos_token_id, or give text with `text`"
        )
    rows, placeholders = [], [token for token in placeholder_tokens(model.config) if token < vocabulary]
    bar = tqdm(total=count * length, desc="sampling text", unit="tok", disable=not progress, file=sys.stderr)
    with bar, seeded(seed, device), _plain_sampling(model, length):
        for begin in range(0, count, batch_size):
            batch = starts[begin : begin + batch_size]
            given = min(len(start.ids) for start in batch)
            ids = torch.tensor([start.ids[:given] for start in batch], device=device)
            bar.update(ids.numel())
            if given < length:
                # Without a mask generate would make one itself, and take a BOS that is also the padding for padding.
                ids = model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=torch.ones_like(ids),
                    logits_processor=[_start_processor(batch, ends, placeholders, device)],
                    stopping_criteria=[_bar_criterion(bar)],
                )
            rows.append(ids.cpu())
    return torch.cat(rows)


def _starts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, length: int, seed: int, bos: Bos
) -> list[_Start]:
    """Return the beginning of every row, cut to its length; see `sample_sequences`."""
    prefix = _model_prefix(model, bos) if tokenizer is None else sequence_prefix(tokenizer, bos)
    opening = None if tokenizer is None else _user_turn(tokenizer, prefix, end_tokens(model))
    kinds = ["prefix" if prefix else "token", "token"]
    if opening is not None and len(opening.ids) <= _LONGEST_OPENING * length:
        kinds.append("chat")
    generator = torch.Generator().manual_seed(seed)
    drawn = _ordinary_tokens(model, tokenizer, generator)
    starts = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        if kind == "chat" and opening is not None:
            starts.append(opening)
        else:
            ids = prefix if kind == "prefix" else (*prefix, next(drawn))
            starts.append(_Start(ids[:length]))
    return [starts[index] for index in torch.randperm(count, generator=generator).tolist()]


def _model_prefix(model: PreTrainedModel, bos: Bos) -> tuple[int, ...]:
    """Return what stands in front of a text of a model that has no tokenizer."""
    token = model.config.get_text_config().bos_token_id
    if bos == "always" and token is None:
        raise RequestError("neither a tokenizer nor the model's config names a bos_token: use auto for `bos`")
    return () if bos == "never" or token is None else (int(token),)


def _ordinary_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator
) -> Iterator[int]:
    """Yield tokens at random, without end: of text with a letter, or where no token is, any but special ones."""
    config = model.config.get_text_config()
    special = {*end_tokens(model), config.bos_token_id, config.pad_token_id}
    size = vocabulary_size(model)
    if tokenizer is not None:
        special |= {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        size = min(size, len(tokenizer))
    candidates = [token for token in range(size) if token not in special] or list(range(vocabulary_size(model)))
    has_letter = False
    while True:
        for index in torch.randperm(len(candidates), generator=generator).tolist():
            token = candidates[index]
            if tokenizer is not None and not _is_word(str(tokenizer.decode([token]))):
                continue
            has_letter = True
            yield token
        if not has_letter:
            tokenizer = None


def _is_word(text: str) -> bool:
    """Return whether a token is text with a letter, and not a part of a character."""
    return any(character.isalpha() for character in text) and "\ufffd" not in text


def _user_turn(tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...], ends: tuple[int, ...]) -> _Start | None:
    """Return the opening of a user's turn up to where the user's text begins, None where there is no such template."""
    if not tokenizer.chat_template:
        return None
    turn = {"role": "user", "content": _USER}
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        opening, found, _ = str(tokenizer.apply_chat_template([turn], tokenize=False)).partition(_USER)
        talk = str(tokenizer.apply_chat_template([turn, answer, turn], tokenize=False))
    except Exception:  # a template of other roles, or of contents that are not strings: it opens no user's turn
        return None
    if not found or not opening:
        return None
    ids = tuple(tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"])
    if ids[: len(prefix)] != prefix:
        ids = prefix + ids
    written = tokenizer(talk[len(opening) :], add_special_tokens=False, verbose=False)["input_ids"]
    return _Start(ids, frozenset(written) & frozenset(ends))


@contextmanager
def _plain_sampling(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Put aside a model's own generation config, whose top-k or penalties `generate` would mix into any other."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        pad_token_id=0,  # nothing is padded; unset, generate warns
    )
    try:
        yield
    finally:
        model.generation_config = before


def _start_processor(
    batch: list[_Start], ends: list[int], placeholders: list[int], device: torch.device
) -> LogitsProcessor:
    """Return a processor that writes the beginnings of rows where they are longer than others'.

    It forbids the end, and what stands where images or sound are.
    """
    from transformers import LogitsProcessor

    lengths = torch.tensor([len(start.ids) for start in batch], device=device)
    width = int(lengths.max())
    ids = torch.tensor([[*start.ids, *[0] * (width - len(start.ids))] for start in batch], device=device)
    forbidden = torch.tensor([[end not in start.ends for end in ends] for start in batch], device=device)

    class Starts(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not scores.isfinite().all():
                raise RequestError(
                    "the model's logits are not all numbers, so no text can be sampled: look for NaN in its weights"
                )
            scores[:, placeholders] = -torch.inf
            if ends:
                scores[:, ends] = scores[:, ends].masked_fill(forbidden, -torch.inf)
            position = input_ids.shape[1]
            if position < width:
                forced = position < lengths
                scores[forced] = -torch.inf
                scores[forced, ids[forced, position]] = 0.0
            return scores

    return Starts()


def _bar_criterion(bar: tqdm) -> StoppingCriteria:
    """Return a stopping criterion that stops nothing and moves a bar by a token of every row."""
    from transformers import StoppingCriteria

    class Progress(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            bar.update(len(input_ids))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return Progress()
