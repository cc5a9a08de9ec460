"""What healing makes of several starts, by the tokens that it is given, and how fast it is.

Each start is compressed once into WORK, and healed for every number of tokens, each time from the start and on the same
sequences; KL and loss are measured on text that nothing was fitted to or healed on. `tokens_per_second` compares steps
of healing with those of fine-tuning the original's attention, and with the same beside a forward pass of a teacher,
which distillation cannot do without. Rows that the result has already are not run again.

    python benchmarks/healing.py CHECKPOINT --text held-out.txt --healing-text train.txt --work WORK --out healing.json
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from common import machine, versions
from healing_speed import FIRST_STEPS, Clock, fine_tune

from mea_compress.checkpoint.files import write_json
from mea_compress.compression import compress
from mea_compress.healing import heal
from mea_compress.layers.runner import fast_products
from mea_compress.loading import load_model, load_tokenizer, resolve_device
from mea_compress.measure.evaluation import evaluate
from mea_compress.report.tables import table
from mea_compress.text.reading import read_documents
from mea_compress.text.sequences import token_sequences
from mea_compress.training.settings import MATCH_HIDDEN, DistillationSettings
from mea_compress.training.stages import Stages
from mea_compress.training.trainer import train_student

LATENT = {"key_composition": "frequency", "value_composition": "latent"}
HEAD = {"key_composition": "head", "value_composition": "head"}
CLOSED = {"refine": 0, "heal": 0}
STARTS: dict[str, dict[str, Any]] = {
    "paper": HEAD | {"fit": "weights", "budget": "uniform", "heal": 0},
    "head, aligned": HEAD | CLOSED | {"budget": "uniform"},
    "frequency + latent": LATENT | CLOSED | {"budget": "uniform"},
    "frequency + latent, measured budget": LATENT | CLOSED,
    "frequency + latent, measured budget, refined": LATENT | {"heal": 0, "refine": 300},
    "joint, measured budget, refined, healed (best)": {
        "key_composition": "joint",
        "value_composition": "joint",
        "effort": "best",
    },
}
FIGURES = ("kl", "cross_entropy", "top1_agreement")


def measured(path: Path, reference: Path, options: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a checkpoint on the held-out text."""
    found = evaluate(
        path,
        text=options["text"],
        reference=reference,
        sequence_length=options["sequence_length"],
        limit=options["limit"],
        device=options["device"],
        progress=False,
    ).to_json()
    return {name: found[name] for name in FIGURES}


def speed(student: Path, original: Path, options: dict[str, Any], steps: int, rounds: int) -> dict[str, Any]:
    """Return tokens a second of three ways that take turns; the first steps of each run do not count."""
    device, every = resolve_device(options["device"]), FIRST_STEPS + steps
    length, batch = options["sequence_length"], options["batch_size"]
    documents = read_documents(options["healing_text"] or options["text"])
    ids = token_sequences(documents, load_tokenizer(original), length, limit=every * batch)
    ids = ids.repeat(-(-every * batch // len(ids)), 1)[: every * batch]
    teacher = load_model(original, None, device)
    products = fast_products(teacher.dtype, device)
    students = {name: load_model(path, None, device).float() for name, path in (("s", student), ("o", original))}
    for model in students.values():
        Stages(model).begin("attention")

    def healing(clock: Clock) -> None:
        trained = [weight for weight in students["s"].parameters() if weight.requires_grad]
        settings = DistillationSettings(every, batch, 1e-5, products=products, match_hidden=MATCH_HIDDEN)
        train_student(students["s"], teacher, ids, [{"params": trained, "lr": 1e-5}], settings, every, clock.tick)

    def tuning(clock: Clock, beside: Any) -> None:
        with torch.autocast(device.type, products, enabled=products != torch.float32):
            fine_tune(students["o"], beside, ids, every, batch, clock.tick)

    ways = {
        "healing": healing,
        "fine-tuning": lambda clock: tuning(clock, None),
        "fine-tuning and a teacher": lambda clock: tuning(clock, teacher),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            clock = Clock(device)
            run(clock)
            times[name].append(clock.seconds_per_step())
    found = {name: batch * length / statistics.median(each) for name, each in times.items()}
    return {**found, "healing / fine-tuning and a teacher": found["healing"] / found["fine-tuning and a teacher"]}


def report(result: dict[str, Any]) -> str:
    """Lay the KL out by start and tokens, loss in brackets."""
    budgets = sorted({row["tokens"] for row in result["rows"]})
    cells = {(row["start"], row["tokens"]): f"{row['kl']:.4f} ({row['cross_entropy']:.4f})" for row in result["rows"]}
    starts = list(dict.fromkeys(row["start"] for row in result["rows"]))
    heading = ["start", *(f"{budget:,} tokens" for budget in budgets)]
    return table([[start, *(cells.get((start, budget)) for budget in budgets)] for start in starts], heading)


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--text", required=True, help="To measure on.")
@click.option("--healing-text", help="To fit and to heal on; sampled from the checkpoint without it.")
@click.option("--ratio", type=float, default=0.5, show_default=True)
@click.option("--tokens", default="131072,524288", show_default=True, help="Budgets of healing, trials left out.")
@click.option("--starts", help=f"Some of: {'; '.join(STARTS)} (separated by semicolons); all without it.")
@click.option("--sequences", type=int, default=128, show_default=True, help="Of the fit.")
@click.option("--sequence-length", type=int, default=512, show_default=True)
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--limit", type=int, help="Sequences to measure on.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--speed-steps", type=int, default=6, show_default=True, help="That count in a timed run; 0 times nothing."
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keeps the starts.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON.")
def main(checkpoint, work, out, tokens, starts, ratio, speed_steps, **options):
    budgets = [int(number) for number in tokens.split(",")]
    chosen = [name.strip() for name in starts.split(";")] if starts else list(STARTS)
    setting = {"checkpoint": checkpoint.resolve().name, "ratio": ratio} | {
        name: Path(value).name if name in ("text", "healing_text") and value else value
        for name, value in options.items()
    }
    result: dict[str, Any] = {
        "setting": setting,
        "machine": machine(options["device"]),
        "versions": versions(),
        "original": None,
        "rows": [],
    }
    if out.is_file():
        kept = json.loads(out.read_text(encoding="utf-8"))
        if kept["setting"] != setting:
            raise click.ClickException(f"{out} has rows of other settings: name another file with --out")
        result |= kept

    def save() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)

    if result["original"] is None:
        result["original"] = measured(checkpoint, checkpoint, options)
        save()
    done = {(row["start"], row["tokens"]) for row in result["rows"]}
    for name in chosen:
        start = work / f"{list(STARTS).index(name)}-{checkpoint.resolve().name}"
        if not (start / "compression.json").is_file():
            shutil.rmtree(start.with_name(f"{start.name}.partial"), ignore_errors=True)
            began = time.perf_counter()
            shared = {
                "kv_ratio": ratio,
                "text": options["healing_text"],
                "sequences": options["sequences"],
                "sequence_length": options["sequence_length"],
                "seed": options["seed"],
                "device": options["device"],
            }
            compress(checkpoint, start, progress=False, **{**shared, **STARTS[name]})
            (start / "seconds").write_text(str(round(time.perf_counter() - began, 1)))
        for budget in [0, *budgets]:
            if (name, budget) in done:
                continue
            row: dict[str, Any] = {"start": name, "tokens": budget}
            if not budget:
                row |= measured(start, checkpoint, options) | {"seconds": float((start / "seconds").read_text())}
            else:
                with tempfile.TemporaryDirectory(prefix="mea-healing-") as scratch:
                    healed = heal(
                        start,
                        teacher=checkpoint,
                        text=options["healing_text"],
                        steps=max(1, budget // (options["batch_size"] * options["sequence_length"])),
                        out=Path(scratch) / "out",
                        batch_size=options["batch_size"],
                        sequence_length=options["sequence_length"],
                        seed=options["seed"],
                        device=options["device"],
                        progress=False,
                    )
                    row |= measured(Path(scratch) / "out", checkpoint, options)
                row |= {
                    "kept": healed.kept,
                    "relative_rate": healed.relative_rate,
                    "with_trials": healed.tokens,
                    "held_out_kl": [healed.kl_before, healed.kl_after],
                    "text": healed.text,
                    "seconds": healed.seconds,
                }
            result["rows"].append(row)
            save()
            click.echo(json.dumps(row), err=True)
    if speed_steps and "tokens_per_second" not in result:
        start = work / f"{list(STARTS).index(chosen[-1])}-{checkpoint.resolve().name}"
        result["tokens_per_second"] = speed(start, checkpoint, options, speed_steps, 3) | {"student": chosen[-1]}
        save()
    click.echo(report(result))


if __name__ == "__main__":
    main()
