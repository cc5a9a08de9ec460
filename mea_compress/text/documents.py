"""Documents as they are read: pieces of some ten thousand characters, in order or in blocks spread over a text."""

from __future__ import annotations

import random
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import Any, cast

PIECE = 1 << 16
"""Characters of a piece, about."""
DATASET = "dataset:"
"""What a name begins with that means a data set of a hub or directory."""
_CHAT_CHARACTERS = 1000


@dataclass(frozen=True)
class Chat:
    """A conversation, which becomes text by a tokenizer's chat template.

    Attributes:
        messages: Mappings with `role` and `content`, in order.
        tools: Descriptions of the tools that the template shows, or None.
        place: File and line, for messages.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    place: str


@dataclass(frozen=True)
class Piece:
    """A part of a document; the parts of one document follow one another.

    Attributes:
        content: Its text, or the whole conversation.
        begins: A document begins with it.
        running: The document is read to its end; otherwise, one of many, it gives its beginning.
    """

    content: str | Chat
    begins: bool = True
    running: bool = False


@dataclass(frozen=True)
class Source:
    """A file, or what is read like one.

    Attributes:
        name: What messages call it.
        size: Bytes of text, about; None where nobody knows.
        pieces: Reads it from its beginning.
        block: Reads what begins between two positions in bytes; None where it can be read in order only.
    """

    name: str
    size: int | None
    pieces: Callable[[], Iterator[Piece]]
    block: Callable[[int, int], Iterator[Piece]] | None = None


@dataclass(frozen=True)
class Text:
    """One text as it was named: a file, or the files of a directory or of a pattern, in order.

    Attributes:
        name: As it was named.
        sources: At least one.
    """

    name: str
    sources: tuple[Source, ...]

    @property
    def size(self) -> int | None:
        """Bytes of text, about; None where nobody knows."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(cast("list[int]", sizes))

    @property
    def can_be_spread(self) -> bool:
        """Whether some of it can be read without what lies before."""
        return self.size is not None and any(source.block for source in self.sources)

    def pieces(self) -> Iterator[Piece]:
        """Yield all of it, in order."""
        for source in self.sources:
            yield from source.pieces()

    def spread(self, block: int, seed: int) -> Iterator[Piece]:
        """Yield all of it in blocks, each once; any number of the first blocks lies evenly over the text.

        What can be read in order only gives its next block whenever one of its blocks is due.

        Args:
            block: Bytes of a block.
            seed: Where it begins.
        """
        counts = [-(-(source.size or 0) // block) for source in self.sources]
        ends = list(accumulate(counts))
        streams: dict[int, Iterator[Piece]] = {}
        for index in spread_order(ends[-1], seed):
            number = bisect_right(ends, index)
            source = self.sources[number]
            if source.block is not None:
                first = (index - ends[number] + counts[number]) * block
                yield from source.block(first, first + block)
            else:
                if number not in streams:
                    streams[number] = source.pieces()
                yield from _characters(streams[number], block)
        for stream in streams.values():  # larger than was thought
            yield from _characters(stream, sys.maxsize)


@dataclass(frozen=True)
class Documents:
    """The documents of one text or several; see `read_documents`.

    Attributes:
        texts: At least one.
    """

    texts: tuple[Text, ...]

    @property
    def name(self) -> str:
        """What messages call them."""
        return ", ".join(text.name for text in self.texts)

    @property
    def title(self) -> str:
        """What reports call them: files without their directories."""
        names = (text.name for text in self.texts)
        return ", ".join(name if name.startswith(DATASET) else Path(name).name for name in names)


def documents_of(documents: Sequence[str]) -> Documents:
    """Return documents that are in memory; one alone is read to its end."""
    size = sum(len(document.encode("utf-8", "replace")) for document in documents)
    return Documents((Text("the text", (Source("the text", size, lambda: record_pieces(documents)),)),))


def record_pieces(records: Iterable[str | Chat]) -> Iterator[Piece]:
    """Yield records as documents; one that is alone is read to its end."""
    first: str | Chat | None = None
    alone = True
    for record in records:
        if isinstance(record, str) and not record.strip():
            continue
        if first is None:
            first = record
            continue
        if alone:
            yield Piece(first)
            alone = False
        yield Piece(record)
    if alone and first is not None:
        yield Piece(first, running=True)


def spread_order(count: int, seed: int) -> Iterator[int]:
    """Yield the numbers below a count, each once; any number of the first ones lies evenly over all.

    They are multiples of the golden ratio's share of the count, from a place that the seed chooses.
    """
    step = max(1, round(count * 0.6180339887498949))
    while gcd(step, count) > 1:
        step += 1
    first = random.Random(seed).randrange(count) if count else 0
    return ((first + index * step) % count for index in range(count))


def safe_cut(text: str) -> int:
    """Return where to end a piece so that a tokenizer makes the same of its parts: before a line, else between words.

    Only the second half of the text is looked at; without such a place there it is the end.
    """
    end, half = len(text), len(text) // 2
    while (newline := text.rfind("\n", half, end)) >= 0:
        if newline + 1 < len(text) and not text[newline + 1].isspace():
            return newline + 1
        end = newline
    return last_word(text)


def last_word(text: str) -> int:
    """Return where the last space between two words is, in the second half of a text; without one there its end."""
    end = len(text)
    while (space := text.rfind(" ", len(text) // 2, end)) >= 0:
        if 0 < space < len(text) - 1 and not text[space - 1].isspace() and not text[space + 1].isspace():
            return space
        end = space
    return len(text)


def _characters(pieces: Iterator[Piece], count: int) -> Iterator[Piece]:
    """Yield pieces until they have so many characters together; the first one begins a document, as a block does."""
    first = True
    for piece in pieces:
        yield replace(piece, begins=True) if first else piece
        first = False
        count -= len(piece.content) if isinstance(piece.content, str) else _CHAT_CHARACTERS
        if count <= 0:
            return
