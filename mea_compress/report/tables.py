"""What people read: tables, units and reports of plans, compressions and measurements. Plain data in, text out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"^[+\-−]?\d[\d,.]*(e[+-]?\d+)?( ?(%|×|B|[KMGT]iB|[KMBT]|m?s))?$")
_WORST_LAYERS = 5


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Lay out a Markdown table, padded so that it also reads well as plain text.

    Args:
        rows: Cells by row, each row as long as `headers`; None shows as a dash.
        headers: Column titles.

    Returns:
        Lines without a final newline. Columns that hold only numbers (units and signs allowed) are right-aligned.
    """
    cells = [["–" if cell is None else one_line(cell) for cell in row] for row in rows]
    numeric = [
        bool(cells) and all(row[column] == "–" or _NUMBER.match(row[column]) for row in cells)
        for column in range(len(headers))
    ]
    widths = [
        max(3, len(header), *(len(row[column]) for row in cells)) if cells else max(3, len(header))
        for column, header in enumerate(headers)
    ]

    def line(parts: Sequence[str]) -> str:
        padded = [
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(
        "-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([line(list(headers)), rule + "|", *(line(row) for row in cells)])


def format_bytes(size: float) -> str:
    """Return bytes in the largest binary unit that leaves at least 1: `512 B`, `1.5 KiB`, `2.25 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if value == int(value) else 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a time as people say it: `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def format_count(number: float) -> str:
    """Return a count in thousands, millions or billions to three digits: `512`, `105 M`, `1.24 B`."""
    value = float(number)
    for unit in ("", " K", " M", " B", " T"):
        if abs(value) < 999.5 or unit == " T":
            break
        value /= 1000
    return f"{value:.3g}{unit}" if abs(value) < 999.5 else f"{value:.0f}{unit}"


def key_value_table(values: Mapping[str, Any]) -> str:
    """Lay out any flat or nested mapping of names to values as a table of two columns.

    Keys that speak of bytes are shown in units, whole numbers with separators; nested keys are joined by spaces, and
    anything longer than a few items is left to the JSON form.
    """
    return table(_flatten(values), ["", "value"])


def plan_report(plan: Mapping[str, Any]) -> str:
    """Report a plan (the JSON of `plan`): a summary, and one row for each run of layers that are treated alike."""
    rows: list[list[object]] = []
    runs: list[tuple[dict[str, Any], int, int]] = []
    for layer in plan["layers"]:
        treatment = {key: value for key, value in layer.items() if key != "layer"}
        if runs and runs[-1][0] == treatment and runs[-1][2] == layer["layer"] - 1:
            runs[-1] = (treatment, runs[-1][1], layer["layer"])
        else:
            runs.append((treatment, layer["layer"], layer["layer"]))
    for layer, first, last in runs:
        cache = layer["kv_bytes_per_token"]
        rows.append(
            [
                str(first) if first == last else f"{first}-{last}",
                _composed(layer["key_components"], layer["key_composition"]),
                _composed(layer["value_components"], layer["value_composition"]),
                format_bytes(cache["before"]),
                format_bytes(cache["after"]),
            ]
        )
    layers = table(rows, ["layers", "keys", "values", "KV/token before", "after"])
    return "\n\n".join([before_after(plan), layers, *_whole_caches(plan)])


def profile_report(profile: Mapping[str, Any]) -> str:
    """Report a profile (the JSON of `profile`): a row a layer, the KL at each share of each side's width."""
    points = profile["points"]
    columns = list(dict.fromkeys((point["side"], point["components"]) for point in points))
    columns.sort(key=lambda column: (column[0] != "key", column))
    costs = {(point["layer"], point["side"], point["components"]): point["kl"] for point in points}
    rows: list[list[object]] = []
    for layer in sorted({point["layer"] for point in points}):
        found = [costs.get((layer, *column)) for column in columns]
        rows.append([layer, *("" if cost is None else f"{max(cost, 0.0):.2g}" for cost in found)])
    names = {"key": "keys", "value": "values", "both": "both"}
    heading = [f"{names[side]} {components:.3g}" for side, components in columns]
    about = (
        f"KL in nats per token when one side of one layer alone is compressed to so many component heads of "
        f"{profile['heads']}: {profile['key_composition']} keys, {profile['value_composition']} values, fit "
        f"{profile['fit']}, {profile['tokens']:,} tokens."
    )
    if profile["floor"]:
        about += f" Rounding makes {profile['floor']:.2g}, taken off."
    return "\n\n".join([about, table(rows, ["layer", *heading])])


def _whole_caches(plan: Mapping[str, Any]) -> list[str]:
    """Return a table of whole caches at some lengths, from the JSON of `plan` or `inspect`, where it has them."""
    sizes = plan.get("cache", [])
    if not sizes:
        return []
    batch = sizes[0]["batch"]
    title = "KV cache" if batch == 1 else f"KV cache, {batch} sequences"
    columns = [key for key in ("before", "after", "bytes") if key in sizes[0]]
    rows = [[f"{size['tokens']:,} tokens", *(format_bytes(size[key]) for key in columns)] for size in sizes]
    return [table(rows, [title, *("" if key == "bytes" else key for key in columns)])]


def inspection_report(inspection: Mapping[str, Any]) -> str:
    """Report a checkpoint (the JSON of `inspect`): what it is, one row for each run of like layers, whole caches."""
    rows: list[list[object]] = []
    first = 0
    layers = inspection["attention"]
    for index, layer in enumerate(layers):
        following = layers[index + 1] if index + 1 < len(layers) else {}
        if {**following, "layer": None} == {**layer, "layer": None}:
            continue
        rows.append(
            [
                str(first) if first == index else f"{first}-{index}",
                _composed(layer["key_components"], layer["key_composition"]),
                _composed(layer["value_components"], layer["value_composition"]),
                f"{layer['sliding_window']:,}" if layer["sliding_window"] else None,
                format_bytes(layer["kv_bytes_per_token"]),
            ]
        )
        first = index + 1
    table_of_layers = table(rows, ["layers", "keys", "values", "window", "KV/token"])
    plain = {key: value for key, value in inspection.items() if key not in ("cache", "attention")}
    return "\n\n".join([key_value_table(plain), table_of_layers, *_whole_caches(inspection)])


def before_after(plan: Mapping[str, Any]) -> str:
    """Compare cache and parameters before and after, from the JSON of `plan`."""
    cache, parameters = plan["kv_bytes_per_token"], plan["parameters"]
    rows: list[list[object]] = [
        ["KV cache per token", *(format_bytes(cache[key]) for key in ("before", "after")), share(cache)],
        ["parameters", *(format_count(parameters[key]) for key in ("before", "after")), share(parameters)],
    ]
    for title, key in (
        ("weights on disk", "output_bytes"),
        ("memory to compress, above the libraries'", "memory_bytes"),
        ("memory of heal afterwards, activations left out", "heal_memory_bytes"),
    ):
        if key in plan:
            rows.append([title, None, format_bytes(plan[key]), None])
    return table(rows, ["", "before", "after", "share"])


def fidelity_report(fidelity: Mapping[str, Any]) -> str:
    """Report how close a compression is (``fidelity`` of compression.json): its worst layers, and what was verified.

    Layers are ordered by the larger relative error of keys and values; refined ones also show the error of the
    attention's output before and after refinement.
    """
    layers = fidelity.get("layers", {})
    worst = sorted(layers, key=lambda layer: (-_largest_error(layers[layer]), int(layer)))[:_WORST_LAYERS]
    headers = ["layer", "key relative error", "value relative error"]
    rows = [[layer, *(layers[layer].get(f"{side}_relative_error") for side in ("key", "value"))] for layer in worst]
    if any("refinement" in layers[layer] for layer in worst):
        headers += ["output error before refinement", "after"]
        for row, layer in zip(rows, worst, strict=True):
            row += [layers[layer].get("refinement", {}).get(moment) for moment in ("before", "after")]
    parts = [table([[_shown("", cell) for cell in row] for row in rows], headers)] if rows else []
    if len(layers) > len(worst):
        parts.append(f"The {len(worst)} layers with the largest errors; compression.json has all {len(layers)}")
    verified = {name: value for name, value in fidelity.items() if name != "layers"}
    if "texts" in verified.get("healing", {}):
        parts.append(_texts_report(verified["healing"]["texts"]))
    return "\n\n".join([*parts, *([key_value_table(verified)] if verified else [])])


def _texts_report(texts: Sequence[Mapping[str, Any]]) -> str:
    """Say what each text has lost, the furthest first, and how far it is from the closest."""
    ordered = sorted(texts, key=lambda text: -text["kl_after"])
    rows: list[list[object]] = [[text["text"], text["kl_before"], text["kl_after"], text["tokens"]] for text in ordered]
    cells = [[_shown("", cell) for cell in row] for row in rows]
    worst, best = ordered[0], ordered[-1]
    times = worst["kl_after"] / best["kl_after"] if best["kl_after"] > 0 else math.inf
    return "\n\n".join(
        (
            table(cells, ["held-out text", "KL before healing", "after", "tokens"]),
            f"{worst['text']} loses {times:.1f} times what {best['text']} does",
        )
    )


def _largest_error(report: Mapping[str, Any]) -> float:
    return max(report.get(f"{side}_relative_error") or 0.0 for side in ("key", "value"))


def stock_outlook(outlook: Mapping[str, Any]) -> str:
    """Say what a stock export costs and saves and what to mind about engines, or why there can be none."""
    if "reason" in outlook:
        return f"Stock export: not possible, {outlook['reason']}."
    width, added = outlook["query_and_output_width"], outlook["weight_bytes_added"]
    saved, tokens = outlook["kv_bytes_saved_per_token"], outlook["saves_memory_from_tokens"]
    if added <= 0:
        weights = f"weights shrink by {format_bytes(-added)}" if added else "weights stay the size they are"
    else:
        weights = f"q_proj and o_proj grow {width:g} times, weights by {format_bytes(added)}"
    since = "never for one sequence" if tokens is None else f"from {tokens:,} cached tokens on"
    since = "always" if tokens == 0 else since
    heads = head_counts(outlook["key_value_heads"])
    costs = (
        f"Stock export: {heads} key/value head(s) of {outlook['head_dim']} channels; {weights}, the cache by "
        f"{format_bytes(saved)} less a token; memory is saved {since}."
    )
    warning = outlook.get("warning")
    return f"{costs} {warning}" if warning else costs


def head_counts(heads: int | Sequence[int]) -> str:
    """Return the number of heads of all layers, or of those with the fewest and the most."""
    return str(heads) if isinstance(heads, int) else f"{min(heads)} to {max(heads)}"


def one_line(cell: object) -> str:
    """Return a value as text on one line that cannot end a table's cell."""
    return " ".join(str(cell).split()).replace("|", "\\|")


def share(pair: Mapping[str, float]) -> str:
    """Return what ``after`` is of ``before``, in per cent."""
    return f"{100 * pair['after'] / pair['before']:.3g} %" if pair["before"] else "–"


def _composed(components: object, composition: str | None) -> str:
    return f"{components} as they are" if composition in (None, "none") else f"{components} {composition}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[list[object]]:
    rows: list[list[object]] = []
    for key, value in values.items():
        name = f"{prefix} {key.replace('_', ' ')}".strip()
        if isinstance(value, Mapping):
            rows += _flatten(value, name)
        elif isinstance(value, list | tuple):
            if len(value) <= 8 and not any(isinstance(item, Mapping | list | tuple) for item in value):
                rows.append([name, ", ".join(str(item) for item in value)])
        else:
            rows.append([name, _shown(name, value)])
    return rows


def _shown(name: str, value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and "bytes" in name:
        return format_bytes(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else value
    return f"{value:.4g}" if isinstance(value, float) else value
