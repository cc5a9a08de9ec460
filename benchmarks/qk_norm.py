"""A model with QK-norm composed in its projections, as Qwen3 is, beside the same model composed at its cache.

Qwen3's attention is also that of dots.llm1, which is composed at its cache: the checkpoint is written out as one whose
layers are all dense, with the same tensors, and both are asked for the same logits first. Keys alone and keys with
values are compressed, in closed form. In the projections the inverse norm of every key head is cached beside them.

    python benchmarks/small_models.py SMALL --kind qwen3 --steps 300
    python benchmarks/qk_norm.py SMALL/qwen3 --text SMALL/held-out.txt --calibration SMALL/train.txt
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from common import machine, versions
from quality import CLOSED, run_method

from mea_compress.checkpoint.files import write_json
from mea_compress.loading import load_model
from mea_compress.report.tables import table

PLACES = {"in the projections": "qwen3", "at the cache": "dots1"}


def write_as_dots(checkpoint: Path, out: Path) -> Path:
    """Write a Qwen3 checkpoint as one of dots.llm1 that computes the same."""
    shutil.copytree(checkpoint, out)
    config = json.loads((checkpoint / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config |= {"model_type": "dots1", "architectures": ["Dots1ForCausalLM"], "first_k_dense_replace": layers}
    config |= {"layer_types": ["full_attention"] * layers, "sliding_window": None}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        expected, found = (load_model(path, None, "cpu")(ids).logits for path in (checkpoint, out))
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        raise click.ClickException("the two classes compute something else: this release of transformers differs")
    return out


def methods(heads: int) -> dict[str, dict[str, Any]]:
    """What is compressed: keys alone to half of their heads, and keys and values to half of the cache."""
    both = {"key": "frequency", "value": "latent", "split": "even", **CLOSED}
    return {
        "keys alone": {**both, "value": None, "kv_ratio": None, "key_components": heads // 2},
        "keys and values": both,
    }


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path), help="Text to measure on.")
@click.option("--calibration", required=True, type=click.Path(exists=True, path_type=Path), help="Text to fit on.")
@click.option("--sequences", type=int, default=64, show_default=True, help="Calibration sequences.")
@click.option("--limit", type=int, default=60, show_default=True, help="Measure this many sequences.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(checkpoint, text, calibration, sequences, limit, out):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"text": text, "calibration": calibration, "sequences": sequences, "limit": limit}
    options |= {"sequence_length": None, "seed": 0, "device": "cpu", "steps": 0, "progress": False}
    heads, rows = json.loads((checkpoint / "config.json").read_text())["num_key_value_heads"], []
    with tempfile.TemporaryDirectory(prefix="mea-qk-norm-") as scratch:
        sources = {"qwen3": checkpoint, "dots1": write_as_dots(checkpoint, Path(scratch) / "dots1")}
        for method, settings in methods(heads).items():
            for place, family in PLACES.items():
                click.echo(f"{method}, {place}", err=True)
                rows.append(
                    {"method": method, "composed": place, **run_method(sources[family], settings, 0.5, options)}
                )
    shown = [
        [row["method"], row["composed"], f"{row['kl']:.5f}", f"{row['kv_bytes_per_token']:g}", f"{row['seconds']:g}"]
        for row in rows
    ]
    click.echo(table(shown, ["compressed", "composed", "KL", "bytes/token", "seconds"]))
    if out:
        command = "python benchmarks/qk_norm.py SMALL/qwen3 --text SMALL/held-out.txt --calibration SMALL/train.txt"
        machines = {"machine": machine("cpu"), "versions": versions(), "threads": torch.get_num_threads()}
        sizes = {"model": "small_models.py, qwen3", "sequences": sequences, "measured_sequences": limit}
        write_json(
            out, {"command": f"{command} --json benchmarks/results/{out.name}", **machines, **sizes, "rows": rows}
        )


if __name__ == "__main__":
    main()
