"""The demonstration: train a small native MEA model on text every machine has, compress it, heal it, compare them.

The text is the running Python's library, so nothing is downloaded. What a directory holds afterwards::

    text/train.txt, text/held-out.txt    documents of the library, split by document
    original/                            the trained model with its tokenizer; reused while its settings stay the same
    paper-start/                         a quarter of its KV cache, the paper's way: from the weights alone
    paper-healed/                        the same after distillation from the original
    compressed/                          a quarter of its KV cache, in the closed form of `compress`
    healed/                              the same after as much distillation
    demo.json                            settings and figures
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.checkpoint.files import write_json, write_text
from mea_compress.errors import RequestError
from mea_compress.recipe import load_recipe
from mea_compress.report.tables import format_bytes, table

if TYPE_CHECKING:
    import torch

    from mea_compress.demo.training import Size

# What is done to the cache, of which a quarter leaves something to heal: all but healing, which is shown by itself.
COMPRESSION: dict[str, Any] = {"kv_ratio": 0.25, "refine": 0, "heal": 0}
# The paper's start, from the weights alone, to compare with.
PAPER: dict[str, Any] = {**COMPRESSION, "key_composition": "head", "value_composition": "head", "fit": "weights"}
# Counted up when the same settings train another model.
VERSION = 3

_STAGES = 5
_MARK = "demo.json"
# What of a size has no part in training the original.
_NOT_TRAINED = ("healing_share", "calibration_sequences", "measured_sequences")


def run_demo(
    directory: Path,
    *,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    size: Size | None = None,
    progress: bool = True,
) -> str:
    """Run all stages in a directory and compare the original with compressed and healed checkpoints.

    Args:
        directory: New, empty, or of an earlier demonstration, whose compressed checkpoints are replaced.
        steps: Training steps of the original; None takes those of the size.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        seed: Seed of everything; the same seed gives the same bytes on the same CPU.
        size: How large model and text are; None is made for two CPU cores and a few minutes.
        progress: Show stages and progress bars on stderr.

    Returns:
        One table, where the checkpoints are, and commands to go on with.

    Raises:
        RequestError: The directory belongs to something else, the device is not there, or Python's library is not
            installed as text.
    """
    # Imported here: a directory that cannot be used is refused before transformers is loaded.
    check_directory(directory)
    from mea_compress.compression import compress
    from mea_compress.demo.training import Size
    from mea_compress.healing import heal
    from mea_compress.loading import resolve_device
    from mea_compress.measure.evaluation import evaluate

    size = size or Size()
    if steps is not None:
        size = replace(size, steps=steps)
    target = resolve_device(device)
    stages = _Stages(progress)
    write_json(directory / _MARK, {"seed": seed, "size": asdict(size)})

    stages.begin("text from Python's own library")
    train_text, held_out_text = (directory / "text" / f"{name}.txt" for name in ("train", "held-out"))
    documents = _write_texts(size, train_text, held_out_text)

    original = directory / "original"
    _train_unless_there(original, documents, size, target, seed, stages)

    starts = {"paper-start": "paper-healed", "compressed": "healed"}
    for path in (directory / name for pair in starts.items() for name in pair):
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
    stages.begin("compressing it to a quarter of its KV cache, the paper's way and with aligned heads")
    everywhere = {"seed": seed, "device": device}
    calibration = {"text": train_text, "sequences": size.calibration_sequences}
    recipes = {"paper-start": PAPER | everywhere, "compressed": COMPRESSION | calibration | everywhere}
    results = {
        name: compress(original, directory / name, recipe=load_recipe(None, settings), progress=progress)
        for name, settings in recipes.items()
    }
    stages.begin(f"healing both: {size.healing_steps} steps of distillation from the original")
    for start, healed in starts.items():
        heal(
            directory / start,
            teacher=original,
            text=train_text,
            steps=size.healing_steps,
            out=directory / healed,
            batch_size=size.batch_size,
            sequence_length=size.context,
            seed=seed,
            device=device,
            progress=progress,
        )
    stages.begin("measuring on held-out text")
    parameters = {"original": results["compressed"].plan.costs.parameters_before}
    for pair in starts.items():
        parameters |= dict.fromkeys(pair, results[pair[0]].plan.costs.parameters_after)
    figures = {
        name: evaluate(
            directory / name,
            text=held_out_text,
            reference=original,
            sequence_length=size.context,
            limit=size.measured_sequences,
            device=device,
            progress=progress,
        ).to_json()
        | {"parameters": parameters[name]}
        for name in parameters
    }
    stages.end()
    write_json(
        directory / _MARK,
        {"seed": seed, "size": asdict(size), "seconds": stages.seconds, "figures": figures},
    )
    return f"{_table(figures)}\n\n{_what_next(original, directory / 'healed', held_out_text)}"


def _write_texts(size: Size, train_text: Path, held_out_text: Path) -> list[str]:
    """Write the library's documents into two files, and return those to train on."""
    from mea_compress.demo.documents import library_documents, split_documents

    train, held_out = split_documents(library_documents(size.text_bytes), size.held_out_share)
    for path, documents in ((train_text, train), (held_out_text, held_out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(documents) + "\n"
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
    return train


def _train_unless_there(
    original: Path, documents: list[str], size: Size, device: torch.device, seed: int, stages: _Stages
) -> None:
    """Train the original, unless the checkpoint that is there was trained with the same settings."""
    from mea_compress.demo.training import SETTINGS, train_original

    settings = {
        "version": VERSION,
        "seed": seed,
        "device": device.type,
        "size": {key: value for key, value in asdict(size).items() if key not in _NOT_TRAINED},
        "text": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
    }
    if _read_json(original / SETTINGS) == settings:
        stages.begin(f"{original} is there already and is used again")
        return
    stages.begin(f"training a native MEA model: {size.steps} steps of {size.batch_size * size.context} tokens")
    train_original(original, documents, size, device, seed, settings, stages.progress)


def check_directory(directory: Path) -> None:
    """Raise if something else lives in a directory, before anything is written.

    Raises:
        RequestError: It is no directory, cannot be written to, or holds files and is not a demonstration's.
    """
    if directory.exists() or directory.is_symlink():
        if not directory.is_dir():
            raise RequestError(f"{directory} is not a directory; name another one with --out")
        if any(directory.iterdir()) and not (directory / _MARK).is_file():
            raise RequestError(f"{directory} holds other files; name a new directory with --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{directory} cannot be made ({error.strerror}); name another place with --out") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RequestError(f"{directory} cannot be written to; name another place with --out")


def _read_json(path: Path) -> object:
    """Return the content of a file, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _table(figures: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{measured['cross_entropy']:.4f}",
            f"{measured['kl']:.4f}",
            f"{100 * measured['top1_agreement']:.1f} %",
            format_bytes(measured["kv_bytes_per_token"]),
            f"{measured['parameters']:,}",
        ]
        for name, measured in figures.items()
    ]
    headers = ["", "cross-entropy", "KL from original", "top-1 agreement", "cache per token", "parameters"]
    return table(rows, headers)


def _what_next(original: Path, healed: Path, text: Path) -> str:
    program = shlex.quote(_program())
    first, last, held_out = (shlex.quote(str(path)) for path in (original, healed, text))
    train = shlex.quote(str(text.with_name("train.txt")))
    out = shlex.quote(str(original.with_name("half")))
    return "\n".join(
        [
            f"Losses in nats per token, on {text}. The checkpoints: {original}, "
            f"{original.with_name('compressed')}, {healed}",
            "",
            "What to type next:",
            f"  {program} inspect {last}",
            f"  {program} evaluate {last} --reference {first} --text {held_out}",
            f"  {program} compress {first} {out} --kv-ratio 0.5 --text {train}",
        ]
    )


def _program() -> str:
    """Return how to call the command line from here: by name if that finds this installation, else by path."""
    installed = Path(sys.executable).parent / "mea-compress"
    on_path = shutil.which("mea-compress")
    if not installed.is_file() or (on_path and Path(on_path).resolve() == installed.resolve()):
        return "mea-compress"
    relative = os.path.relpath(installed)
    return relative if not relative.startswith("..") else str(installed)


class _Stages:
    """Numbered headings on stderr, and how long each stage took."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.seconds: list[float] = []
        self.began: float | None = None

    def begin(self, title: str) -> None:
        self.end()
        self.began = time.monotonic()
        if self.progress:
            print(f"[{len(self.seconds) + 1}/{_STAGES}] {title}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.began is not None:
            self.seconds.append(round(time.monotonic() - self.began, 1))
        self.began = None
