"""What comparing two models takes beyond running them: `evaluate --reference` beside the bare forward passes of both.

The ways take turns on the same sequences, in one process; their ratio is what counts, of time and of processor time
(the steadier one where others use the machine too). `two checkpoints` is measuring two against one reference, beside
three forward passes.

    python benchmarks/evaluation_speed.py CKPT SRC --text held-out.txt --threads 2
"""

import json
import statistics
import time
from pathlib import Path

import click
import torch
from common import machine, synchronize, versions

from mea_compress.loading import load_model, load_tokenizer, vocabulary_size
from mea_compress.measure.evaluation import _compare
from mea_compress.measure.metrics import max_batch_size
from mea_compress.report.tables import table
from mea_compress.text.reading import read_documents
from mea_compress.text.sequences import padded_sequences


def forward(models, ids):
    """Run every model over ids (B, T), logits of all positions, nothing else."""
    with torch.no_grad():
        for model in models:
            model(input_ids=ids.to(model.device), use_cache=False)


def timed(work, device):
    """Return the seconds that some work takes, by the clock and of the processor."""
    synchronize(device)
    began = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - began[0], time.process_time() - began[1]


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("reference", type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--sequence-length", type=int, default=1024, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True, help="One batch of its own in each.")
@click.option("--threads", type=int, help="Of PyTorch.")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(checkpoint, reference, text, sequence_length, rounds, threads, device, out):
    if threads:
        torch.set_num_threads(threads)
    model, original = load_model(checkpoint, device=device), load_model(reference, device=device)
    place = next(model.parameters()).device
    size = max_batch_size(sequence_length, vocabulary_size(model))
    documents, tokenizer = read_documents(text), load_tokenizer(checkpoint)
    ids, mask = padded_sequences(documents, tokenizer, sequence_length, limit=(rounds + 1) * size)
    batches = [(rows, present) for rows, present in zip(ids.split(size), mask.split(size), strict=True)]
    ways = {"one checkpoint": [model], "two checkpoints": [model, model]}
    seconds = {name: [] for name in ways}
    for number, (rows, present) in enumerate(batches):
        for name, models in ways.items():
            bare = lambda models=models, rows=rows: forward([original, *models], rows)  # noqa: E731
            whole = lambda models=models, rows=rows, present=present: _compare(  # noqa: E731
                models, original, rows, present, size, False
            )
            times = [timed(work, place) for work in ((bare, whole) if number % 2 else (whole, bare))]
            if number:  # the first warms up
                seconds[name].append(times if number % 2 else times[::-1])
    results = {
        name: {
            "forward_seconds": round(statistics.median(bare[0] for bare, _ in pairs), 4),
            "evaluate_seconds": round(statistics.median(whole[0] for _, whole in pairs), 4),
            "ratio": round(statistics.median(whole[0] / bare[0] for bare, whole in pairs), 4),
            "processor_ratio": round(statistics.median(whole[1] / bare[1] for bare, whole in pairs), 4),
            "ratios": [[round(whole[kind] / bare[kind], 4) for bare, whole in pairs] for kind in (0, 1)],
        }
        for name, pairs in seconds.items()
    }
    keys = ("forward_seconds", "evaluate_seconds", "ratio", "processor_ratio")
    rows = [[name, *(f"{row[key]:.2f}" for key in keys)] for name, row in results.items()]
    click.echo(table(rows, ["measuring", "forward passes (s)", "evaluate (s)", "ratio", "of processor time"]))
    name = "cpu" if place.type == "cpu" else place.type
    out = out or Path(__file__).parent / "results" / f"evaluation-speed-{name}.json"
    settings = {
        "checkpoint": checkpoint.name,
        "reference": reference.name,
        "model_type": original.config.model_type,
        "vocabulary": vocabulary_size(original),
        "parameters": original.num_parameters(),
        "dtype": str(original.dtype).removeprefix("torch."),
        "sequence_length": sequence_length,
        "batch": size,
        "threads": torch.get_num_threads(),
    }
    result = {"machine": machine(place), "versions": versions(), "settings": settings, "results": results}
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
