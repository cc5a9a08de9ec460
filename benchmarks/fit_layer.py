"""Seconds and GPU memory of the fit of one layer: statistics, closed form, refinement, and all of `compress`.

The layer has the shape of Llama-3.2-1B's and random weights in bfloat16; the calibration text is random tokens. What is
timed are the package's own functions while `compress` calls them, so a stage counts each time that it is entered.

    python benchmarks/fit_layer.py --device cuda --steps 0 --steps 100
"""

import functools
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from common import machine, synchronize, versions, write_random_llama

from mea_compress.compression import compress
from mea_compress.fit import layers as fit_layers
from mea_compress.fit.layers import CalibratedFit
from mea_compress.fit.refinement import Refiner
from mea_compress.layers.runner import LayerRunner
from mea_compress.recipe import load_recipe

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
}
VOCABULARY = 4096  # of random tokens, whatever the shape
STAGES: dict[str, tuple[Any, str]] = {
    "original's pass, statistics": (CalibratedFit, "pass_original"),
    "closed form": (fit_layers, "compose"),
    "regression, splits tried": (CalibratedFit, "regress"),
    "refinement": (Refiner, "refine"),
    "loading layers": (LayerRunner, "__init__"),
}


class Stopwatch:
    """Seconds, calls and peak GPU memory (bytes) of each stage; one that is within another counts in both."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: dict[str, dict[str, float]] = {}

    def watch(self, stage: str, function):
        """Return the function, watched."""

        @functools.wraps(function)
        def watched(*arguments, **options):
            synchronize(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            began = time.perf_counter()
            result = function(*arguments, **options)
            synchronize(self.device)
            entry = self.stages.setdefault(stage, {"seconds": 0.0, "calls": 0})
            entry["seconds"] += time.perf_counter() - began
            entry["calls"] += 1
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
                entry["peak_gpu_bytes"] = max(entry.get("peak_gpu_bytes", 0), peak)
            return result

        return watched


def run(checkpoint: Path, tokens: torch.Tensor, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Compress the checkpoint once, every stage watched; one row."""
    stopwatch = Stopwatch(device)
    with tempfile.TemporaryDirectory(prefix="mea-fit-layer-") as scratch, ExitStack() as patches:
        patches.enter_context(patch.object(fit_layers, "calibration_tokens", lambda *_: tokens))
        for stage, (owner, name) in STAGES.items():
            patches.enter_context(patch.object(owner, name, stopwatch.watch(stage, getattr(owner, name))))
        began = time.perf_counter()
        result = compress(checkpoint, Path(scratch) / "out", recipe=load_recipe(overrides=settings), progress=False)
        seconds = time.perf_counter() - began
    row = {
        "settings": settings,
        "tokens": tokens.numel(),
        "seconds": seconds,
        "stages": stopwatch.stages,
        "layer": result.fidelity["layers"].get("0"),
    }
    peaks = [stage["peak_gpu_bytes"] for stage in stopwatch.stages.values() if "peak_gpu_bytes" in stage]
    return row | ({"peak_gpu_bytes": max(peaks)} if peaks else {})


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-3.2-1b", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--sequences", type=int, default=128, show_default=True)
@click.option("--sequence-length", type=int, default=1024, show_default=True)
@click.option("--steps", "all_steps", type=int, multiple=True, default=(0, 100), help="Of refinement; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON; default: results/fit-layer-DEVICE.json")
def main(shape, device, sequences, sequence_length, all_steps, out):
    out = out or Path(__file__).parent / "results" / f"fit-layer-{device}.json"
    target = torch.device(device)
    result: dict[str, Any] = {"machine": machine(target), "versions": versions(), "shape": shape, "rows": []}
    result |= {"dtype": "bfloat16", "threads": torch.get_num_threads()}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (sequences, sequence_length), generator=generator)
    with tempfile.TemporaryDirectory(prefix="mea-fit-layer-") as scratch:
        checkpoint = Path(scratch) / "original"
        sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "max_position_embeddings": sequence_length}
        write_random_llama(checkpoint, torch.bfloat16, **SHAPES[shape], **sizes)
        if target.type == "cuda":  # a GPU's libraries load at their first product: that is no stage's time
            matrix = torch.randn(1024, 1024, device=target)
            torch.linalg.norm(matrix @ matrix + (matrix.double() @ matrix.double()).float()).item()
        for kinds in (("frequency", "latent"), ("head", "head")):
            for steps in all_steps:
                settings = {
                    "kv_ratio": 0.5,
                    "key_composition": kinds[0],
                    "value_composition": kinds[1],
                    "sequences": sequences,
                    "sequence_length": sequence_length,
                    "refine": steps,
                    "heal": 0,
                    "budget": "uniform",
                    "device": device,
                }
                result["rows"].append(run(checkpoint, tokens, settings, target))
                click.echo(json.dumps(result["rows"][-1]), err=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
