"""Texts by their names: which files, streams and data sets a name means, and how each of them is read."""

from __future__ import annotations

import glob
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mea_compress.errors import RequestError
from mea_compress.text.documents import DATASET, Documents, Source, Text, record_pieces
from mea_compress.text.formats import (
    ANY_TEXT,
    COMPRESSED,
    RECORDS,
    dataset_records,
    has_two_lines,
    json_block,
    json_records,
    opened,
    parquet_records,
    pipe,
    reason_of,
    require,
    running_block,
    running_file,
    standard_input,
    suffixes,
    utf8_decoder,
)

TextChoice = str | Path | Sequence[str | Path]
"""One text or several: a file, a directory, a pattern, `-` for standard input, or `dataset:NAME[:SPLIT]`."""

STDIN = "-"
"""The name of standard input."""
_PROBE = 1 << 13


def text_names(text: TextChoice) -> tuple[str, ...]:
    """Return the texts that a choice names, one or several."""
    return (str(text),) if isinstance(text, str | Path) else tuple(str(name) for name in text)


def read_documents(text: TextChoice) -> Documents:
    """Find the documents of one text or several; they are read when they are needed, and no more of them than that.

    - ``.jsonl``: a document a line, a string or an object with ``text``, ``messages`` (and ``tools``), or ``prompt``
      and ``completion`` (strings or messages). Messages become text by the tokenizer's chat template.
    - ``.parquet``: a document a row, of columns with these names. Needs pyarrow.
    - Any other file: one document, its text in UTF-8.
    - ``.gz`` or ``.zst`` behind these: the same. ``.zst`` needs zstandard.
    - A directory, or a pattern such as ``books/*.txt``: the documents of its files in alphabetical order; hidden files
      and what is no text are left out.
    - ``-``, or a pipe: standard input, as ``.jsonl`` where its first line is such a document, else as one document.
    - ``dataset:NAME`` or ``dataset:NAME:SPLIT``: a document a row of a data set of the hub or of a local directory, of
      the split ``train`` without another. Needs datasets.

    Args:
        text: A name, or several.

    Raises:
        RequestError: One of them is not there, cannot be read, or needs a library that is not installed. Later, while
            they are read: a file is not UTF-8, a line is no document.
    """
    names = text_names(text)
    if not names:
        raise RequestError(f"`text` names nothing: {ANY_TEXT}")
    if names.count(STDIN) > 1:
        raise RequestError("standard input (-) can be read once: name it once in `text`")
    return Documents(tuple(_find_text(name) for name in names))


def text_state(text: TextChoice) -> list[Any]:
    """Return what changes when a text does: name, size and time of change of every file.

    Raises:
        RequestError: One of them is not there.
    """
    states: list[Any] = []
    for name in text_names(text):
        if name == STDIN or name.startswith(DATASET):
            states.append(name)
            continue
        for path in _files(name):
            status = path.stat()
            states.append([str(path), status.st_size, status.st_mtime_ns] if path.is_file() else str(path))
    return states


def _find_text(name: str) -> Text:
    if name == STDIN:
        return Text("standard input", (Source("standard input", None, standard_input),))
    if name.startswith(DATASET):
        require("datasets", name)
        return Text(name, (Source(name, None, lambda: record_pieces(dataset_records(name))),))
    files = _files(name)
    if files == [Path(name)]:
        return Text(name, (_source(files[0]),))
    readable = [path for path in files if _looks_like_text(path)]
    if not readable:
        raise RequestError(f"{name} has {len(files)} files and none of them is text: {ANY_TEXT}")
    if len(readable) < len(files):
        others = len(files) - len(readable)
        print(f"{name}: {others} of {len(files)} files are left out, which are no UTF-8 text", file=sys.stderr)
    return Text(name, tuple(_source(path) for path in readable))


def _files(name: str) -> list[Path]:
    """Return the files of a name, those of a directory or pattern in alphabetical order.

    Raises:
        RequestError: There is none, or it is no file.
    """
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        found = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
        if found:
            return found
        what = "matches no file" if glob.has_magic(name) else "does not exist"
        raise RequestError(f"the text {name} {what}: {ANY_TEXT}") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"the text {name} cannot be read ({reason_of(error)}): {ANY_TEXT}") from None
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        raise RequestError(f"the text {name} is a device or socket, not a file: {ANY_TEXT}")
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise RequestError(f"the directory {name} has no files: {ANY_TEXT}")
    return found


def _looks_like_text(path: Path) -> bool:
    """Return whether a file among others is to be read: it can be, and its beginning is UTF-8 text without a NUL.

    Raises:
        RequestError: What reads it is not installed.
    """
    kind, compression = suffixes(path)
    if compression == ".zst":
        require("zstandard", str(path))
    if kind == ".parquet" and not compression:
        return True
    try:
        with opened(path) as file:
            beginning = utf8_decoder().decode(file.read(_PROBE))  # whose last character may be cut
    except (RequestError, UnicodeDecodeError):
        return False
    return bool(beginning) and "\0" not in beginning


def _source(path: Path) -> Source:
    """Return how a file is read, by its suffixes.

    Raises:
        RequestError: It is empty, or what reads it is not installed.
    """
    kind, compression = suffixes(path)
    if not path.is_file():
        return Source(str(path), None, lambda: pipe(path))
    size = path.stat().st_size
    if not size:
        raise RequestError(f"{path} is empty: give a file with text")
    if compression == ".zst":
        require("zstandard", str(path))
    if kind == ".parquet" and not compression:
        require("pyarrow", str(path))
        return Source(str(path), size, lambda: record_pieces(parquet_records(path)))
    records = kind in RECORDS
    whole = (lambda: record_pieces(json_records(path))) if records else (lambda: running_file(path))
    if compression:
        return Source(str(path), COMPRESSED[compression] * size, whole)
    if records:
        # A record is read whole, so that a single one cannot be read in blocks.
        several = has_two_lines(path)
        return Source(str(path), size, whole, (lambda first, end: json_block(path, first, end)) if several else None)
    return Source(str(path), size, whole, lambda first, end: running_block(path, first, end))
