"""Healing: the compressed checkpoint learns from its original again, by distillation.

The loss is KL(original ‖ compressed) of the next-token distributions, in nats per token, averaged over tokens. Only the
attention blocks are trained by default: the components, their compositions, q_proj and o_proj are what compression
changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mea_compress.checkpoint import (
    CheckpointReader,
    Entry,
    NewTensor,
    TensorInfo,
    as_array,
    torch_dtype,
    write_shard,
)
from mea_compress.checkpoint.files import copy_tree, refusals, replacing_directory, write_text
from mea_compress.checkpoint.layout import lay_out
from mea_compress.decoding import check_decoding
from mea_compress.emit.code import carried_code, write_code
from mea_compress.emit.directory import versions
from mea_compress.emit.verification import TOLERANCE as DECODING_TOLERANCE
from mea_compress.errors import RequestError
from mea_compress.fit.refinement import hold_groups
from mea_compress.text import (
    choose_sequence_length,
    load_model,
    load_tokenizer,
    read_documents,
    resolve_device,
    sample_sequences,
    token_sequences,
)

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
_SAMPLED_AT_MOST = 1024
_HELD_OUT_AT_MOST = 64
_LOGITS_AT_ONCE = 2**26
# What is decoded with a cache and without before the healed checkpoint appears.
_PROMPT_TOKENS, _DECODED_TOKENS = 16, 8


@dataclass(frozen=True)
class Comparison:
    """Sums over the predicted tokens of some sequences: losses in nats (float64)."""

    tokens: int
    cross_entropy: float
    kl: float
    reference_cross_entropy: float
    agreements: int

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.tokens + other.tokens,
            self.cross_entropy + other.cross_entropy,
            self.kl + other.kl,
            self.reference_cross_entropy + other.reference_cross_entropy,
            self.agreements + other.agreements,
        )


NOTHING = Comparison(0, 0.0, 0.0, 0.0, 0)


def rows_at_once(length: int, vocabulary: int) -> int:
    """Sequences whose logits are about 256 MB in float32, at least one."""
    return max(1, _LOGITS_AT_ONCE // (length * vocabulary))


@torch.no_grad()
def compare_logits(
    logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor, mask: torch.Tensor
) -> Comparison:
    """Cross-entropy, KL(reference ‖ model) and top-1 agreement from logits, some positions at a time.

    In float64 where the device has it.

    Args:
        logits: (B, T, V), any floating dtype.
        reference: (B, T, V) or None.
        ids: (B, T) int64; the prediction at t is judged by ids[t + 1].
        mask: (B, T) bool, False where ids are padding.

    Returns:
        Sums over the predictions whose target is not padding; without a reference its parts are 0.
    """
    keep = mask[:, 1:].flatten()
    rows = keep.nonzero().squeeze(1)
    targets = ids[:, 1:].flatten()[rows]
    batch, length, vocabulary = logits.shape
    rows = rows // (length - 1) * length + rows % (length - 1)
    flat = logits.reshape(batch * length, vocabulary)
    flat_reference = None if reference is None else reference.reshape(batch * length, vocabulary).to(flat.device)
    step = max(1, 2**23 // vocabulary)
    total = NOTHING
    exact = torch.float32 if flat.device.type == "mps" else torch.float64
    for start in range(0, len(rows), step):
        part, target = rows[start : start + step], targets[start : start + step, None]
        log_p = flat[part].to(exact).log_softmax(-1)
        loss, kl, reference_loss, agreements = -log_p.gather(1, target).sum().item(), 0.0, 0.0, 0
        if flat_reference is not None:
            log_r = flat_reference[part].to(exact).log_softmax(-1)
            reference_loss = -log_r.gather(1, target).sum().item()
            # 0 · (−∞ − x) is 0: a token the reference rules out adds nothing.
            kl = torch.where(log_r == -torch.inf, 0.0, log_r.exp() * (log_r - log_p)).sum().item()
            agreements = int((log_r.argmax(-1) == log_p.argmax(-1)).sum())
        total += Comparison(len(part), loss, kl, reference_loss, agreements)
    return total


@torch.no_grad()
def compare_models(model: Any, reference: Any | None, ids: torch.Tensor, mask: torch.Tensor) -> Comparison:
    """`compare_logits` of one batch: a forward pass of each model, padding masked, nothing cached.

    Args:
        model: causal language model.
        reference: causal language model of the same vocabulary, or None.
        ids: (B, T) int64.
        mask: (B, T) bool.
    """
    logits: list[Any] = []
    for each in (model, reference):
        if each is None:
            logits.append(None)
            continue
        device = next(each.parameters()).device
        attention = None if bool(mask.all()) else mask.long().to(device)
        logits.append(each(input_ids=ids.to(device), attention_mask=attention, use_cache=False).logits)
    device = logits[0].device
    return compare_logits(logits[0], logits[1], ids.to(device), mask.to(device))


def check_same_vocabulary(model: Any, reference: Any, names: tuple[Path | str, Path | str]) -> None:
    """Both models must predict the same tokens.

    Raises:
        RequestError: their vocabularies differ in size.
    """
    sizes = [each.config.get_text_config().vocab_size for each in (model, reference)]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"{names[0]} has a vocabulary of {sizes[0]} and {names[1]} one of {sizes[1]}: "
            "give the original it was made from."
        )


@dataclass(frozen=True)
class HealingResult:
    """What healing did; losses in nats per token on sequences held out from training."""

    out: Path
    steps: int
    tokens: int
    learning_rate: float
    train: str
    text: str
    seed: int
    trained_parameters: int
    held_out_tokens: int
    kl_before: float
    kl_after: float
    cross_entropy_before: float
    cross_entropy_after: float
    kept: Literal["healed", "unhealed"]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in ``healing.json``."""
        return asdict(self) | {"out": str(self.out)}


class _Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


class _Distiller(Trainer):
    """Trainer whose loss is KL(teacher ‖ student) per token."""

    def __init__(self, teacher: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher
        self.model_accepts_loss_kwargs = False  # the mean over accumulated micro-batches is the Trainer's part
        self.last_loss = math.nan

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        output = model(input_ids=ids, use_cache=False)
        loss = torch.nn.functional.kl_div(
            output.logits.float().log_softmax(-1), wanted, log_target=True, reduction="sum"
        ) / (ids.shape[0] * ids.shape[1])
        self.last_loss = loss.item()
        return (loss, output) if return_outputs else loss


class _Bar(TrainerCallback):
    """Progress on stderr, with the loss and the time left."""

    def __init__(self, steps: int, progress: bool) -> None:
        self.bar = tqdm(total=steps, desc="healing", unit="step", disable=not progress, file=sys.stderr)
        self.distiller: _Distiller | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bar.update(1)
        if self.distiller is not None:
            self.bar.set_postfix(kl=f"{self.distiller.last_loss:.4f}", refresh=False)

    def close(self) -> None:
        self.bar.close()


def _trainable(model: Any, train: str) -> dict[str, torch.nn.Parameter]:
    chosen = {
        name: parameter for name, parameter in model.named_parameters() if train == "all" or _ATTENTION.search(name)
    }
    if not chosen:
        raise RequestError("The student has no weights that are recognised as attention: use train: all.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    hold_groups(model)
    return chosen


def _stored_dtypes(student: Path) -> dict[str, torch.dtype]:
    """Return the dtype of every stored tensor that torch can compute with, by name."""
    stored = {}
    for info in CheckpointReader(student).tensors.values():
        with suppress(KeyError):
            stored[info.name] = torch_dtype(info.dtype)
    return stored


def _write_weights(student: CheckpointReader, directory: Path, changed: dict[str, torch.Tensor]) -> None:
    """Write the student's weight files again with some tensors replaced: same names, shards, dtypes and metadata.

    Args:
        student: The checkpoint; its index says the same of the new files and is not written again.
        directory: Where to.
        changed: New values by name, on any device, rounded to the dtype in which they are stored.

    Raises:
        RequestError: The disk is full or refuses, or a source cannot be read.
    """

    def entry(info: TensorInfo) -> Entry:
        tensor = changed.get(info.name)
        if tensor is None:
            return info
        return NewTensor(info.name, info.dtype, info.shape, lambda: as_array(tensor.to("cpu", torch_dtype(info.dtype))))

    for file in student.files:
        entries = [entry(info) for info in student.tensors.values() if info.file == file]
        write_shard(directory, lay_out(file.name, entries, student.metadata[file.name]))


def _check_places(student: Path, teacher: Path, out: Path) -> None:
    if student == teacher:
        raise RequestError(f"{student} cannot be its own teacher: give the original with --teacher.")
    if out != student and (out.exists() or out.is_symlink()):
        raise RequestError(f"{out} exists already: remove it, or choose another place.")
    if (
        teacher == out
        or teacher in out.parents
        or out in teacher.parents
        or (out != student and student in out.parents)
    ):
        raise RequestError(f"{out} lies in a checkpoint that is read: choose another place.")


def _sequences(
    text: Path | None, teacher: Any, tokenizer: Any, length: int, wanted: int, seed: int, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences to train on and sequences held out (every part at least one)."""
    if text is not None:
        ids = token_sequences(read_documents(text), tokenizer, length)
        if len(ids) < 2:
            raise RequestError(
                f"{text} fills one sequence of {length} tokens, and healing holds one out: "
                "give more text, or a smaller --sequence-length."
            )
    else:
        count = min(wanted, _SAMPLED_AT_MOST)
        count += max(2, min(_HELD_OUT_AT_MOST, count // 8))
        ids = sample_sequences(teacher, tokenizer.bos_token_id, count, length, seed, progress=progress)
    held_out = max(1, min(_HELD_OUT_AT_MOST, len(ids) // 9))
    return ids[:-held_out], ids[-held_out:]


def _measure(model: Any, teacher: Any, ids: torch.Tensor) -> Comparison:
    total = NOTHING
    for rows in ids.split(rows_at_once(ids.shape[1], teacher.config.get_text_config().vocab_size)):
        total += compare_models(model, teacher, rows, torch.ones_like(rows, dtype=torch.bool))
    return total


def default_learning_rate(hidden_size: int) -> float:
    """Peak learning rate that suits a width: 2e-3 at 128 and below, falling as 1 / width (1.2e-4 at 2048)."""
    return min(2e-3, 0.256 / hidden_size)


def heal(
    student: Path | str,
    teacher: Path | str,
    text: Path | str | None = None,
    steps: int = 200,
    out: Path | str | None = None,
    learning_rate: float | None = None,
    batch_size: int = 16,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    train: Literal["attention", "all"] = "attention",
) -> HealingResult:
    """Distils a compressed checkpoint from its original, and keeps the better of before and after.

    AdamW without weight decay on float32 masters, KL(teacher ‖ student) per token, a short warm-up and a cosine to
    zero. A tenth of the sequences (64 at most) is held out; the healed weights, rounded to the dtype they are stored
    in, are kept only where they lower the KL there.

    Args:
        student: directory of the compressed checkpoint.
        teacher: directory of the original; never written to.
        text: ``.txt`` or ``.jsonl``; None samples the text from the teacher.
        steps: optimiser steps.
        out: directory of the healed checkpoint, which must not exist; None puts it in the student's place.
            Either way it appears complete or not at all.
        learning_rate: peak; None suits it to the width (`default_learning_rate`).
        batch_size: sequences in a step.
        sequence_length: tokens of a sequence; None takes the model's context, at most 1024.
        seed: of sampling and of the order of sequences.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        progress: show bars on stderr.
        train: ``attention`` trains the attention blocks only, ``all`` every weight.

    Returns:
        What was done, as in the ``healing.json`` beside the weights.

    Raises:
        RequestError: a path is wrong or in the way, vocabularies differ, the text is too short, or a number
            makes no sense.
    """
    began = time.monotonic()
    student, teacher = Path(student).resolve(), Path(teacher).resolve()
    out = student if out is None else Path(os.path.abspath(out))
    if steps < 1 or batch_size < 1:
        raise RequestError(f"--steps {steps} with --batch-size {batch_size} trains nothing: give 1 or more of each.")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise RequestError(f"--learning-rate {learning_rate} is not a positive number.")
    if train not in ("attention", "all"):
        raise RequestError(f"train: {train} is unknown: use attention or all.")
    _check_places(student, teacher, out)
    target = resolve_device(device)

    teacher_model = load_model(teacher, None, target)
    model = load_model(student, None, target)
    if model.dtype != torch.float64:
        model = model.float()
    check_same_vocabulary(model, teacher_model, (student, teacher))
    length = choose_sequence_length(teacher_model, sequence_length)
    peak = learning_rate or default_learning_rate(model.config.get_text_config().hidden_size)
    parameters = _trainable(model, train)
    stored = _stored_dtypes(student)
    changed_names = [name for name in parameters if name in stored]
    if len(changed_names) != len(parameters):
        missing = next(name for name in parameters if name not in stored)
        raise RequestError(
            f"{student} stores {missing} under another name, so it cannot be trained: use train: attention."
        )
    source = None if text is None else Path(text)
    training, held_out = _sequences(
        source, teacher_model, load_tokenizer(student), length, steps * batch_size, seed, progress
    )

    before = _measure(model, teacher_model, held_out)
    _train(model, teacher_model, training, steps, peak, batch_size, seed, progress)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(parameter.to(stored[name]))
    after = _measure(model, teacher_model, held_out)
    better = after.kl < before.kl
    prompt = held_out[:2, : min(_PROMPT_TOKENS, length - 1)].to(model.device)
    check_decoding(model, prompt, min(_DECODED_TOKENS, length - prompt.shape[1]), DECODING_TOLERANCE)

    result = HealingResult(
        out=out,
        steps=steps,
        tokens=steps * batch_size * length,
        learning_rate=peak,
        train=train,
        text="sampled from the teacher" if source is None else source.name,
        seed=seed,
        trained_parameters=sum(parameter.numel() for parameter in parameters.values()),
        held_out_tokens=before.tokens,
        kl_before=before.kl / before.tokens,
        kl_after=(after if better else before).kl / before.tokens,
        cross_entropy_before=before.cross_entropy / before.tokens,
        cross_entropy_after=(after if better else before).cross_entropy / before.tokens,
        kept="healed" if better else "unhealed",
        seconds=round(time.monotonic() - began, 1),
    )
    if not better:
        print(
            f"Healing did not help (KL {before.kl / before.tokens:.4g} → {after.kl / after.tokens:.4g} on held-out "
            "text): the weights stay as they were; try a lower --learning-rate, or more --steps.",
            file=sys.stderr,
        )
    weights = model.state_dict()
    # Under train: all a tied weight may be stored under both of its names.
    changed = {name: weights[name] for name in (stored if train == "all" else changed_names) if name in weights}
    _publish(student, out, changed if better else {}, result)
    return result


def _train(
    model: Any, teacher: Any, ids: torch.Tensor, steps: int, peak: float, batch_size: int, seed: int, progress: bool
) -> None:
    micro = min(batch_size, rows_at_once(ids.shape[1], teacher.config.get_text_config().vocab_size))
    while batch_size % micro:
        micro -= 1
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    bar = _Bar(steps, progress)
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=cuda):
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch_size // micro,
            learning_rate=peak,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, steps // 20),
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            seed=seed,
            data_seed=seed,
            use_cpu=device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one device: several come by launching several processes
        distiller = _Distiller(teacher, model=model, args=arguments, train_dataset=_Rows(ids), callbacks=[bar])
        bar.distiller = distiller
        distiller.remove_callback(PrinterCallback)
        try:
            distiller.train()
        finally:
            bar.close()
    model.eval()


def _publish(student: Path, out: Path, changed: dict[str, torch.Tensor], result: HealingResult) -> None:
    """Write the student's directory with new weights and a ``healing.json``, complete or not at all.

    Raises:
        RequestError: The disk is full or refuses; what was at `out` is as it was.
    """
    reader = CheckpointReader(student)
    with refusals(out), replacing_directory(out, student, "healing") as work:
        copy_tree(student, work, {file.name for file in reader.files})
        _write_weights(reader, work, changed)
        if carried_code(work).version is not None:  # by an older release, perhaps: what was run is this one's
            write_code(work)
        record = {name: value for name, value in result.to_json().items() if name != "out"}
        # A loss may be infinite here, which `write_json` refuses.
        write_text(work / "healing.json", json.dumps(record | {"versions": versions()}, indent=2) + "\n")
