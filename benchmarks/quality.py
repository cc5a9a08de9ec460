"""Loss at equal cached bytes: every composition and fit on a list of checkpoints, beside a peer.

Each row compresses a checkpoint into a temporary directory with `mea_compress.compression` and measures it with
`mea_compress.evaluate`, on text that nothing was fitted to. Rows that the result file already has are not run again,
so an interrupted benchmark goes on where it stopped. The peer runs in an environment of its own, named by its Python.

    python benchmarks/quality.py CHECKPOINT --text validation.jsonl --ratio 0.5 --out benchmarks/results/quality.json
"""

import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from mea_compress.checkpoint.files import write_json
from mea_compress.compression import compress
from mea_compress.emit.directory import versions
from mea_compress.errors import RequestError
from mea_compress.measure.evaluation import evaluate
from mea_compress.recipe import load_recipe
from mea_compress.report.tables import table

EQUAL = {"budget": "uniform", "heal": "0"}  # unless a row says otherwise
CLOSED = {"refine": 0}
MEASURED = {"budget": "measured"}
METHODS: dict[str, dict[str, Any]] = {
    "pool, adjacent heads averaged (GQA conversion)": {"fit": "weights", "key": "pool", "value": "pool"},
    "head, weights (the paper's start)": {"fit": "weights", "key": "head", "value": "head"},
    "head, activations": {"fit": "activations", "key": "head", "value": "head"},
    "head, aligned": {"key": "head", "value": "head", **CLOSED},
    "head, aligned, refined": {"key": "head", "value": "head"},
    "prune, aligned": {"key": "prune", "value": "prune", **CLOSED},
    "prune, aligned, refined": {"key": "prune", "value": "prune"},
    "share, weights": {"fit": "weights", "key": "share", "value": "share"},
    "share, aligned": {"key": "share", "value": "share", **CLOSED},
    "share, aligned, refined": {"key": "share", "value": "share"},
    "pool, aligned": {"key": "pool", "value": "pool", **CLOSED},
    "pool, aligned, refined (plain GQA)": {"key": "pool", "value": "pool"},
    "frequency + latent, uniform": {"key": "frequency", "value": "latent", "rotary_allocation": "uniform", **CLOSED},
    "frequency + latent": {"key": "frequency", "value": "latent", **CLOSED},
    "frequency + latent, shared pairs, even, refined (serve-anywhere)": {
        "key": "frequency",
        "value": "latent",
        "rotary_allocation": "shared",
        "split": "even",
    },
    "frequency + latent, even, refined": {"key": "frequency", "value": "latent", "split": "even"},
    "frequency + latent, refined": {"key": "frequency", "value": "latent"},
    "latent + latent (whitened joint SVD: Palu, SVD-LLM, CARE)": {"key": "latent", "value": "latent", **CLOSED},
    "latent + latent, refined": {"key": "latent", "value": "latent"},
    "joint": {"key": "joint", "value": "joint", **CLOSED},
    "joint, refined (best-quality)": {"key": "joint", "value": "joint"},
    "frequency + latent, measured budget": {"key": "frequency", "value": "latent", **CLOSED, **MEASURED},
    "frequency + latent, measured budget, refined": {"key": "frequency", "value": "latent", **MEASURED},
    "frequency + latent, measured budget, healed": {
        "key": "frequency",
        "value": "latent",
        "heal": "auto",
        **CLOSED,
        **MEASURED,
    },
    "frequency + latent, measured budget, refined, healed (the default)": {
        "key": "frequency",
        "value": "latent",
        "heal": "auto",
        **MEASURED,
    },
    "latent + latent, measured budget": {"key": "latent", "value": "latent", **CLOSED, **MEASURED},
    "latent + latent, measured budget, refined, healed (best-50)": {
        "key": "latent",
        "value": "latent",
        "heal": "auto",
        **MEASURED,
    },
}
PEER = "peer: cacheshrink, separate, calibrated"


def run_method(checkpoint: Path, method: dict[str, Any], ratio: float, options: dict[str, Any]) -> dict[str, Any]:
    """Compresses, measures and forgets; the figures of one row."""
    settings = dict(method)
    refine = settings.get("refine", None if settings.get("fit", "aligned") == "aligned" else 0)
    overrides = {
        "kv_ratio": ratio,
        "key_composition": settings.pop("key"),
        "value_composition": settings.pop("value"),
        **EQUAL,
        **settings,
        "text": options["calibration"],
        "sequences": options["sequences"],
        "sequence_length": options["sequence_length"],
        "seed": options["seed"],
        "device": options["device"],
        "refine": options["steps"] if refine is None else refine,
    }
    with tempfile.TemporaryDirectory(prefix="mea-quality-") as scratch:
        out, start = Path(scratch) / "out", time.perf_counter()
        result = compress(checkpoint, out, recipe=load_recipe(overrides=overrides), progress=options["progress"])
        seconds = time.perf_counter() - start
        found = evaluate(
            out,
            text=options["text"],
            reference=checkpoint,
            sequence_length=options["sequence_length"],
            limit=options["limit"],
            device=options["device"],
            progress=options["progress"],
        ).to_json()
    return {
        **{key: found[key] for key in ("kl", "cross_entropy", "top1_agreement", "kv_bytes_per_token", "tokens")},
        "reference": found["reference"],
        "seconds": round(seconds, 1),
        "components": [[layer.spec.key.components, layer.spec.value.components] for layer in result.plan.layers],
    }


def run_peer(checkpoint: Path, ratio: float, options: dict[str, Any]) -> dict[str, Any]:
    """The peer's row, measured by `peer_cacheshrink.py` on the same sequences."""
    script = Path(__file__).with_name("peer_cacheshrink.py")
    with tempfile.TemporaryDirectory(prefix="mea-peer-") as scratch:
        done = subprocess.run(
            [
                options["peer_python"],
                str(script),
                str(checkpoint),
                str(options["text"]),
                str(options["peer_calibration"]),
                str(ratio),
                str(options["sequence_length"] or 256),
                str(options["limit"] or 0),
            ],
            capture_output=True,
            text=True,
            cwd=scratch,
            check=False,
        )
    if done.returncode:
        raise click.ClickException(f"the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(rows: list[dict[str, Any]]) -> str:
    shown = [
        [
            row["checkpoint"],
            f"{100 * row['ratio']:g} %",
            row["method"],
            f"{row['kl']:.4f}",
            f"{100 * (row['cross_entropy'] / row['reference']['cross_entropy'] - 1):+.1f} %",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['kv_bytes_per_token']:g}",
            f"{row['seconds']:g}",
        ]
        for row in rows
    ]
    return table(shown, ["checkpoint", "cache", "method", "KL", "loss", "top-1", "bytes/token", "seconds"])


@click.command(help=__doc__)
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path), help="Text to measure on.")
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), help="Text to fit on; sampled without.")
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.5,), show_default=True)
@click.option("--method", "chosen", multiple=True, help="Only this method, or those whose name contains this.")
@click.option("--steps", type=int, help="Refinement steps; by the model's size without.")
@click.option("--sequences", type=int, help="Calibration sequences.")
@click.option("--sequence-length", type=int)
@click.option("--limit", type=int, help="Measure this many sequences only.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--peer-python", help="Python of an environment with cacheshrink.")
@click.option("--peer-calibration", type=click.Path(exists=True, path_type=Path), help="Stories for the peer.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "quality.json")
@click.option("--progress/--no-progress", default=True)
def main(checkpoints, ratios, chosen, out, **options):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    done = {(row["checkpoint"], row["ratio"], row["method"]) for row in rows}
    wanted = {
        name: method
        for name, method in METHODS.items()
        if not chosen or any(part == name or (part not in METHODS and part in name) for part in chosen)
    }
    if options["peer_python"]:
        wanted[PEER] = {}
    for checkpoint in checkpoints:
        for ratio in ratios:
            for name, method in wanted.items():
                if (checkpoint.name, ratio, name) in done:
                    continue
                click.echo(f"{checkpoint.name}, {ratio:g}: {name}", err=True)
                try:
                    row = (
                        run_peer(checkpoint, ratio, options)
                        if name == PEER
                        else run_method(checkpoint, method, ratio, options)
                    )
                except RequestError as error:
                    click.echo(f"  left out: {error}", err=True)
                    continue
                settings = {
                    key: str(value) if isinstance(value, Path) else value
                    for key, value in options.items()
                    if key in ("steps", "sequences", "sequence_length", "limit", "seed", "device") and value is not None
                }
                settings["text"] = options["text"].name
                settings["calibration"] = options["calibration"].name if options["calibration"] else "sampled"
                rows.append(
                    {"checkpoint": checkpoint.name, "ratio": ratio, "method": name, **row, "settings": settings}
                )
                machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
                write_json(out, {"versions": versions(), "machine": machine, "rows": rows})
    click.echo(markdown([row for row in rows if row["checkpoint"] in {path.name for path in checkpoints}]))


if __name__ == "__main__":
    main()
