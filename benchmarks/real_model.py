"""A real language model at equal cached bytes: every method, fit and share, with what fitting takes.

    python benchmarks/real_model.py source WORK/source
    python benchmarks/real_model.py table WORK --source WORK/source --text-test wikitext2_raw_test.txt \\
        --text tales=grimm.txt --calibration wikitext=wikitext2_valid.txt --tasks JSON_LINES

A row is compressed in a process of its own, for its time and its peak of memory, and then measured: perplexity on the
test text, KL and top-1 agreement with the original on several texts, accuracy on tasks. Each figure is kept in
WORK/rows as it comes, and a later call goes on where an interrupted one stopped; `--rows` chooses among rows, and
`--made NAME=DIRECTORY` adds the row of a compression that is there already.

Perplexity is the field's: the raw file as one text, its tokens without BOS cut into windows of 2,048 that do not
overlap, the last, shorter one left out, each window predicting all of its tokens but the first.
"""

import functools
import gzip
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import yaml
from common import machine, versions
from smollm2 import compare_with_llama_cpp, packaged_gguf, write_source
from tasks import write_tasks

from mea_compress.checkpoint.files import write_json
from mea_compress.loading import load_model, load_tokenizer
from mea_compress.measure.cache import measure_cache_bytes
from mea_compress.measure.metrics import NOTHING, compare, predict
from mea_compress.measure.tasks import find_tasks, measure_tasks
from mea_compress.report.tables import format_bytes, table

WINDOW, SHORT_WINDOW = 2048, 1024
RATIOS = ("1/2", "2/3", "3/4", "1/3", "1/4")  # a model of three heads can keep two of them, not 0.67
EQUAL = {"budget": "uniform", "heal": "0"}
CLOSED = {"refine": 0, "heal": "0"}
FORTY = {"time_limit": 40, "sequence_length": 512}
SAMPLED = "sampled"
ORIGINAL, PEER = "original", "cacheshrink, separate, calibrated"


def both(method: str) -> dict[str, Any]:
    return {"key_composition": method, "value_composition": method}


ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, closed form": CLOSED,
    "default, closed form, equal widths": EQUAL | CLOSED,
    "default, refined, equal widths": EQUAL,
    "default, 40 minutes": FORTY,
    "latent + latent, equal widths, activations (whitened SVD: SVD-LLM, Palu, CARE)": both("latent")
    | EQUAL
    | {"fit": "activations"},
    "latent + latent": both("latent"),
    "latent + latent, closed form": both("latent") | CLOSED,
    "latent + latent, closed form, equal widths": both("latent") | EQUAL | CLOSED,
    "joint, 40 minutes": both("joint") | FORTY,
    "joint (best-50)": both("joint") | {"effort": "best"},
    "joint, closed form": both("joint") | CLOSED,
    "joint, closed form, equal widths": both("joint") | EQUAL | CLOSED,
    "joint, refined, equal widths": both("joint") | EQUAL,
    "pool, weights (GQA, heads averaged)": both("pool") | {"fit": "weights"},
    "pool, refined, equal widths (plain GQA)": both("pool") | EQUAL,
    "head, weights (the paper's start)": both("head") | {"fit": "weights"},
}
"""Settings of `compress` by the name of the row; those that cannot be had at a share say why."""


class Row:
    """One row: its file in WORK/rows, which holds each figure as soon as it is there."""

    def __init__(
        self,
        work: Path,
        measuring: dict[str, Any],
        name: str,
        ratio: float | None = None,
        calibration: str | None = None,
        settings: dict[str, Any] | None = None,
    ):
        settings = settings or {}
        self.name, self.ratio, self.calibration, self.settings = name, ratio, calibration, settings
        words = [name, *([f"{100 * ratio:.3g}", calibration] if ratio is not None else [])]
        self.slug = re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, words)).lower()).strip("-")
        self.file = work / "rows" / f"{self.slug}.json"
        self.data: dict[str, Any] = {"row": name, "ratio": ratio, "calibration": calibration, "settings": settings}
        self.data["measuring"] = measuring
        if self.file.is_file():
            kept = json.loads(self.file.read_text())
            if {key: kept.get(key) for key in self.data} != json.loads(json.dumps(self.data)):
                raise click.ClickException(f"{self.file} has other settings or limits: remove it, or name another WORK")
            self.data = kept

    def has(self, *keys: str) -> bool:
        """Return whether a figure is there."""
        place: Any = self.data
        for key in keys:
            if key not in place:
                return False
            place = place[key]
        return True

    def keep(self, *keys: str, value: Any) -> None:
        """Put a figure into the file."""
        place = self.data
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.data)


def measured_process(command: list[str], log: Path) -> tuple[int, float, int]:
    """Run a command; return its exit status, its seconds and its peak of memory in bytes."""
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    scale = 1 if sys.platform == "darwin" else 1024
    return process.returncode, time.perf_counter() - began, usage.ru_maxrss * scale


def fit(row: Row, source: Path, out: Path, calibration: Path | None) -> None:
    """Compress a row's checkpoint; keep its costs, or why it cannot be made."""
    recipe = {"kv_ratio": row.ratio, **row.settings}
    if row.settings.get("fit") != "weights" and calibration is not None:
        recipe["text"] = str(calibration.resolve())
    settings, log = out.with_suffix(".yaml"), out.with_suffix(".log")
    out.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    resumed = out.with_name(f"{out.name}.partial").exists()
    command = [sys.executable, "-m", "mea_compress", "compress", str(source), str(out), "--recipe", str(settings)]
    status, seconds, peak = measured_process([*command, *(["--resume"] if resumed else [])], log)
    if status == 2:
        row.keep("refused", value=log.read_text().strip().splitlines()[-1].removeprefix("mea-compress: "))
    elif status:
        raise click.ClickException(f"compressing {row.slug} failed: {log} says why")
    else:
        costs = {"seconds": round(seconds, 1), "peak_bytes": peak}
        row.keep("compression", value=costs | ({"resumed": True} if resumed else {}))


def settings_made(directory: Path) -> dict[str, Any]:
    """Return the settings of a compression, its texts by their names alone."""
    settings = yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))
    text = settings.get("text") or []
    return settings | {"text": [Path(file).name for file in ([text] if isinstance(text, str) else text)]}


def windows(text: str, tokenizer: Any, length: int, count: int | None) -> torch.Tensor:
    """Cut a text into windows (N, length) of its tokens, without BOS, that do not overlap."""
    content = text if count is None else text[: 16 * length * count]
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
    cut = ids[: len(ids) // length * length].view(-1, length)[:count]
    if (count is not None and len(cut) < count) or not len(cut):
        raise click.ClickException(f"{len(ids)} tokens are fewer than {count or 1} windows of {length}: give more text")
    return cut


def perplexity(model: Any, rows: torch.Tensor) -> dict[str, Any]:
    total = NOTHING
    for ids in rows:
        total += compare(predict(model, ids[None], torch.ones(1, len(ids), dtype=torch.bool)), None)
    loss = total.cross_entropy / total.tokens
    return {"perplexity": math.exp(loss), "cross_entropy": loss, "windows": len(rows), "length": rows.shape[1]}


def divergence(model: Any, original: Any, rows: torch.Tensor) -> dict[str, Any]:
    total = NOTHING
    for ids in rows:
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        total += compare(predict(model, ids[None], mask), predict(original, ids[None], mask))
    return {
        "kl": total.kl / total.tokens,
        "top1_agreement": total.agreements / total.tokens,
        "perplexity": math.exp(total.cross_entropy / total.tokens),
        "original_perplexity": math.exp(total.reference_cross_entropy / total.tokens),
        "windows": len(rows),
        "length": rows.shape[1],
    }


def python_sources() -> str:
    """Return modules of the standard library, some of each letter, always the same."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files[:60])


def manual_pages(language: str = "de") -> str | None:
    """Return the prose of translated manual pages, or None where this machine has none."""
    files = sorted(Path(f"/usr/share/man/{language}").glob("man[18]/*.gz"))
    pages = []
    for file in files:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8", errors="ignore").splitlines()
        prose = [re.sub(r"\\f\w|\\&", "", line).replace(r"\-", "-") for line in lines if line[:1] not in (".", "'")]
        pages.append("\n".join(prose))
    return "\n\n".join(pages) if pages else None


def measure(row: Row, out: Path, source: Path, options: dict[str, Any], texts: dict[str, Callable[[], Any]]) -> None:
    """Keep every figure of a row that is not there yet."""

    @functools.cache
    def load(path: Path) -> Any:
        return load_model(path, options["dtype"], options["device"])

    tokenizer = load_tokenizer(source)
    if not row.has("kv_bytes_per_token"):
        row.keep("kv_bytes_per_token", value=measure_cache_bytes(load(out)))
    if not row.has("perplexity"):
        content = options["text_test"].read_text(encoding="utf-8")
        row.keep("perplexity", value=perplexity(load(out), windows(content, tokenizer, WINDOW, options["limit"])))
    for name, text in texts.items():
        if row.name != ORIGINAL and not row.has("texts", name):
            cut = windows(text(), tokenizer, SHORT_WINDOW, options["windows"])
            row.keep("texts", name, value=divergence(load(out), load(source), cut))
    for name in options["task_names"]:
        if not row.has("tasks", name):
            manager = find_tasks([name], options["task_dir"])
            scores = measure_tasks(load(out), tokenizer, [name], manager, limit=options["task_limit"])
            values = {score.metric: [score.value, score.standard_error, score.examples] for score in scores}
            row.keep("tasks", name, value=values)


def run_peer(row: Row, source: Path, options: dict[str, Any], texts: dict[str, Callable[[], Any]], text: Path) -> None:
    """Keep the peer's figures, measured by `peer_real_model.py` on the same windows."""
    tokenizer = load_tokenizer(source)
    content = options["text_test"].read_text(encoding="utf-8")
    cut = {"perplexity": windows(content, tokenizer, WINDOW, options["limit"]).tolist()}
    cut |= {name: windows(f(), tokenizer, SHORT_WINDOW, options["windows"]).tolist() for name, f in texts.items()}
    asked = row.file.with_suffix(".windows")
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(cut))
    script = Path(__file__).with_name("peer_real_model.py")
    with tempfile.TemporaryDirectory() as place:
        for file in source.resolve().iterdir():
            (Path(place) / file.name).symlink_to(file)
        config = Path(place) / "tokenizer_config.json"
        told = json.loads(config.read_text(encoding="utf-8"))
        config.unlink()
        # The class of tokenizer.json in the releases of transformers that the peer runs with.
        config.write_text(json.dumps(told | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        command = [options["peer_python"], str(script), place, str(asked), str(text), str(row.ratio)]
        done = subprocess.run([*command, options["dtype"] or "auto"], capture_output=True, text=True, check=False)
    asked.unlink()
    if done.returncode:
        raise click.ClickException(f"the peer failed:\n{done.stderr[-2000:]}")
    for key, value in json.loads(done.stdout.splitlines()[-1]).items():
        row.keep(key, value=value)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Lay out all rows that have figures: what they cost and how close they are, then accuracies, then refusals."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("texts", {})))
    tasks = list(dict.fromkeys(name for row in rows for name in row.get("tasks", {})))
    whole = next((row["kv_bytes_per_token"] for row in rows if row["row"] == ORIGINAL), None)
    closeness, accuracies = [], []
    for row in rows:
        if "perplexity" not in row or not whole:
            continue
        first = [row["row"], row["calibration"], f"{100 * row['kv_bytes_per_token'] / whole:.1f} %"]
        closeness.append([*first, *_costs(row.get("compression", {})), f"{row['perplexity']['perplexity']:.2f}"])
        for name in names:
            figures = row.get("texts", {}).get(name)
            cells = [f"{figures['kl']:.4f}", f"{100 * figures['top1_agreement']:.1f} %"] if figures else [None, None]
            closeness[-1] += cells
        scores = [row.get("tasks", {}).get(name, {}) for name in tasks]
        accuracies.append([*first, *(_accuracy(score.get("acc_norm") or score.get("acc")) for score in scores)])
    headers = ["row", "fitted on", "cache"]
    of_texts = [header for name in names for header in (f"KL, {name}", f"top-1, {name}")]
    parts = [table(closeness, [*headers, "fit", "peak memory", "perplexity", *of_texts])]
    if tasks:
        parts.append(table(accuracies, [*headers, *(name.removeprefix("local_") for name in tasks)]))
    refused = [f"- {row['row']} at {100 * row['ratio']:.3g} %: {row['refused']}" for row in rows if "refused" in row]
    return "\n\n".join([*parts, *(["Not possible:", "\n".join(refused)] if refused else [])])


def _costs(costs: dict[str, Any]) -> list[str | None]:
    """Return the time of a fit, as far as it was seen, and its peak of memory."""
    if not costs:
        return [None, None]
    return [f"{'over ' if costs.get('resumed') else ''}{costs['seconds']:,.0f} s", format_bytes(costs["peak_bytes"])]


def _accuracy(score: list[float] | None) -> str | None:
    """Return an accuracy with its standard error in per cent, normalised by length where the task does so."""
    return f"{100 * score[0]:.1f} ± {100 * (score[1] or 0):.1f}" if score else None


def named_paths(values: tuple[str, ...], kind: str, serves: Callable[[Path], bool]) -> dict[str, Path]:
    """Read NAME=PATH, of a kind such as "FILE with a file that exists"."""
    paths = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not serves(Path(path)):
            raise click.BadParameter(f"{value} is not NAME={kind}")
        paths[name] = Path(path)
    return paths


def named_files(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Path]:
    """Read NAME=FILE."""
    return named_paths(values, "FILE with a file that exists", Path.is_file)


def named_directories(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Path]:
    """Read NAME=DIRECTORY."""
    kind = "DIRECTORY with a compression, which has a recipe.yaml"
    return named_paths(values, kind, lambda path: (path / "recipe.yaml").is_file())


def calibration_texts(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Path | None]:
    """Read NAME=FILE, where a directory will do for a file, or `sampled`: text of the original's own."""
    texts: dict[str, Path | None] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if value != SAMPLED and not (equals and Path(file).exists()):
            raise click.BadParameter(f"{value} is neither {SAMPLED} nor NAME=FILE with a file or directory that exists")
        texts[name] = Path(file) if equals else None
    return texts


@click.group(help=__doc__)
def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--gguf", "file", type=click.Path(exists=True, path_type=Path), help="Another file than the package's.")
@click.option("--check-python", help="Python of an environment with llama-cpp-python, to compare logits with.")
@click.option("--check-text", type=click.Path(exists=True, path_type=Path), help="Text for that; README.md without it.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the comparison goes.")
def source(out, file, check_python, check_text, json_file):
    """Make the directory of SmolLM2-135M-Instruct, dequantised Q4_1, or only compare it where it is there."""
    file = file or packaged_gguf()
    if not (out.exists() and check_python):
        write_source(file, out)
    if check_python:
        text = check_text or Path(__file__).parent.parent / "README.md"
        result = compare_with_llama_cpp(out, file, check_python, text)
        click.echo(json.dumps(result, indent=2))
        if json_file:
            write_json(json_file, {"versions": versions(), "file": file.name, "text": text.name, **result})


@main.command("table")
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--source", required=True, type=click.Path(exists=True, path_type=Path), help="The original.")
@click.option("--text-test", required=True, type=click.Path(exists=True, path_type=Path), help="Text for perplexity.")
@click.option("--text", "texts", multiple=True, callback=named_files, help="NAME=FILE to measure KL on besides.")
@click.option(
    "--calibration", multiple=True, callback=calibration_texts, help="NAME=FILE to fit on, or sampled; sampled without."
)
@click.option("--rows", "chosen", multiple=True, help="Only rows whose name contains this.")
@click.option(
    "--made", multiple=True, callback=named_directories, help="NAME=DIRECTORY of a compression, measured as a row."
)
@click.option("--ratio", "ratios", multiple=True, default=RATIOS, show_default=True, help="Shares: 0.5 or 2/3.")
@click.option("--sequences", type=int, help="Calibration sequences; as many as `compress` takes without it.")
@click.option("--limit", type=int, help="Windows of 2,048 tokens for perplexity; all without it.")
@click.option("--windows", type=int, default=8, show_default=True, help="Windows of 1,024 tokens of each text for KL.")
@click.option("--tasks", type=click.Path(exists=True, path_type=Path), help="Directory of JSON lines; see tasks.py.")
@click.option("--task-limit", type=int, help="Examples of each task; all without it.")
@click.option("--peer-python", help="Python of an environment with cacheshrink.")
@click.option("--keep/--no-keep", default=False, show_default=True, help="Keep the checkpoints of rows that are done.")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", help="Of the weights while measuring, as float32 where bfloat16 is only imitated.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON of all rows; the table is beside it, as .md.")
def run_table(work, source, chosen, made, ratios, sequences, tasks, texts, calibration, keep, out, **options):
    """Compress and measure every row, the shares in the order given."""
    options["task_dir"] = work / "tasks"
    options["task_names"] = write_tasks(tasks, work / "tasks") if tasks else []
    readers: dict[str, Callable[[], Any]] = {"test": functools.partial(options["text_test"].read_text, "utf-8")}
    readers |= {name: functools.partial(file.read_text, "utf-8") for name, file in texts.items()}
    readers["Python"] = functools.cache(python_sources)
    if manual_pages():
        readers["German manual"] = functools.cache(manual_pages)
    measuring = {key: options[key] for key in ("limit", "windows", "task_limit")}
    measuring |= {"dtype": options["dtype"]} if options["dtype"] else {}
    measuring["texts"] = {name: file.name for name, file in (texts | {"perplexity": options["text_test"]}).items()}
    make = functools.partial(Row, work, measuring)
    rows = [make(ORIGINAL)]
    for ratio in map(float, map(Fraction, ratios)):
        for name, settings in ROWS.items():
            if chosen and not any(part in name for part in chosen):
                continue
            if sequences and settings.get("fit") != "weights":
                settings = settings | {"sequences": sequences}
            for fitted in ("weights",) if settings.get("fit") == "weights" else calibration or (SAMPLED,):
                rows.append(make(name, ratio, fitted, settings))
        if options["peer_python"]:
            rows += [make(PEER, ratio, name) for name, file in calibration.items() if file is not None]
    given = {make(name, settings=settings_made(directory)): directory for name, directory in made.items()}
    rows += given
    for row in rows:
        if row.has("refused"):
            continue
        click.echo(row.slug, err=True)
        if row.name == PEER:
            if not row.has("perplexity"):
                run_peer(row, source, options, readers, calibration[row.calibration])
            continue
        there = source if row.name == ORIGINAL else given.get(row)
        directory = there or work / "checkpoints" / row.slug
        finished = all(row.has("tasks", name) for name in options["task_names"]) and row.has("perplexity")
        if finished and (row.name == ORIGINAL or all(row.has("texts", name) for name in readers)):
            continue
        if not there and not directory.is_dir():
            fit(row, source, directory, calibration.get(row.calibration))
        if not row.has("refused"):
            measure(row, directory, source, options, readers)
        if not there and not keep and directory.is_dir():
            shutil.rmtree(directory)
    result = {"versions": versions(), "machine": machine("cpu"), "threads": torch.get_num_threads()}
    result |= {"source": source.name, "rows": [row.data for row in rows]}
    out = out or work / "table.json"
    write_json(out, result)
    text = markdown(result["rows"])
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
