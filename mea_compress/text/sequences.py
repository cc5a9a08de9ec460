"""Token sequences of documents: tokenised a few hundred thousand characters at a time, and cut.

Evaluation protocol, used wherever a loss is reported: in front of every sequence stands what the tokenizer itself puts
in front of a text (`sequence_prefix`), BOS for most, and behind it the ids of the text without special tokens. Of the
many documents of a ``.jsonl`` file or a table each gives its beginning; a text file, or a document that is alone, is
read to its end in consecutive windows, each with its own prefix. Characters outside the vocabulary, line ends included,
stay the unknown token that the tokenizer makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from mea_compress.errors import RequestError, first_line
from mea_compress.loading import check_sequence_length
from mea_compress.text.documents import PIECE, Chat, Documents, Piece, Text, documents_of, safe_cut, spread_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
"""What stands in front of every sequence: what the tokenizer writes there, at least `bos_token`, or nothing."""

UNKNOWN_SHARE_WARNING = 0.2
_ORDINARY_TEXT = "a text"
# Rust keeps some 200 bytes for each character that it is given at once.
_BATCH_CHARACTERS = 1 << 19
_BATCH_PIECES = 512
# Tokens are hardly ever longer, so that so much text certainly fills its sequence.
_LONGEST_TOKEN = 64
# What a tokenizer sees of the piece before, so that it does not take the next one for the beginning of a text.
_CONTEXT_CHARACTERS = 256
# Shows how many bytes a token has.
_PROBE_BYTES = 1 << 12
# A text that has no more than so many times the sequences that are taken of it is read whole.
_READ_WHOLE = 4
# A block of a larger one has some more than a sequence, so that it fills one from the beginning of a line.
_BLOCK_SEQUENCES = 2
# Text that is tokenised at once where little is asked for: characters for each token.
_CHARACTERS_PER_TOKEN = 8


def sequence_prefix(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> tuple[int, ...]:
    """Return the ids that stand in front of every sequence.

    Args:
        tokenizer: Its own convention is what it writes in front of a text; what it writes behind is left out.
        bos: ``auto`` takes the tokenizer's convention, ``always`` its ``bos_token`` where that has nothing, ``never``
            nothing.

    Raises:
        RequestError: ``always``, and there is no ``bos_token``; or `bos` is none of the three.
    """
    if bos not in ("auto", "always", "never"):
        raise RequestError(f"`bos` {bos} is unknown: use auto, always or never")
    if bos == "never":
        return ()
    own = _written_in_front(tokenizer)
    if own or bos == "auto":
        return own
    if tokenizer.bos_token_id is None:
        raise RequestError("the tokenizer has no bos_token to put in front of every sequence: use auto for `bos`")
    return (int(tokenizer.bos_token_id),)


def _written_in_front(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    plain = list(tokenizer(_ORDINARY_TEXT, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(_ORDINARY_TEXT, verbose=False)["input_ids"])
    if plain:
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
    special = set(tokenizer.all_special_ids)
    return tuple(whole[: next((index for index, token in enumerate(whole) if token not in special), len(whole))])


def chat_text(chat: Chat, tokenizer: PreTrainedTokenizerBase, opened: bool = False) -> str:
    """Return a conversation as the tokenizer's chat template writes it.

    Args:
        chat: The conversation.
        tokenizer: With the template.
        opened: Open the assistant's next turn behind it.

    Raises:
        RequestError: There is no template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise RequestError(
            f"{chat.place} has messages, and the tokenizer has no chat template: give plain text, or the tokenizer of "
            "a chat model"
        )
    try:
        return str(
            tokenizer.apply_chat_template(chat.messages, tools=chat.tools, add_generation_prompt=opened, tokenize=False)
        )
    except Exception as error:  # whatever a template raises
        raise template_refusal(chat, error) from error


def template_refusal(chat: Chat, error: Exception) -> RequestError:
    """Return what to raise where a chat template has raised an error."""
    return RequestError(f"the chat template refuses {chat.place} ({first_line(error)}): correct its messages")


@dataclass
class _Tally:
    """Tokens that have been seen, prefixes included."""

    tokens: int = 0


def _strings(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[tuple[str, Piece]]:
    """Yield the text of pieces, long ones in several, and of a document that gives its beginning no more than that."""
    for piece in pieces:
        text = piece.content if isinstance(piece.content, str) else chat_text(piece.content, tokenizer)
        largest = max(PIECE, 0 if piece.running else _LONGEST_TOKEN * length)
        while len(text) > 2 * largest:
            cut = safe_cut(text[:largest])
            yield text[:cut], piece
            text, piece = text[cut:], replace(piece, begins=False)
            if not piece.running:
                text = ""
        if text:
            yield text, piece


@dataclass(frozen=True)
class Part:
    """The ids of a piece of a document."""

    ids: list[int]
    begins: bool
    running: bool


def _encode(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None
) -> Iterator[Part]:
    """Yield the ids of pieces, no special token added, in batches that are hardly larger than what is asked for."""
    strings = _strings(pieces, tokenizer, length)
    wanted = _BATCH_CHARACTERS if limit is None else _CHARACTERS_PER_TOKEN * limit * length
    budget, context = min(_BATCH_CHARACTERS, max(_PROBE_BYTES, wanted)), ""
    while batch := list(_batch(strings, budget)):
        contexts = []
        for text, piece in batch:
            contexts.append("" if piece.begins else context)
            context = text[text.rfind("\n", 0, len(text) - 1) + 1 :][-_CONTEXT_CHARACTERS:]
        encoded = _ids([before + text for before, (text, _) in zip(contexts, batch, strict=True)], tokenizer)
        for ids, before, (text, piece) in zip(encoded, contexts, batch, strict=True):
            yield Part(_behind(ids, before, text, tokenizer), piece.begins, piece.running)


def _batch(strings: Iterator[tuple[str, Piece]], budget: int) -> Iterator[tuple[str, Piece]]:
    for text, piece in islice(strings, _BATCH_PIECES):
        yield text, piece
        budget -= len(text)
        if budget <= 0:
            return


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _behind(ids: list[int], before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what is a text's own of its ids behind a context."""
    if not before:
        return ids
    (context,) = _ids([before], tokenizer)
    if ids[: len(context)] == context:
        return ids[len(context) :]
    return _ids([text], tokenizer)[0]  # a token lies over the border


def _without_prefix(part: Part, prefix: tuple[int, ...]) -> list[int]:
    """Return a document's first ids without the prefix that its text, or a chat template, writes itself."""
    doubled = part.begins and prefix and tuple(part.ids[: len(prefix)]) == prefix
    return part.ids[len(prefix) :] if doubled else part.ids


def _full_rows(parts: Iterable[Part], prefix: tuple[int, ...], length: int, tally: _Tally) -> Iterator[list[int]]:
    """Yield sequences of one length; documents that fill none are put one after the other until they do."""
    front, width = list(prefix), length - len(prefix)
    rest: list[int] = []
    pending: list[int] = []
    filled = False
    for part in _with_end(parts):
        if part.begins and rest and not filled:
            pending += front + rest
            if len(pending) >= length:
                yield pending[:length]
                pending = []
        if part.begins:
            rest, filled = [], False
            tally.tokens += len(front) if part.ids else 0
        ids = _without_prefix(part, prefix)
        tally.tokens += len(ids)
        rest += ids
        if not part.running and filled:
            continue
        whole = len(rest) // width if part.running else min(1, len(rest) // width)
        for start in range(0, whole * width, width):
            yield front + rest[start : start + width]
        filled = filled or whole > 0
        rest = rest[whole * width :]


def _windows(parts: Iterable[Part], prefix: tuple[int, ...], length: int, tally: _Tally) -> Iterator[list[int]]:
    """Yield sequences of two to `length` tokens that never mix documents."""
    front, width = list(prefix), length - len(prefix)
    rest: list[int] = []
    given = False
    for part in _with_end(parts):
        if part.begins:
            if rest and not given and len(front + rest) >= 2:
                yield front + rest
            rest, given = [], False
            tally.tokens += len(front) if part.ids else 0
        ids = _without_prefix(part, prefix)
        tally.tokens += len(ids)
        if given:
            continue
        rest += ids
        whole = len(rest) // width
        if not part.running:
            whole, given = min(1, whole), whole > 0
        for start in range(0, whole * width, width):
            yield front + rest[start : start + width]
        rest = rest[whole * width :]


def _with_end(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield parts, and behind them the beginning of a document that has nothing."""
    yield from parts
    yield Part([], True, False)


def _interleave(
    rows: Sequence[Iterator[list[int]]], sizes: Sequence[int | None], origins: list[int] | None = None
) -> Iterator[list[int]]:
    """Yield the sequences of several texts in proportion to their sizes, at least one of each.

    The next one is of the text of which the smallest share has been used, of two such of the first. A text whose size
    nobody knows counts as the largest.
    """
    largest = max((size for size in sizes if size), default=1)
    weights = [size or largest for size in sizes]
    used = [0] * len(rows)
    left = list(range(len(rows)))
    while left:
        index = min(left, key=lambda index: used[index] / weights[index])
        row = next(rows[index], None)
        if row is None:
            left.remove(index)
            continue
        used[index] += 1
        if origins is not None:
            origins.append(index)
        yield row


def _spread_rows(
    text: Text,
    rows_of: Callable[[Iterable[Piece]], Iterator[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None,
    seed: int,
) -> Iterator[list[int]]:
    """Yield the sequences of a text: all where they are no more than asked for, else some that lie spread over it."""
    probe = None if limit is None or not text.can_be_spread else next(text.spread(_PROBE_BYTES, seed), None)
    if limit is None or probe is None:
        yield from rows_of(text.pieces())
        return
    ((content, _), *_) = _strings([probe], tokenizer, length)
    size = len(content.encode("utf-8", "replace"))
    sequence = ceil(length * size / max(1, len(_ids([content], tokenizer)[0])))
    if (text.size or 0) > _READ_WHOLE * limit * sequence:
        block = max(_BLOCK_SEQUENCES * sequence, 0 if probe.running else size)
        yield from rows_of(text.spread(block, seed))
    else:
        rows = list(islice(rows_of(text.pieces()), 2 * _READ_WHOLE * limit))
        order = spread_order(len(rows), seed) if len(rows) > limit else range(len(rows))
        yield from (rows[index] for index in order)


def token_sequences(
    documents: Documents | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    limit: int | None = None,
    seed: int = 0,
    bos: Bos = "auto",
    origins: list[int] | None = None,
) -> torch.Tensor:
    """Cut documents into full sequences without padding, for calibration and training.

    A text file, or a document that is alone, is cut into consecutive windows. Of many documents, each that fills a
    sequence gives its first ``sequence_length`` tokens. Those that fill none are put one after the other, a prefix
    before each, until they do. What is left over is dropped.

    Where a text has more sequences than `limit`, those that are taken lie spread over it: parts of one or two
    sequences, in an order that `seed` chooses. Nothing else of a large file is read. What can be read in order only
    (standard input, data sets, tables, compressed files) gives its beginning. Several texts take turns: the next
    sequence is of the one of which the smallest share of bytes has been used, so that each gives at least one.

    Args:
        documents: Of `read_documents`, or strings.
        tokenizer: Their tokenizer.
        sequence_length: Tokens of a sequence, the prefix included.
        limit: At most so many sequences.
        seed: Of the places that are read where not all are.
        bos: See `sequence_prefix`.
        origins: Gets the index of the text that each sequence is of.

    Returns:
        Ids (N, sequence_length), int64, N at least 1; the prefix in front of each.

    Raises:
        RequestError: The text does not fill one sequence, or cannot be read.
    """
    documents = documents if isinstance(documents, Documents) else documents_of(documents)

    def encode(pieces: Iterable[Piece]) -> Iterator[Part]:
        return _encode(pieces, tokenizer, sequence_length, limit)

    rows = cut_sequences(documents, tokenizer, sequence_length, limit, seed, bos, encode, origins=origins)
    _warn_of_unknown(rows.numpy(), tokenizer)
    return rows


def cut_sequences(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    limit: int | None,
    seed: int,
    bos: Bos,
    encode: Callable[[Iterable[Piece]], Iterator[Part]],
    wanted: Callable[[list[int]], bool] = lambda row: True,
    origins: list[int] | None = None,
) -> torch.Tensor:
    """Cut documents into sequences as `token_sequences` does.

    Args:
        documents: Of `read_documents`.
        tokenizer: Their tokenizer.
        sequence_length: Tokens of a sequence, the prefix included.
        limit: At most so many sequences.
        seed: Of the places that are read where not all are.
        bos: See `sequence_prefix`.
        encode: Makes ids of the pieces of documents.
        wanted: Whether a sequence is taken; the others do not count.
        origins: Gets the index of the text that each sequence is of.

    Returns:
        Ids (N, sequence_length), int64, N at least 1 if all are wanted.

    Raises:
        RequestError: The text does not fill one sequence, or cannot be read.
    """
    documents, prefix = _checked(documents, tokenizer, sequence_length, bos)
    tally = _Tally()
    filled = False

    def rows_of(pieces: Iterable[Piece]) -> Iterator[list[int]]:
        nonlocal filled
        for row in _full_rows(encode(pieces), prefix, sequence_length, tally):
            filled = True
            if wanted(row):
                yield row

    streams = [_spread_rows(text, rows_of, tokenizer, sequence_length, limit, seed) for text in documents.texts]
    rows = _taken(_interleave(streams, [text.size for text in documents.texts], origins), limit)
    if not filled:
        raise _too_short(documents, tally, sequence_length)
    return torch.from_numpy(np.stack(rows) if rows else np.empty((0, sequence_length), np.int64))


def padded_sequences(
    documents: Documents | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    limit: int | None = None,
    bos: Bos = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut documents into sequences that never mix them, padded on the right, for measuring.

    A text file, or a document that is alone, is cut into consecutive windows (a last, shorter one is kept). Of many
    documents, each gives its first ``sequence_length`` tokens, or all it has. Texts are read from their beginning, in
    order, and no further than `limit` asks for; several take turns as in `token_sequences`.

    Args:
        documents: Of `read_documents`, or strings.
        tokenizer: Their tokenizer.
        sequence_length: Tokens of a sequence at most, the prefix included.
        limit: At most so many sequences.
        bos: See `sequence_prefix`.

    Returns:
        Ids (N, longest), int64, and a bool mask of the same shape, False where there is padding (id 0).

    Raises:
        RequestError: All of the text together is shorter than one sequence, or it cannot be read.
    """
    documents, prefix = _checked(documents, tokenizer, sequence_length, bos)
    tally = _Tally()
    streams = [
        _windows(_encode(text.pieces(), tokenizer, sequence_length, limit), prefix, sequence_length, tally)
        for text in documents.texts
    ]
    rows = _taken(_interleave(streams, [text.size for text in documents.texts]), limit)
    stopped_early = limit is not None and len(rows) >= limit
    if not rows or (tally.tokens < sequence_length and not stopped_early):
        raise _too_short(documents, tally, sequence_length)
    _warn_of_unknown(np.concatenate(rows), tokenizer)
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(row)
        mask[index, : len(row)] = True
    return padded, mask


def _checked(
    documents: Documents | Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, bos: Bos
) -> tuple[Documents, tuple[int, ...]]:
    """Return the documents and the prefix of every sequence, which leaves room for text.

    Raises:
        RequestError: It does not.
    """
    check_sequence_length(sequence_length)
    prefix = sequence_prefix(tokenizer, bos)
    if len(prefix) >= sequence_length:
        raise RequestError(
            f"`sequence_length` {sequence_length} leaves no room behind the {len(prefix)} tokens in front of every "
            "sequence: give more"
        )
    return (documents if isinstance(documents, Documents) else documents_of(documents)), prefix


def _taken(rows: Iterator[list[int]], limit: int | None) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in islice(rows, limit)]


def _warn_of_unknown(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown == tokenizer.bos_token_id:
        return
    share = float((ids == unknown).mean())
    if share > UNKNOWN_SHARE_WARNING:
        print(
            f"warning: {share:.0%} of the tokens are unknown to this tokenizer, and figures on such text mean little: "
            "give the tokenizer that belongs to the text",
            file=sys.stderr,
        )


def _too_short(documents: Documents, tally: _Tally, sequence_length: int) -> RequestError:
    if not tally.tokens:
        return RequestError(f"{documents.name} holds no text: give a file with some")
    return RequestError(
        f"{documents.name} has {tally.tokens} tokens, fewer than one sequence of {sequence_length}: "
        "give more text with `text`, or a smaller `sequence_length`"
    )
