"""Text that every machine has: the running Python's language topics and the sources of its library."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from mea_compress.errors import RequestError

# Not prose, not the library's code, or not installed everywhere.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings", "lib2to3", "pydoc_data", "__pycache__"}


def library_documents(limit: int) -> list[str]:
    """Return documents of the running Python: its language topics, and its modules' sources with their docstrings.

    Args:
        limit: UTF-8 bytes to take, at most.

    Returns:
        Documents without duplicates, in an order that depends on their contents alone.

    Raises:
        RequestError: The library is not installed as text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    by_digest = {hashlib.sha256(text.encode()).hexdigest(): text for text in _texts(root) if text.strip()}
    documents: list[str] = []
    size = 0
    for _, text in sorted(by_digest.items()):
        size += len(text.encode())
        if size > limit and documents:
            break
        documents.append(text)
    if len(documents) < 2:
        raise RequestError(
            f"{root} holds no Python sources to train on; run the demo with a Python that has its library as .py files"
        )
    return documents


def split_documents(documents: list[str], held_out_share: float) -> tuple[list[str], list[str]]:
    """Return training and held-out documents; the first ones are held out, until their share of bytes is reached."""
    sizes = [len(text.encode()) for text in documents]
    held_out_bytes, count = held_out_share * sum(sizes), 1
    while count < len(documents) - 1 and sum(sizes[:count]) < held_out_bytes:
        count += 1
    return documents[count:], documents[:count]


def _texts(root: Path) -> Iterator[str]:
    yield from _topics(root / "pydoc_data" / "topics.py")
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            try:
                yield path.read_text(encoding="utf-8").replace("\r\n", "\n")
            except (OSError, UnicodeError):
                continue


def _topics(path: Path) -> Iterable[str]:
    """Return the texts behind Python's ``help()``: a dictionary of strings, read without running the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, SyntaxError):
        return []
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    return [text for table in tables for text in ast.literal_eval(table).values() if isinstance(text, str)]
