"""The formats of text: running text, records of JSON lines, tables and data sets, plain or compressed, and streams."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from mea_compress.errors import RequestError, first_line
from mea_compress.text.documents import DATASET, PIECE, Chat, Piece, last_word, record_pieces, safe_cut

ANY_TEXT = "give a text file, .jsonl or .parquet, a directory of them, or dataset:NAME"
"""The remedy for what is no text."""
COMPRESSED = {".gz": 4, ".zst": 4}
"""Suffixes of compressed files, and how much larger the text in them is, about."""
RECORDS = (".jsonl", ".ndjson")
"""Suffixes of files with a JSON document a line."""
_RECORD = 'a string, or an object with "text", "messages", or "prompt" and "completion"'
_COLUMNS = (["text"], ["messages", "tools"], ["prompt", "completion", "tools"])
_LONGEST_FIRST_LINE = 1 << 24


def utf8_decoder() -> codecs.IncrementalDecoder:
    """Return a decoder of UTF-8 that comes in parts, with or without a byte order mark."""
    return codecs.getincrementaldecoder("utf-8-sig")()


def suffixes(path: Path) -> tuple[str, str]:
    """Return what suffix says what a file holds, in lower case, and the suffix of its compression or nothing."""
    last = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = last.pop() if last and last[-1] in COMPRESSED else ""
    return (last[-1] if last else ""), compression


def require(library: str, name: str) -> None:
    """Raise `RequestError` unless a library of an extra can be imported."""
    from importlib.util import find_spec

    if find_spec(library) is None:
        raise RequestError(f"{name} needs {library}, which is not installed: pip install 'mea-compress[{library}]'")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed, for reading; what it is refused for while it is read is a `RequestError` too.

    Raises:
        RequestError: It cannot be read, or is damaged.
    """
    compression = suffixes(path)[1]
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        with open(path, "rb") as file:
            if compression == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif compression == ".zst":
                import zstandard

                damage = (*damage, zstandard.ZstdError)
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                yield io.BufferedReader(cast(io.RawIOBase, reader))
            else:
                yield file
    except damage as error:
        remedy = "the file is damaged, get it again" if compression else "give a file that this user may read"
        raise RequestError(f"{path} cannot be read ({reason_of(error)}): {remedy}") from error


def reason_of(error: Exception) -> str:
    """Return what an error says, in a line."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return first_line(error)


def _not_utf8(place: str) -> RequestError:
    return RequestError(f"{place} is not UTF-8 text: convert it first")


def running_file(path: Path) -> Iterator[Piece]:
    """Yield a file as the pieces of one document."""
    with opened(path) as file:
        yield from _running_pieces(file, str(path))


def _running_pieces(file: BinaryIO, name: str) -> Iterator[Piece]:
    """Yield a stream of bytes as the pieces of one document."""
    reader = io.IncrementalNewlineDecoder(utf8_decoder(), translate=True)
    text, lines, begins, data = "", 0, True, b" "
    while data:
        data = file.read(PIECE)
        try:
            text += reader.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = 1 + lines + text.count("\n") + error.object[: error.start].count(b"\n")
            raise _not_utf8(f"line {line} of {name}") from error
        if begins and "\0" in text:
            raise RequestError(f"{name} has NUL characters, so it is no text: {ANY_TEXT}")
        if data and len(text) < PIECE:
            continue
        cut = safe_cut(text) if data else len(text)
        if text[:cut].strip() or not begins:
            yield Piece(text[:cut], begins, True)
            begins = False
        lines += text.count("\n", 0, cut)
        text = text[cut:]


def running_block(path: Path, first: int, end: int) -> Iterator[Piece]:
    """Yield the text between two positions of a file as one piece: from its first line, else word, to its last word.

    A line is looked for in the first quarter alone, so that most of the text is left.
    """
    with opened(path) as file:
        file.seek(first)
        data = file.read(end - first)
        last = not file.read(1)
    text = data.removeprefix(b"\xef\xbb\xbf") if not first else data.lstrip(bytes(range(0x80, 0xC0)))
    try:
        content = text.decode("utf-8")
    except UnicodeDecodeError as error:
        if last or error.end < len(text):
            raise _not_utf8(f"line {_line_at(path, first + len(data) - len(text) + error.start)} of {path}") from error
        content = text[: error.start].decode("utf-8")
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    if first:
        line = content.find("\n", 0, len(content) // 4) + 1
        content = content[line or max(0, content.find(" ", 0, len(content) // 4)) :]
    if not last:
        content = content[: last_word(content)]
    if content.strip():
        yield Piece(content, True, True)


def _line_at(path: Path, position: int) -> int:
    """Return the number of the line in which a position in bytes lies."""
    lines = 1
    with open(path, "rb") as file:
        while position > 0 and (data := file.read(min(position, 1 << 20))):
            lines += data.count(b"\n")
            position -= len(data)
    return lines


def json_records(path: Path) -> Iterator[str | Chat]:
    """Yield the documents of a file with one a line."""
    with opened(path) as file:
        yield from _records_of_lines(file, str(path))


def _records_of_lines(lines: Iterable[bytes], name: str) -> Iterator[str | Chat]:
    for number, line in enumerate(lines, start=1):
        record = _json_record(line, lambda: f"line {number} of {name}")  # noqa: B023 - called before the next line
        if record is not None:
            yield record


def _json_record(line: bytes, place: Callable[[], str]) -> str | Chat | None:
    """Return the document of a line, None where it is blank."""
    if not line.strip():
        return None
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(place()) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place()} is not JSON: write {_RECORD} on it") from error
    return _document(value, place)


def _document(value: object, place: Callable[[], str]) -> str | Chat:
    """Return the document of a JSON value or of a row.

    Raises:
        RequestError: It is none.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half of a surrogate pair
    if isinstance(value, Mapping):
        tools = value.get("tools") or None
        if isinstance(tools, str):  # a column of one type cannot hold schemas as they are
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{place()} has tools that are not JSON: write them as a list") from error
        prompt, completion = value.get("prompt"), value.get("completion")
        if isinstance(value.get("text"), str):
            return _document(value["text"], place)
        if _are_messages(value.get("messages")):
            return Chat(list(value["messages"]), tools, place())
        if isinstance(prompt, str) and isinstance(completion, str):
            return _document(prompt + completion, place)
        if _are_messages(prompt) and _are_messages(completion):
            return Chat([*prompt, *completion], tools, place())  # type: ignore[misc]  # both are lists
    raise RequestError(f"{place()} is no document: write {_RECORD}")


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def json_block(path: Path, first: int, end: int) -> Iterator[Piece]:
    """Yield the records whose lines begin between two positions of a file."""
    with opened(path) as file:
        if first:  # the line that lies over the position begins before it
            file.seek(first - 1)
            file.readline()
        while (position := file.tell()) < end and (line := file.readline()):
            record = _json_record(line, lambda: f"line {_line_at(path, position)} of {path}")
            if record is not None and (not isinstance(record, str) or record.strip()):
                yield Piece(record)


def has_two_lines(path: Path) -> bool:
    """Return whether text follows the first line that has some."""
    with opened(path) as file:
        ended = seen = False
        while part := file.readline(1 << 20):
            if ended and part.strip():
                return True
            seen = seen or bool(part.strip())
            ended = seen and part.endswith(b"\n")
    return False


def parquet_records(path: Path) -> Iterator[str | Chat]:
    """Yield the documents of a table, a few rows in memory."""
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = next(
                (
                    [name for name in choice if name in names]
                    for choice in _COLUMNS
                    if all(name in names for name in choice if name != "tools")
                ),
                None,
            )
            if columns is None:
                raise RequestError(
                    f"{path} has the columns {', '.join(names[:8])}, and none with text: name one text, messages, or "
                    "two prompt and completion"
                )
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(row, f"row {number} of {path}")
    except (arrow.ArrowException, OSError) as error:
        raise RequestError(f"{path} cannot be read ({reason_of(error)}): the file is damaged, get it again") from error


def dataset_records(name: str) -> Iterator[str | Chat]:
    """Yield the rows of a data set of a hub or of a local directory, as `datasets` streams them."""
    import datasets

    repository, _, split = name.removeprefix(DATASET).partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _row(row, f"row {number} of {name}")
    except RequestError:
        raise
    except Exception as error:  # of the hub, the network, the data set's own files
        raise RequestError(
            f"{name} cannot be read ({reason_of(error)}): check its name and split, and that the hub can be reached"
        ) from error


def _row(row: Mapping[str, Any], place: str) -> str | Chat:
    """Return the document of a row; an empty one where its text is missing, as rows of tables may be."""
    if "text" in row and row["text"] is None:
        return ""
    return _document(row, lambda: place)


def standard_input() -> Iterator[Piece]:
    """Yield the documents of standard input."""
    yield from _stream(sys.stdin.buffer, "standard input")


def pipe(path: Path) -> Iterator[Piece]:
    """Yield the documents of a named pipe."""
    with opened(path) as file:
        yield from _stream(file, str(path))


def _stream(file: BinaryIO, name: str) -> Iterator[Piece]:
    """Yield the documents of a stream, whose kind its first line tells."""
    lines = iter(file.readline, b"")
    head: list[bytes] = []
    while line := file.readline(_LONGEST_FIRST_LINE):
        head.append(line)
        if line.strip():
            break
    try:
        _json_record(head[-1] if head else b"", lambda: name)
        is_json = bool(head)
    except RequestError:
        is_json = False
    if is_json:
        yield from record_pieces(_records_of_lines((line for part in (head, lines) for line in part), name))
    else:
        yield from _running_pieces(cast(BinaryIO, _Joined(b"".join(head), file)), name)


class _Joined:
    """A stream of which some bytes have been read already."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self.head, self.rest = head, rest

    def read(self, size: int) -> bytes:
        """Return some bytes, none at the end."""
        head, self.head = self.head, b""
        return head or self.rest.read(size)
