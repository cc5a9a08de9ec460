"""Results that show themselves: as text where they are printed, as tables in a notebook."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import Any


class Shown:
    """Lets a result be printed, and shown by a notebook, as its `report` says."""

    def report(self) -> str:
        """Return what people read: paragraphs and Markdown tables."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        return self.report()

    def _repr_html_(self) -> str:
        return to_html(self.report())


def to_html(text: str) -> str:
    r"""Return paragraphs and Markdown tables as HTML.

    Example:
        >>> to_html("| a | b |\n|---|---|\n| 1 | 2 |")
        '<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>'
    """
    parts = []
    for is_table, lines in groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            parts.append(_table(list(lines)))
        else:
            parts += [f"<p>{escape(line)}</p>" for line in lines if line.strip()]
    return "\n".join(parts)


def _table(lines: list[str]) -> str:
    rows = []
    for index, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if all(set(cell) <= set("-:") and cell for cell in cells):
            continue
        tag = "th" if index == 0 else "td"
        rows.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return "<table>" + "".join(rows) + "</table>"


__all__ = ["Shown", "to_html"]
