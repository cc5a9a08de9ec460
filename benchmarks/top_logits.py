"""Memory and processor time of the distillation loss of one sequence: of the whole vocabulary, and of K logits.

Random hidden states and a random head of the given shape, each way in a process of its own; `bytes` is by how much the
peak of its memory grows over what it has before. Rows that the result has already are not run again.

    python benchmarks/top_logits.py --out benchmarks/results/top-logits-cpu.json
"""

import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click
import torch
from common import machine, versions
from torch import nn

from mea_compress.checkpoint.files import write_json
from mea_compress.training.head_loss import HeadLoss, whole_row
from mea_compress.training.top_logits import top_row

SHAPE = {"vocabulary": 49152, "channels": 576, "tokens": 1024}  # SmolLM2-135M's


def one(dtype: torch.dtype, count: int) -> dict[str, float]:
    """Return bytes and seconds of a loss with the gradient of its hidden states; `count` 0 is the whole vocabulary."""
    torch.manual_seed(0)
    head = nn.Linear(SHAPE["channels"], SHAPE["vocabulary"], bias=False).to(dtype).requires_grad_(False)
    head.weight.mul_(10)
    target = torch.randn(1, SHAPE["tokens"], SHAPE["channels"])
    hidden = (target + 0.1 * torch.randn_like(target)).requires_grad_(True)
    ids = torch.zeros(1, SHAPE["tokens"], dtype=torch.int64)
    weights = torch.full(ids.shape, 1 / SHAPE["tokens"])
    shared = (hidden, target, head, head, ids, None, weights, None, 1.0)
    small = tuple(each[:, :2] if isinstance(each, torch.Tensor) else each for each in shared)
    loss_of = partial(top_row, count=count) if count else whole_row
    HeadLoss.apply(*small, loss_of).backward()  # what libraries take when they are first called
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    loss = HeadLoss.apply(*shared, loss_of)
    loss.backward()
    seconds = time.process_time() - began
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"logits": count or SHAPE["vocabulary"], "bytes": grown, "seconds": round(seconds, 3), "loss": loss.item()}


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), help="JSON.")
@click.option("--way", nargs=2, type=str, hidden=True)
def main(out: Path | None, way: tuple[str, str] | None) -> None:
    if way:
        click.echo(json.dumps({"dtype": way[0]} | one(getattr(torch, way[0]), int(way[1]))))
        return
    result = {"machine": machine("cpu"), "versions": versions(), "shape": SHAPE, "rows": []}
    if out and out.is_file():
        result = json.loads(out.read_text(encoding="utf-8"))
    done = {(row["dtype"], row["logits"]) for row in result["rows"]}
    for dtype in ("float32", "bfloat16"):
        for count in (0, 1024, 256, 64):
            if (dtype, count or SHAPE["vocabulary"]) in done:
                continue
            command = [sys.executable, __file__, "--way", dtype, str(count)]
            result["rows"].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
            click.echo(json.dumps(result["rows"][-1]), err=True)
            if out:
                write_json(out, result)


if __name__ == "__main__":
    main()
