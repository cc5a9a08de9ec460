"""Pictures of measurements, drawn with matplotlib. Plain data in, a file out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mea_compress.errors import RequestError


def check_plot(file: Path | str, retrieval: object) -> None:
    """Check, before any work, that a picture of retrieval can be drawn.

    Args:
        file: Where it goes.
        retrieval: What is asked for; None and nothing are no retrieval.

    Raises:
        RequestError: There is no retrieval, or as `check_file`.
    """
    if not retrieval:
        raise RequestError("`plot` draws what `retrieval` finds: give both")
    check_file(file)


def check_file(file: Path | str) -> None:
    """Check, before any work, that a picture can be written.

    Args:
        file: Where it goes.

    Raises:
        RequestError: matplotlib is not installed or cannot write this kind of file, or there is no such directory, none
            that may be written to, or something in the file's place that is none or may not be written.
    """
    file = Path(file)
    check_matplotlib("`plot` draws a picture")
    from matplotlib.figure import Figure

    if file.suffix.removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        raise RequestError(f"`plot` {file} is no kind of picture: name a file that ends in .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise RequestError(f"`plot` {file} lies in no directory that exists: make {file.parent} first")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise RequestError(f"`plot` {file} cannot be written: name a file in a directory that this user may write to")
    if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
        raise RequestError(f"`plot` {file} is there and no file that this user may write: name another one")


def check_matplotlib(purpose: str) -> None:
    """Check that pictures can be drawn.

    Args:
        purpose: What for, as a sentence begins.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"{purpose} and needs matplotlib, which cannot be imported ({error}): install it with "
            "pip install 'mea-compress[plots]'"
        ) from error


def has_matplotlib() -> bool:
    """Return whether pictures can be drawn, for those that nobody has asked for."""
    try:
        check_matplotlib("")
    except RequestError:
        return False
    return True


def draw_sweep(sweep: Mapping[str, Any], file: Path | str) -> None:
    """Draw loss against cache: a line for each method and budget, and the front that no point beats.

    Args:
        sweep: The JSON of a sweep.
        file: Where the picture goes; its ending says the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    whole = sweep["reference"]["kv_bytes_per_token"]
    series: dict[str, list[Mapping[str, Any]]] = {}
    for point in sweep["points"]:
        if point["reason"] is None:
            name = ", ".join(filter(None, [point["method"], point["budget"]]))
            series.setdefault(name, []).append(point)
    for index, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point["kv_bytes_per_token"])
        shares = [100 * point["kv_bytes_per_token"] / whole for point in points]
        axis.plot(shares, [point["kl"] for point in points], marker="osD^v<>P"[index % 8], label=name, zorder=2)
    front = sorted((point["kv_bytes_per_token"], point["kl"]) for point in sweep["points"] if point["pareto"])
    if len(front) > 1:
        sizes = [100 * size / whole for size, _ in front]
        axis.step(
            sizes, [loss for _, loss in front], where="post", color="0.6", linestyle="--", label="front", zorder=1
        )
    if all(point["kl"] > 0 for points in series.values() for point in points):
        axis.set_yscale("log")
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axis.set_xlabel("cache kept")
    axis.set_ylabel("KL from the original (nats/token)")
    axis.set_title(f"{sweep['source']}: loss against cache", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, file)


def draw_retrieval(columns: Mapping[str, Mapping[str, Any]], file: Path | str) -> None:
    """Draw heat maps of exact matches over length and depth, a row of them for each task and a column for each model.

    Args:
        columns: Evaluations (the JSON of `evaluate`) by the name of the model; those without retrieval are left out.
        file: Where the picture goes; its ending says the format.

    Raises:
        RequestError: As `check_plot`.
    """
    models = {name: column["retrieval"] for name, column in columns.items() if column.get("retrieval")}
    check_plot(file, models)
    from matplotlib.figure import Figure

    cells = next(iter(models.values()))
    tasks, lengths, depths = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("task", "length", "depth"))
    size = (1.2 + len(models) * (1.3 + 0.7 * len(lengths)), 0.6 + 2.4 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(tasks), len(models), squeeze=False)
    pictures = []
    for row, task in zip(axes, tasks, strict=True):
        for axis, (name, scores) in zip(row, models.items(), strict=True):
            found = {(cell["length"], cell["depth"]): cell["exact_match"] for cell in scores if cell["task"] == task}
            shares = [[found[length, depth] for length in lengths] for depth in depths]
            pictures.append(axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto"))
            for y, line in enumerate(shares):
                for x, share in enumerate(line):
                    colour = "black" if share > 0.5 else "white"
                    axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
            axis.set_title(f"{task}: {name}", fontsize=9)
            axis.set_xlabel("tokens")
            axis.set_ylabel("depth")
    figure.colorbar(pictures[-1], ax=axes, label="exact match")
    _save(figure, file)


def draw_profile(profile: Mapping[str, Any], file: Path | str) -> None:
    """Draw a profile as heat maps, one a side: the KL by layer and width, on a logarithmic scale.

    Args:
        profile: The JSON of `profile`.
        file: Where the picture goes; its ending says the format.

    Raises:
        RequestError: As `check_file`.
    """
    check_file(file)
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    points = profile["points"]
    sides = list(dict.fromkeys(point["side"] for point in points))
    layers = sorted({point["layer"] for point in points})
    least = max(profile["floor"] / 10, 1e-6)
    norm = LogNorm(least, max(max(point["kl"] for point in points), 10 * least))
    figure = Figure(figsize=(1.5 + 2.8 * len(sides), 1.4 + 0.2 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(sides), squeeze=False)[0]
    for axis, side in zip(axes, sides, strict=True):
        found = {(point["layer"], point["components"]): point["kl"] for point in points if point["side"] == side}
        widths = sorted({count for _, count in found})
        rows = [[max(found.get((layer, count), float("nan")), least) for count in widths] for layer in layers]
        picture = axis.imshow(rows, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_xticks(range(len(widths)), [f"{count:.3g}" for count in widths])
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        axis.set_title({"key": "keys", "value": "values"}.get(side, side), fontsize=9)
        axis.set_xlabel(f"component heads of {profile['heads']}")
        axis.set_ylabel("layer")
    figure.colorbar(picture, ax=axes, label="KL, nats per token")
    _save(figure, file)


def _save(figure: Any, file: Path | str) -> None:
    """Write a picture; what the disk refuses is the caller's to say."""
    figure.savefig(file, dpi=150)


def draw_healing(healing: Mapping[str, Any], file: Path | str) -> None:
    """Draw how the loss fell: of the text that was trained on by step, and of text held out whenever it was looked at.

    Args:
        healing: The JSON of a healing, with `curve` and `losses`.
        file: Where the picture goes; its ending says the format.

    Raises:
        RequestError: As `check_file`.
    """
    check_file(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    losses = [float("nan") if loss is None else loss for loss in healing["losses"]]
    axis.plot(range(1, len(losses) + 1), losses, color="0.6", linewidth=1, label="training loss", zorder=1)
    steps, values = zip(*healing["curve"], strict=True)
    axis.plot(steps, values, marker="o", label="KL on held-out text", zorder=2)
    shown = [value for value in (*losses, *values) if value == value and abs(value) != float("inf")]
    if shown and min(shown) > 0:
        axis.set_yscale("log")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("nats per token")
    axis.set_title(f"KL {healing['kl_before']:.4g} before, {healing['kl_after']:.4g} after", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, file)


__all__ = [
    "check_file",
    "check_matplotlib",
    "check_plot",
    "draw_healing",
    "draw_profile",
    "draw_retrieval",
    "draw_sweep",
    "has_matplotlib",
]
