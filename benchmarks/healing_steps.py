"""How a compressed checkpoint heals by the size and number of its steps: curves, and what becomes of several texts.

Each run begins at START and trains it on the same sequences of --text, with one step size and no trials; its curve is
KL on sequences that are held out. What it ends with, the best of the curve, is measured on every --test, and the start
itself as a run of no steps. Runs that the result has already are not done again.

    python benchmarks/healing_steps.py SRC HALF --text train.txt --test wiki=test.txt:24 --run 2,0.0015,388,attention \\
        --run 8,lr=0.0004,97,attention --out steps.json

BATCH,RATE,STEPS,TRAIN: RATE is a share of each weight's root mean square, or lr=… the same for all weights; a fifth,
MATCH, is the weight of the layers' outputs in the loss.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common import machine, versions

from mea_compress.checkpoint.files import write_json
from mea_compress.layers.runner import fast_products
from mea_compress.loading import load_model, load_tokenizer, resolve_device
from mea_compress.report.tables import table
from mea_compress.text.reading import read_documents
from mea_compress.text.sequences import token_sequences
from mea_compress.training.distillation import distil, measure
from mea_compress.training.settings import DistillationSettings
from mea_compress.training.stages import Stages


@dataclass(frozen=True)
class Run:
    """What is healed, and how."""

    start: str
    batch: int
    rate: float | None
    learning_rate: float | None
    steps: int
    train: str | None
    match_hidden: float | None = None

    @classmethod
    def parse(cls, start: str, text: str) -> "Run":
        try:
            batch, rate, steps, train, *match = text.split(",")
            given, value = rate.startswith("lr="), float(rate.removeprefix("lr="))
            (matched,) = map(float, match) if match else (None,)
            sizes = (None, value) if given else (value, None)
            return cls(start, int(batch), *sizes, int(steps), train, matched)
        except ValueError as error:
            raise click.BadParameter(f"{text} is no BATCH,RATE,STEPS,TRAIN[,MATCH]") from error


def parse_test(text: str) -> tuple[str, Path, int | None]:
    """Return name, file and number of windows of NAME=FILE[:WINDOWS]."""
    name, equals, rest = text.partition("=")
    file, _, windows = rest.rpartition(":") if rest.rpartition(":")[2].isdecimal() else (rest, "", "")
    if not equals or not Path(file).is_file():
        raise click.BadParameter(f"{text} is no NAME=FILE[:WINDOWS] of a file that is there")
    return name, Path(file), int(windows) if windows else None


def judge(model: Any, teacher: Any, tests: dict[str, torch.Tensor], products: torch.dtype) -> dict[str, Any]:
    """Return the figures of a model on each text."""
    found = {}
    for name, ids in tests.items():
        total = measure(model, teacher, ids, products)
        found[name] = {
            "kl": total.kl / total.tokens,
            "perplexity": math.exp(total.cross_entropy / total.tokens),
            "perplexity_original": math.exp(total.reference_cross_entropy / total.tokens),
            "top1_agreement": total.agreements / total.tokens,
        }
    return found


def heal(
    run: Run, paths: tuple[Path, Path], training: torch.Tensor, held_out: torch.Tensor, tests: Any, device: torch.device
) -> dict[str, Any]:
    """Do one run; return its row."""
    source, start = paths
    teacher = load_model(source, None, device).requires_grad_(False)
    model = load_model(start, None, device)
    products = fast_products(model.dtype, device)
    model.float()
    row: dict[str, Any] = asdict(run) | {"curve": [], "losses": [], "seconds": 0.0}
    if run.train is not None:
        stages = Stages(model)
        stages.begin(run.train)
        settings = DistillationSettings(
            run.steps,
            run.batch,
            run.learning_rate,
            rates=() if run.rate is None else (run.rate,),
            products=products,
            match_hidden=run.match_hidden,
        )
        began = time.perf_counter()
        done = distil(model, teacher, training[: run.batch * run.steps], held_out, settings)
        losses = [loss if math.isfinite(loss) else None for loss in done.losses]
        row |= {"curve": done.curve, "losses": losses, "seconds": round(time.perf_counter() - began, 1)}
        stages.end()
    return row | {"tests": judge(model, teacher, tests, products)}


def report(result: dict[str, Any]) -> str:
    """Lay the runs out: KL at the end of the curve, and KL and perplexity of every text."""
    names = list(result["setting"]["tests"])
    heading = ["start", "batch", "rate", "steps", "train", "match", "held out", *names]
    rows = []
    for row in result["rows"]:
        rate = f"lr {row['learning_rate']:g}" if row["learning_rate"] else f"{row['rate'] or 0:g}"
        last = f"{row['curve'][-1][1]:.4f}" if row["curve"] else None
        cells = [f"{row['tests'][name]['kl']:.4f} ({row['tests'][name]['perplexity']:.2f})" for name in names]
        rows.append(
            [row["start"], row["batch"], rate, row["steps"], row["train"], row.get("match_hidden", 0.0), last, *cells]
        )
    return table(rows, heading)


@click.command(help=__doc__)
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("start", type=click.Path(path_type=Path, exists=True))
@click.option("--text", "texts", multiple=True, required=True, help="To train on; several are mixed.")
@click.option("--test", "tests", multiple=True, required=True, help="NAME=FILE[:WINDOWS] to measure on.")
@click.option("--run", "runs", multiple=True, required=True, help="BATCH,RATE,STEPS,TRAIN[,MATCH].")
@click.option("--sequence-length", type=int, default=512, show_default=True)
@click.option("--test-length", type=int, default=1024, show_default=True)
@click.option("--held-out", type=int, default=16, show_default=True, help="Sequences.")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON.")
def main(source, start, texts, tests, runs, sequence_length, test_length, held_out, device, out):
    target = resolve_device(device)
    name = start.resolve().name
    wanted = [Run(name, 0, None, None, 0, None), *(Run.parse(name, text) for text in runs)]
    judged = [parse_test(text) for text in tests]
    tokenizer = load_tokenizer(source)
    ids = token_sequences(read_documents(list(texts)), tokenizer, sequence_length)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    windows = {
        label: token_sequences(read_documents(str(file)), tokenizer, test_length, limit=count)
        for label, file, count in judged
    }
    setting = {
        "source": source.resolve().name,
        "texts": [Path(text).name for text in texts],
        "training_tokens": (len(ids) - held_out) * sequence_length,
        "held_out_tokens": held_out * sequence_length,
        "sequence_length": sequence_length,
        "tests": {
            label: {"file": file.name, "windows": len(windows[label]), "length": test_length}
            for label, file, _ in judged
        },
    }
    result: dict[str, Any] = {"machine": machine(target), "versions": versions(), "setting": setting, "rows": []}
    if out.is_file():
        kept = json.loads(out.read_text(encoding="utf-8"))
        if kept["setting"] != setting:
            raise click.ClickException(f"{out} has rows of other settings: name another file with --out")
        result |= kept
    done = []
    for row in result["rows"]:  # those of before layers' outputs were matched have no weight of theirs
        before = {"match_hidden": None if row["train"] is None else 0.0}
        done.append(before | {key: row[key] for key in asdict(wanted[0]) if key in row})
    for run in wanted:
        if asdict(run) in done:
            continue
        row = heal(run, (source, start), ids[:-held_out], ids[-held_out:], windows, target)
        result["rows"].append(row)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
        click.echo(json.dumps(row), err=True)
    click.echo(report(result))


if __name__ == "__main__":
    main()
