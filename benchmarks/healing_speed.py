"""Tokens a second of healing, beside fine-tuning the original with a forward pass of a teacher for each batch.

Random weights and random tokens. All ways train the attention blocks in float32 with AdamW and take turns; the first
steps of a run do not count, nor does starting it.

- `healing`: what `mea-compress heal` does, of a checkpoint with half of its cache;
- `healing, original as the student`: the same loop without the compressed model;
- `fine-tuning`: cross-entropy of the original in a bare loop;
- `fine-tuning and a teacher`: the same with a forward pass of a second model, what distillation cannot do without.

Products are computed in what healing takes on the device, and the teacher is stored in that, in all ways.

    python benchmarks/healing_speed.py --device cuda
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import machine, synchronize, versions, write_random_llama

from mea_compress.compression import compress
from mea_compress.layers.runner import fast_products, reading_dtype
from mea_compress.loading import load_model
from mea_compress.measure.metrics import max_batch_size
from mea_compress.recipe import load_recipe
from mea_compress.training.losses import autocast
from mea_compress.training.settings import MATCH_HIDDEN, DistillationSettings
from mea_compress.training.stages import Stages
from mea_compress.training.trainer import train_student

HEALING, REFERENCE = "healing", "fine-tuning and a teacher"
FIRST_STEPS = 2  # of every run, which do not count


def fine_tune(
    model: Any,
    teacher: Any | None,
    ids: torch.Tensor,
    steps: int,
    batch_size: int,
    products: torch.dtype,
    tick: Callable[[], None],
) -> None:
    """Train a model in a bare loop, in micro-batches as large as healing's; `tick` is called after every step."""
    micro = math.gcd(batch_size, max_batch_size(ids.shape[1], model.config.vocab_size))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for rows in ids[step * batch_size : (step + 1) * batch_size].to(model.device).split(micro):
            with autocast(model, products):
                if teacher is not None:
                    with torch.no_grad():
                        teacher(input_ids=rows, use_cache=False)
                logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (loss * len(rows) / batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tick()
    model.eval()


class Clock:
    """The times at which steps ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def tick(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        return (self.times[-1] - self.times[FIRST_STEPS - 1]) / (len(self.times) - FIRST_STEPS)


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--layers", type=int, default=12, show_default=True)
@click.option(
    "--hidden", type=int, default=768, show_default=True, help="Heads of 64 channels, two to a key/value head."
)
@click.option("--vocabulary", type=int, default=32000, show_default=True)
@click.option("--sequence-length", type=int, default=1024, show_default=True)
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--steps", type=int, default=8, show_default=True, help="That count, in each run.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON; default: results/healing-speed-DEVICE.json")
def main(device, layers, hidden, vocabulary, sequence_length, batch_size, steps, rounds, out):
    out = out or Path(__file__).parent / "results" / f"healing-speed-{device}.json"
    target, all_steps = torch.device(device), FIRST_STEPS + steps
    products = fast_products(torch.bfloat16, target)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "max_position_embeddings": sequence_length,
    }
    result: dict[str, Any] = {
        "machine": machine(target),
        "versions": versions(),
        "sizes": sizes,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "products": str(products),
        "rows": [],
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (all_steps * batch_size, sequence_length), generator=generator)
    with tempfile.TemporaryDirectory(prefix="mea-healing-speed-") as scratch:
        original = Path(scratch) / "original"
        write_random_llama(original, torch.bfloat16, **sizes)
        for kinds in (("frequency", "latent"), ("head", "head")):
            compressed = Path(scratch) / "+".join(kinds)
            settings = {"kv_ratio": 0.5, "key_composition": kinds[0], "value_composition": kinds[1], "fit": "weights"}
            compress(original, compressed, recipe=load_recipe(overrides=settings), progress=False)
            teacher = load_model(original, reading_dtype(torch.bfloat16, target), target).requires_grad_(False)
            students = {
                name: load_model(path, None, target).float()
                for name, path in (("original", original), ("compressed", compressed))
            }
            for student in students.values():
                Stages(student).begin("attention")

            def heal(clock: Clock, name: str, students=students, teacher=teacher) -> None:
                trained = [weight for weight in students[name].parameters() if weight.requires_grad]
                settings = DistillationSettings(
                    all_steps, batch_size, 1e-5, products=products, match_hidden=MATCH_HIDDEN
                )
                groups = [{"params": trained, "lr": 1e-5}]
                train_student(students[name], teacher, ids, groups, settings, all_steps, lambda _: clock.tick())

            def tune(clock: Clock, teacher: Any, students=students) -> None:
                fine_tune(students["original"], teacher, ids, all_steps, batch_size, products, clock.tick)

            ways: dict[str, Callable[[Clock], None]] = {
                HEALING: lambda clock, heal=heal: heal(clock, "compressed"),
                "healing, original as the student": lambda clock, heal=heal: heal(clock, "original"),
                "fine-tuning": lambda clock, tune=tune: tune(clock, None),
                REFERENCE: lambda clock, tune=tune, teacher=teacher: tune(clock, teacher),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, run in ways.items():
                    clock = Clock(target)
                    run(clock)
                    times[name].append(clock.seconds_per_step())
            speeds = {name: batch_size * sequence_length / statistics.median(each) for name, each in times.items()}
            row = {
                "compositions": kinds,
                "tokens_per_second": speeds,
                "healing / fine-tuning and a teacher": speeds[HEALING] / speeds[REFERENCE],
                "seconds_per_step": times,
            }
            if target.type == "cuda":
                row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(target)
            result["rows"].append(row)
            click.echo(json.dumps(row), err=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
