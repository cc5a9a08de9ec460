"""The demonstration: train a small native MEA model on text every machine has, compress it, heal it, compare the three.

The text is the running Python's own library, so nothing is downloaded. What a directory holds afterwards::

    text/train.txt, text/held-out.txt    documents of the library, split by document
    original/                            the trained model with its tokenizer; reused while its settings stay the same
    compressed/                          half of its KV cache, nothing trained since
    healed/                              the same after distillation from the original
    demo.json                            settings and figures
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mea_compress.checkpoint.files import write_json
from mea_compress.errors import RequestError
from mea_compress.recipe import load_recipe
from mea_compress.report.tables import format_bytes, table

# What is done to the cache: everything else is the default of `compress`.
COMPRESSION: dict[str, Any] = {"kv_ratio": 0.5}
# The paper's own start, from the weights alone, to compare with.
PAPER: dict[str, Any] = {**COMPRESSION, "key_composition": "head", "value_composition": "head", "fit": "weights"}
# Counted up when the same settings train another model.
VERSION = 1

# Pretraining of arXiv 2601.19611, section 4: peak rate, decay, cosine to a tenth.
_LEARNING_RATE, _LAST_SHARE, _WEIGHT_DECAY, _BETAS = 1e-3, 0.1, 0.1, (0.9, 0.95)
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
# Not prose, not the library's own code, or not installed everywhere.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings", "lib2to3", "pydoc_data", "__pycache__"}
_STAGES = 5
_MARK = "demo.json"


@dataclass(frozen=True)
class Size:
    """How large the demonstration is.

    Attributes:
        steps: Training steps of the original; `healing_share` of them heal.
        healing_share: Healing steps as a share of the training steps.
        refining_steps: Steps of each layer's refinement while compressing.
        calibration_sequences: Sequences of the training text that the fit looks at.
        text_bytes: UTF-8 bytes of text taken from the library, at most.
        held_out_share: Share of these bytes that is held out, in whole documents.
        vocabulary: Tokens of the byte-level BPE tokenizer, the special ones included.
        layers: Depth.
        heads: Composed key/value heads of a layer, and query heads.
        head_dim: Channels of a head; the hidden size is ``heads * head_dim``.
        intermediate: Width of the MLP.
        context: Tokens of a sequence.
        batch_size: Sequences in a step.
        measured_sequences: Held-out sequences that are measured, at most.
    """

    steps: int = 600
    healing_share: float = 0.05
    refining_steps: int = 60
    calibration_sequences: int = 128
    text_bytes: int = 6_000_000
    held_out_share: float = 0.04
    vocabulary: int = 1024
    layers: int = 4
    heads: int = 8
    head_dim: int = 16
    intermediate: int = 512
    context: int = 256
    batch_size: int = 8
    measured_sequences: int = 160

    @property
    def healing_steps(self) -> int:
        """Optimiser steps of healing, at least one."""
        return max(1, round(self.healing_share * self.steps))


def run_demo(
    directory: Path,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    size: Size | None = None,
    progress: bool = True,
) -> str:
    """Runs all stages in a directory and compares the original, the compressed and the healed checkpoint.

    Args:
        directory: New, empty, or of an earlier demonstration, whose compressed checkpoints are replaced.
        steps: Training steps of the original; None takes the size's own.
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
    from mea_compress.healing import heal
    from mea_compress.loading import resolve_device
    from mea_compress.measure.evaluation import evaluate

    size = size or Size()
    if steps is not None:
        size = Size(**{**asdict(size), "steps": steps})
    target = resolve_device(device)
    stages = _Stages(progress)
    write_json(directory / _MARK, {"seed": seed, "size": asdict(size)})

    stages.begin("text from Python's own library")
    train_text, held_out_text = directory / "text" / "train.txt", directory / "text" / "held-out.txt"
    train, held_out = split_documents(library_documents(size.text_bytes), size.held_out_share)
    for path, documents in ((train_text, train), (held_out_text, held_out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_text(path, "\n\n".join(documents) + "\n")

    original = directory / "original"
    settings = {
        "version": VERSION,
        "seed": seed,
        "device": target.type,
        "size": {key: value for key, value in asdict(size).items() if key not in _NOT_TRAINED},
        "text": hashlib.sha256("\0".join(train).encode()).hexdigest(),
    }
    if _trained_settings(original) == settings:
        stages.begin(f"{original} is there already and is used again")
    else:
        stages.begin(f"training a native MEA model: {size.steps} steps of {size.batch_size * size.context} tokens")
        train_original(original, train, size, target, seed, settings, progress)

    paper, compressed, healed = (directory / name for name in ("paper-start", "compressed", "healed"))
    for path in (paper, compressed, healed):
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
    stages.begin("compressing it to half of its KV cache, the paper's way and with alignment and refinement")
    paper_recipe = load_recipe(None, PAPER | {"seed": seed, "device": device})
    start = compress(original, paper, recipe=paper_recipe, progress=progress)
    fitted = {
        "text": train_text,
        "sequences": size.calibration_sequences,
        "refine": size.refining_steps,
        "seed": seed,
        "device": device,
    }
    result = compress(original, compressed, recipe=load_recipe(None, COMPRESSION | fitted), progress=progress)
    stages.begin(f"healing: {size.healing_steps} steps of distillation from the original")
    heal(
        compressed,
        teacher=original,
        text=train_text,
        steps=size.healing_steps,
        out=healed,
        batch_size=size.batch_size,
        sequence_length=size.context,
        seed=seed,
        device=device,
        progress=progress,
    )
    stages.begin("measuring on held-out text")
    parameters = {"original": result.plan.costs.parameters_before, "paper-start": start.plan.costs.parameters_after}
    parameters |= dict.fromkeys(("compressed", "healed"), result.plan.costs.parameters_after)
    figures = {
        path.name: evaluate(
            path,
            text=held_out_text,
            reference=original,
            sequence_length=size.context,
            limit=size.measured_sequences,
            device=device,
            progress=progress,
        ).to_json()
        | {"parameters": parameters[path.name]}
        for path in (original, paper, compressed, healed)
    }
    stages.end()
    write_json(
        directory / _MARK,
        {"seed": seed, "size": asdict(size), "seconds": stages.seconds, "figures": figures},
    )
    return f"{_table(figures)}\n\n{_what_next(original, healed, held_out_text)}"


# What of a size has no part in training the original.
_NOT_TRAINED = ("healing_share", "refining_steps", "calibration_sequences", "measured_sequences")


def check_directory(directory: Path) -> None:
    """Refuses a directory in which something else lives, before anything is written.

    Raises:
        RequestError: It is no directory, cannot be written to, or holds files and is not a demonstration's.
    """
    if directory.exists() or directory.is_symlink():
        if not directory.is_dir():
            raise RequestError(f"{directory} is not a directory: name another one with --out.")
        if any(directory.iterdir()) and not (directory / _MARK).is_file():
            raise RequestError(f"{directory} holds other files: name a new directory with --out.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{directory} cannot be made ({error.strerror}): name another place with --out.") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RequestError(f"{directory} cannot be written to: name another place with --out.")


def library_documents(limit: int) -> list[str]:
    """Documents of the running Python: its language topics, and its modules' sources with their docstrings.

    Args:
        limit: UTF-8 bytes to take, at most.

    Returns:
        Documents without duplicates, in an order that depends on their contents alone.

    Raises:
        RequestError: The library is not installed as text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {hashlib.sha256(text.encode()).hexdigest(): text for text in _texts(root) if text.strip()}
    documents: list[str] = []
    taken = 0
    for _, text in sorted(found.items()):
        taken += len(text.encode())
        if taken > limit and documents:
            break
        documents.append(text)
    if len(documents) < 2:
        raise RequestError(
            f"{root} holds no Python sources to train on: run the demo with a Python that has its library as .py files."
        )
    return documents


def _texts(root: Path) -> Iterator[str]:
    yield from _topics(root / "pydoc_data" / "topics.py")
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            try:
                yield path.read_text(encoding="utf-8").replace("\r\n", "\n")
            except (OSError, UnicodeError):
                continue


def _topics(path: Path) -> Iterable[str]:
    """The texts behind Python's ``help()``: a dictionary of strings, read without running the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, SyntaxError):
        return []
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    return [text for table in tables for text in ast.literal_eval(table).values() if isinstance(text, str)]


def split_documents(documents: list[str], held_out_share: float) -> tuple[list[str], list[str]]:
    """Training documents and held-out documents; the first ones are held out, until their share of bytes is reached."""
    sizes = [len(text.encode()) for text in documents]
    wanted, count = held_out_share * sum(sizes), 1
    while count < len(documents) - 1 and sum(sizes[:count]) < wanted:
        count += 1
    return documents[count:], documents[:count]


def train_original(
    out: Path,
    documents: list[str],
    size: Size,
    device: torch.device,
    seed: int,
    settings: dict[str, Any],
    progress: bool = True,
) -> None:
    """Trains tokenizer and model and puts the checkpoint in its place when it is complete.

    Args:
        out: Directory of the checkpoint; one that is there is replaced.
        documents: Training text.
        size: Of the model and its training.
        device: Where it is trained.
        seed: Of weights and order.
        settings: What the checkpoint is known by the next time.
        progress: Show a bar with loss and time left on stderr.
    """
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        tokenizer = train_tokenizer(documents, size.vocabulary, size.context)
        ids = training_sequences(documents, tokenizer, size.context)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            model = build_model(tokenizer, size).to(device)
            train(model, ids, size, seed, progress)
        _save(model, work)
        tokenizer.save_pretrained(work)
        write_json(work / "training.json", settings)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _save(model: Any, directory: Path) -> None:
    """Weights, configuration, and the code that loads them where this package is not installed."""
    from mea_compress.emit.code import write_code
    from mea_compress.emit.directory import auto_map

    model.config._attn_implementation = None
    model.config.auto_map = auto_map("Llama")
    model.cpu().save_pretrained(directory)
    write_code(directory)


def train_tokenizer(documents: list[str], vocabulary: int, context: int) -> Any:
    """A byte-level BPE tokenizer that puts BOS in front; every text can be encoded, so there is no unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def training_sequences(documents: list[str], tokenizer: Any, length: int) -> torch.Tensor:
    """All documents, an EOS after each, as one stream cut into rows with BOS in front: int64 (N, length)."""
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    count = len(stream) // (length - 1)
    if not count:
        raise RequestError(f"Python's library has {len(stream)} tokens of text, fewer than one sequence of {length}.")
    rows = torch.tensor(stream[: count * (length - 1)], dtype=torch.int64).view(count, length - 1)
    return torch.cat((torch.full((count, 1), tokenizer.bos_token_id), rows), dim=1)


def build_model(tokenizer: Any, size: Size) -> Any:
    """A native MEA model with head norm, weights from the current random state, as many components as heads."""
    from mea_compress.modeling.configuration_mea import MeaLlamaConfig
    from mea_compress.modeling.modeling_mea import MeaLlamaForCausalLM

    config = MeaLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.heads * size.head_dim,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mea={"head_norm": True},
    )
    return MeaLlamaForCausalLM(config)


def train(model: Any, ids: torch.Tensor, size: Size, seed: int, progress: bool) -> None:
    """Next-token training: AdamW, warm-up, cosine. The batches are the same on every device.

    Args:
        model: A causal language model, trained where it is.
        ids: Rows of tokens, int64 (N, context).
        size: Steps and batch size.
        seed: Of the order of rows.
        progress: Show a bar with loss and time left on stderr.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        model.config._attn_implementation = "eager"  # faster than sdpa to differentiate at this length
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=_LEARNING_RATE,
        betas=_BETAS,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, size.steps))
    rows = _batches(len(ids), size.batch_size, seed)
    smooth = math.nan
    model.train()
    with tqdm(total=size.steps, desc="training", unit="step", disable=not progress, file=sys.stderr) as bar:
        for _ in range(size.steps):
            batch = ids[next(rows)].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            value = loss.item()
            smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            bar.update(1)
    model.eval()


def _rate(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then cosine to a tenth."""
    warm_up = max(1, min(1000, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return _LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def _batches(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers of one batch after another, every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            left = torch.cat((left, torch.randperm(count, generator=generator)))
        yield left[:batch_size]
        left = left[batch_size:]


def _trained_settings(original: Path) -> Any:
    """What a checkpoint that is there was trained with; None where there is none that can be read."""
    try:
        return json.loads((original / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _replace_text(path: Path, text: str) -> None:
    """Writes a text so that it is whole or not there, and leaves one that is the same alone."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode())
    os.replace(partial, path)


def _table(figures: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{found['cross_entropy']:.4f}",
            f"{found['kl']:.4f}",
            f"{100 * found['top1_agreement']:.1f} %",
            format_bytes(found["kv_bytes_per_token"]),
            f"{found['parameters']:,}",
        ]
        for name, found in figures.items()
    ]
    headers = ["", "cross-entropy", "KL from original", "top-1 agreement", "cache per token", "parameters"]
    return table(rows, headers)


def _what_next(original: Path, healed: Path, text: Path) -> str:
    program = shlex.quote(_program())
    first, last, held_out = (shlex.quote(str(path)) for path in (original, healed, text))
    train = shlex.quote(str(text.with_name("train.txt")))
    out = shlex.quote(str(original.with_name("quarter")))
    return "\n".join(
        [
            f"Losses in nats per token, on {text}. The checkpoints: {original}, "
            f"{original.with_name('compressed')}, {healed}",
            "",
            "What to type next:",
            f"  {program} inspect {last}",
            f"  {program} evaluate {last} --reference {first} --text {held_out}",
            f"  {program} compress {first} {out} --kv-ratio 0.25 --text {train} --refine 30",
        ]
    )


def _program() -> str:
    """How to call the command line from here: by name where that finds this installation, else by path."""
    beside = Path(sys.executable).parent / "mea-compress"
    found = shutil.which("mea-compress")
    if not beside.is_file() or (found and Path(found).resolve() == beside.resolve()):
        return "mea-compress"
    shown = os.path.relpath(beside)
    return shown if not shown.startswith("..") else str(beside)


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
