"""What people read: tables, units, JSON files and the model card. Plain data in, text out."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mea_compress.modeling.section_mea import FORM_OF

_NUMBER = re.compile(r"^[+\-−]?\d[\d,.]*(e[+-]?\d+)?( ?(%|×|B|[KMGT]iB|[KMBT]|m?s))?$")
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A Markdown table, padded so that it also reads well as plain text.

    Args:
        rows: Cells by row, each row as long as `headers`; None shows as a dash.
        headers: Column titles.

    Returns:
        Lines without a final newline. Columns that hold only numbers (units and signs allowed) are right-aligned.
    """
    cells = [["–" if cell is None else _one_line(cell) for cell in row] for row in rows]
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
    """Bytes in the largest binary unit that leaves at least 1: `512 B`, `1.5 KiB`, `2.25 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if value == int(value) else 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f} {unit}"


def format_count(number: float) -> str:
    """A count in thousands, millions or billions to three digits: `512`, `105 M`, `1.24 B`."""
    value = float(number)
    for unit in ("", " K", " M", " B", " T"):
        if abs(value) < 999.5 or unit == " T":
            break
        value /= 1000
    return f"{value:.3g}{unit}" if abs(value) < 999.5 else f"{value:.0f}{unit}"


def to_json(data: object) -> str:
    """JSON with two spaces of indentation and a final newline; not-a-number is refused, for JSON has none.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, data: object) -> None:
    """Write JSON so that the file appears whole or not at all.

    Args:
        path: The file; missing directories above it are made. An existing file is replaced.
        data: Anything that `to_json` takes.

    Raises:
        OSError: The place cannot be written to.
    """
    text = to_json(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def facts(values: Mapping[str, Any]) -> str:
    """Any flat or nested mapping of names to values as a two-column table.

    Keys that speak of bytes are shown in units, whole numbers with separators; nested keys are joined by spaces, and
    anything longer than a few items is left to the JSON form.
    """
    return table(_flatten(values), ["", "value"])


def plan_report(plan: Mapping[str, Any]) -> str:
    """A plan (the JSON of `plan`) as a summary and one row for each run of layers that are treated alike."""
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


def _whole_caches(plan: Mapping[str, Any]) -> list[str]:
    """Whole caches at some lengths, from the JSON of `plan` or `inspect`, where it has them."""
    sizes = plan.get("cache", [])
    if not sizes:
        return []
    batch = sizes[0]["batch"]
    what = "KV cache" if batch == 1 else f"KV cache, {batch} sequences"
    columns = [key for key in ("before", "after", "bytes") if key in sizes[0]]
    rows = [[f"{size['tokens']:,} tokens", *(format_bytes(size[key]) for key in columns)] for size in sizes]
    return [table(rows, [what, *("" if key == "bytes" else key for key in columns)])]


def inspection_report(inspection: Mapping[str, Any]) -> str:
    """What a checkpoint is (the JSON of `inspect`): the facts, one row for each run of like layers, whole caches."""
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
    return "\n\n".join([facts(plain), table_of_layers, *_whole_caches(inspection)])


def before_after(plan: Mapping[str, Any]) -> str:
    """Cache and parameters before and after, from the JSON of `plan`."""
    cache, parameters = plan["kv_bytes_per_token"], plan["parameters"]
    rows: list[list[object]] = [
        ["KV cache per token", *(format_bytes(cache[key]) for key in ("before", "after")), _share(cache)],
        ["parameters", *(format_count(parameters[key]) for key in ("before", "after")), _share(parameters)],
    ]
    for title, key in (
        ("weights on disk", "output_bytes"),
        ("memory to compress, above the libraries'", "memory_bytes"),
    ):
        if key in plan:
            rows.append([title, None, format_bytes(plan[key]), None])
    return table(rows, ["", "before", "after", "share"])


def evaluation_report(evaluation: Mapping[str, Any]) -> str:
    """A measurement (the JSON of `evaluate`) as a table, beside the reference's where there is one."""
    reference = evaluation.get("reference") or {}
    shown = [
        ("tokens", "tokens", lambda value: f"{value:,}"),
        ("cross-entropy (nats/token)", "cross_entropy", lambda value: f"{value:.4f}"),
        ("perplexity", "perplexity", lambda value: f"{value:.3f}"),
        ("KL from the reference (nats/token)", "kl", lambda value: f"{value:.4f}"),
        ("top-1 agreement", "top1_agreement", lambda value: f"{100 * value:.2f} %"),
        ("KV cache per token, measured", "kv_bytes_per_token", format_bytes),
        ("decoded tokens per second", "decode_tokens_per_second", lambda value: f"{value:.1f}"),
    ]
    rows: list[list[object]] = []
    for title, key, form in shown:
        values = [evaluation.get(key), reference.get(key)]
        if values == [None, None]:
            continue
        cells = [None if value is None else form(value) for value in values]
        rows.append([title, *cells] if reference else [title, cells[0]])
    figures = table(rows, ["", "checkpoint", "reference"] if reference else ["", "checkpoint"])
    return "\n\n".join([figures, *([_speed_report(evaluation["speed"])] if evaluation.get("speed") else [])])


def _speed_report(timings: Sequence[Mapping[str, Any]]) -> str:
    """What `evaluate --contexts` measured, a line for each context, batch and model."""
    rows = [
        [
            f"{timing['context']:,}",
            timing["batch"],
            timing["model"],
            f"{timing['prefill_seconds']:.3f} s",
            f"{timing['decode_milliseconds']:.2f} ms",
            format_bytes(timing["cache_bytes"]),
            None if timing["peak_bytes"] is None else format_bytes(timing["peak_bytes"]),
        ]
        for timing in timings
    ]
    return table(rows, ["context", "batch", "model", "prefill", "decoding a token", "cache", "peak above the model"])


def model_card(
    source: str,
    plan: Mapping[str, Any],
    fidelity: Mapping[str, Any],
    recipe_yaml: str,
    versions: Mapping[str, str],
    source_card: str | None = None,
) -> str:
    """The README.md of an emitted checkpoint.

    Args:
        source: Name of the original: a hub id, or its directory's name; a path is shortened to its last part.
        plan: The JSON of `plan`.
        fidelity: What was measured when the checkpoint was verified, by name.
        recipe_yaml: The resolved recipe.
        versions: Package name to version.
        source_card: The original's README.md; its licence and language are carried over.

    Returns:
        Markdown with the hub's YAML front matter, ending in a newline.
    """
    name = _one_line(Path(source).name if os.path.isabs(source) or source.startswith(".") else source)
    front = {
        "base_model": name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **_front_matter(source_card),
        "tags": ["mea", "kv-cache", "compression"],
    }
    share = _share(plan["kv_bytes_per_token"])
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {name}, with {share} of its KV cache",
        f"Made from `{name}` with mea-compress: keys and values are composed from fewer component heads "
        "(Multi-head Explicit Attention, [arXiv 2601.19611](https://arxiv.org/abs/2601.19611)), and only the "
        "components are cached.",
        plan_report(plan),
        "## Load it",
        "Where mea-compress is not installed:",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        "```",
        "`trust_remote_code=True` runs the files `*_mea.py` of this directory. Where mea-compress is installed, "
        "`import mea_compress` first and leave the flag out.",
    ]
    if fidelity:
        parts += ["## How close it is", facts(fidelity)]
    parts += [
        "## How it was made",
        "```yaml\n" + recipe_yaml.rstrip("\n") + "\n```",
        "With " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def export_card(
    source: str, exported: Mapping[str, Any], versions: Mapping[str, str], source_card: str | None = None
) -> str:
    """The README.md of a stock checkpoint that was exported.

    Args:
        source: Name of the model before compression; a path is shortened to its last part.
        exported: The JSON of `export`.
        versions: Package name to version.
        source_card: The compressed checkpoint's README.md; its licence and language are carried over.

    Returns:
        Markdown with the hub's YAML front matter, ending in a newline.
    """
    name = _one_line(Path(source).name if os.path.isabs(source) or source.startswith(".") else source)
    front = {
        "base_model": name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **_front_matter(source_card),
        "tags": ["kv-cache", "compression"],
    }
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {name} with a smaller KV cache, as a plain {exported['model_type']} checkpoint",
        f"`{name}` was compressed with mea-compress, and the compositions of its key and value heads were folded into "
        "the query and output projections: what is left is grouped-query attention with "
        f"{exported['key_value_heads']} key/value head(s) of {exported['head_dim']} channels, whose rotary frequencies "
        "are written in config.json. It loads without remote code.",
        facts(exported),
        stock_outlook(exported),
        "With " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def stock_outlook(outlook: Mapping[str, Any]) -> str:
    """What a stock export costs and saves, in a sentence, or why there can be none."""
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
    return (
        f"Stock export: {outlook['key_value_heads']} key/value head(s) of {outlook['head_dim']} channels; {weights}, "
        f"the cache by {format_bytes(saved)} less a token; memory is saved {since}."
    )


def _one_line(cell: object) -> str:
    return " ".join(str(cell).split()).replace("|", "\\|")


def _share(pair: Mapping[str, float]) -> str:
    return f"{100 * pair['after'] / pair['before']:.3g} %" if pair["before"] else "–"


def _composed(components: object, composition: str | None) -> str:
    form = None if composition is None else FORM_OF.get(composition)
    whole = composition is None or (form is not None and form.identity)
    return f"{components} {'as they are' if whole else composition}"


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
            rows.append([name, _fact(name, value)])
    return rows


def _fact(name: str, value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and "bytes" in name:
        return format_bytes(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else value
    return f"{value:.4g}" if isinstance(value, float) else value


def _front_matter(card: str | None) -> dict[str, Any]:
    """What of a card's front matter stays true of a compressed model."""
    if not card or not card.startswith("---\n"):
        return {}
    block, end, _ = card[4:].partition("\n---")
    try:
        values = yaml.safe_load(block) if end else None
    except yaml.YAMLError:
        return {}
    return {key: values[key] for key in _CARRIED if key in values} if isinstance(values, dict) else {}
