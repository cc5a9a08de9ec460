"""What people read of measurements: losses, caches, speed, tasks, retrieval, agreement. Plain data in, text out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_compress.report.tables import format_bytes, table

_FIGURES: Sequence[tuple[str, str, Callable[[Any], str]]] = (
    ("tokens", "tokens", lambda value: f"{value:,}"),
    ("cross-entropy (nats/token)", "cross_entropy", lambda value: f"{value:.4f}"),
    ("perplexity", "perplexity", lambda value: f"{value:.3f}"),
    ("KL from the reference (nats/token)", "kl", lambda value: f"{value:.4f}"),
    ("top-1 agreement", "top1_agreement", lambda value: f"{100 * value:.2f} %"),
    ("KV cache per token, measured", "kv_bytes_per_token", format_bytes),
    ("decoded tokens per second", "decode_tokens_per_second", lambda value: f"{value:.1f}"),
    ("ids in front of every sequence", "prefix_ids", lambda value: ",".join(map(str, value)) or "–"),
)


def evaluation_report(evaluation: Mapping[str, Any]) -> str:
    """Report a measurement (the JSON of `evaluate`), and the reference's next to it where there is one."""
    return evaluations_report({"checkpoint": evaluation})


def evaluations_report(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Report measurements (the JSON of `evaluate` by checkpoint), a column each, then the reference's."""
    columns = model_columns(evaluations)
    rows: list[list[object]] = []
    for title, key, form in _FIGURES:
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append([title, *(None if value is None else form(value) for value in values)])
    parts = [table(rows, ["", *columns])]
    parts += [_speed_report(column["speed"], name) for name, column in columns.items() if column.get("speed")]
    parts += [section(columns) for section in (_task_report, _retrieval_report) if section(columns)]
    agreements = {name: column["agreement"] for name, column in columns.items() if column.get("agreement")}
    return "\n\n".join([*parts, *([_agreement_report(agreements)] if agreements else [])])


def model_columns(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return evaluations by the name to show, with what they say of the reference last where there is one.

    Checkpoints are called by the last part of their path where that tells them apart.
    """
    short = [Path(name).name for name in evaluations]
    names = short if len(set(short)) == len(short) and "reference" not in short else list(evaluations)
    reference = next(iter(evaluations.values())).get("reference")
    return dict(zip(names, evaluations.values(), strict=True)) | ({"reference": reference} if reference else {})


def _speed_report(timings: Sequence[Mapping[str, Any]], checkpoint: str) -> str:
    """Lay out timings, a row for each context, batch and model."""
    rows = [
        [
            f"{timing['context']:,}",
            timing["batch"],
            timing["model"].replace("checkpoint", checkpoint),
            f"{timing['prefill_seconds']:.3f} s",
            f"{timing['decode_milliseconds']:.2f} ms",
            format_bytes(timing["cache_bytes"]),
            None if timing["peak_bytes"] is None else format_bytes(timing["peak_bytes"]),
        ]
        for timing in timings
    ]
    return table(rows, ["context", "batch", "model", "prefill", "decoding a token", "cache", "peak above the model"])


def _task_report(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out scores with their standard errors, a row for each task and metric; empty where there are none."""
    scores = {name: column["tasks"] for name, column in columns.items() if column.get("tasks")}
    rows: list[list[object]] = []
    for index, first in enumerate(next(iter(scores.values()), ())):
        shots = f", {first['few_shot']} shots" if first["few_shot"] else ""
        cells = [_score(column[index]) for column in scores.values()]
        rows.append([f"{first['task']}{shots}", first["metric"], f"{first['examples']:,}", *cells])
    return table(rows, ["task", "metric", "examples", *scores]) if rows else ""


def _score(score: Mapping[str, Any]) -> str:
    error = score["standard_error"]
    return f"{score['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _retrieval_report(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out exact matches by depth, a row for each task, length and model; empty where there are none."""
    scores = {name: column["retrieval"] for name, column in columns.items() if column.get("retrieval")}
    first = next(iter(scores.values()), ())
    depths = sorted({cell["depth"] for cell in first})
    rows: list[list[object]] = []
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in first):
        for name, cells in scores.items():
            row = {c["depth"]: c for c in cells if (c["task"], c["length"]) == (task, length)}
            count = sum(cell["prompts"] for cell in row.values())
            found = sum(cell["prompts"] * cell["exact_match"] for cell in row.values())
            shares = [f"{100 * row[depth]['exact_match']:.0f} %" for depth in depths]
            rows.append([task, f"{length:,}", name, *shares, f"{100 * found / count:.0f} %", count])
    headers = ["retrieval", "tokens", "model", *(f"at {100 * depth:.0f} %" for depth in depths), "all", "prompts"]
    return table(rows, headers) if rows else ""


def _agreement_report(agreements: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out how long greedy decoding stays with the reference, a row for each checkpoint."""
    rows = [
        [
            name,
            f"{agreement['mean']:.1f}",
            f"{agreement['median']:g}",
            f"{100 * agreement['never_differs']:.0f} %",
            agreement["tokens"],
            agreement["prompts"],
        ]
        for name, agreement in agreements.items()
    ]
    headers = ["greedy tokens that are the reference's", "mean", "median", "never differs", "of", "prompts"]
    return table(rows, headers)


__all__ = ["evaluation_report", "evaluations_report", "model_columns"]
