"""What people read of a sweep: a table, a file for spreadsheets. Plain data in, text out."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from io import StringIO
from typing import Any

from mea_compress.report.tables import format_bytes, table

_COLUMNS = (
    "name",
    "method",
    "key_composition",
    "value_composition",
    "share",
    "budget",
    "kv_bytes_per_token",
    "kl",
    "cross_entropy",
    "perplexity",
    "top1_agreement",
    "predicted_kl",
    "parameters",
    "decode_tokens_per_second",
    "seconds",
    "pareto",
    "reason",
)


def sweep_report(sweep: Mapping[str, Any]) -> str:
    """Report a sweep (its JSON): a row for each point, the original last, and what could not be made."""
    reference = sweep["reference"]
    whole = reference["kv_bytes_per_token"]
    predicted = any(point["predicted_kl"] is not None for point in sweep["points"])
    rows: list[list[object]] = []
    for point in sweep["points"]:
        if point["reason"] is None:
            promise = point["predicted_kl"]
            rows.append(
                [
                    point["name"] + (" *" if point["pareto"] else ""),
                    format_bytes(point["kv_bytes_per_token"]),
                    f"{100 * point['kv_bytes_per_token'] / whole:.3g} %",
                    f"{point['kl']:.4f}",
                    *([None if promise is None else f"{promise:.4f}"] if predicted else []),
                    f"{point['perplexity']:.3f}",
                    f"{100 * point['top1_agreement']:.2f} %",
                ]
            )
    extra: list[object] = [None] if predicted else []
    rows.append(
        ["original", format_bytes(whole), "100 %", None, *extra, f"{reference['perplexity']:.3f}", None],
    )
    headers = ["", "KV cache per token", "share", "KL (nats/token)", *(["predicted"] if predicted else [])]
    parts = [table(rows, [*headers, "perplexity", "top-1 agreement"])]
    if any(point["pareto"] for point in sweep["points"]):
        parts.append("* No other has both a smaller cache and a smaller KL.")
    parts += [f"{point['name']} cannot be made: {point['reason']}" for point in sweep["points"] if point["reason"]]
    return "\n\n".join(parts)


def sweep_csv(sweep: Mapping[str, Any]) -> str:
    """Return the points of a sweep (its JSON) as CSV, with the first and second command of each in two columns."""
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*_COLUMNS, "compress_command", "evaluate_command"])
    for point in sweep["points"]:
        rows.writerow([*(point[name] for name in _COLUMNS), *point["commands"]])
    return text.getvalue()


__all__ = ["sweep_csv", "sweep_report"]
