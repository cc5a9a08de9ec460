"""Healing: end-to-end distillation of a compressed checkpoint from its original.

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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
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
from mea_compress.fit.refinement import mask_cross_group_gradients
from mea_compress.loading import (
    check_ids,
    choose_sequence_length,
    load_model,
    load_tokenizer,
    resolve_device,
    seeded,
    vocabulary_size,
)
from mea_compress.measure.metrics import NOTHING, Comparison, check_same_vocabulary, compare_models, max_batch_size
from mea_compress.report.showing import Shown
from mea_compress.report.tables import key_value_table
from mea_compress.text import read_documents, sample_sequences, token_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
_MAX_SAMPLED = 1024
_MAX_HELD_OUT = 64
# Decoded with a cache and without before the healed checkpoint appears.
_PROMPT_TOKENS, _DECODED_TOKENS = 16, 8


@dataclass(frozen=True, repr=False)
class HealingResult(Shown):
    """What healing did; losses in nats per token on sequences held out from training.

    Attributes:
        out: The healed checkpoint.
        steps: Optimiser steps.
        tokens: Tokens trained on.
        learning_rate: Peak.
        train: ``attention`` or ``all``.
        text: Name of the text file, or that text was sampled.
        seed: Of sampling and of the order of sequences.
        trained_parameters: Numbers that were free to change.
        held_out_tokens: Predictions that losses are averaged over.
        kl_before: KL(original ‖ compressed) before healing.
        kl_after: The same of the weights kept.
        cross_entropy_before: Cross-entropy before healing.
        cross_entropy_after: The same of the weights kept.
        kept: ``unhealed`` where training did not lower the KL.
        seconds: Time it all took.
    """

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
        """Return plain data, as in ``healing.json``."""
        return asdict(self) | {"out": str(self.out)}

    def report(self) -> str:
        """Return what people read."""
        return key_value_table(self.to_json())


class _Rows(Dataset[dict[str, torch.Tensor]]):
    """Training sequences, ids (N, T), one an item."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


class _Distiller(Trainer):
    """Trainer whose loss is KL(teacher ‖ student) per token."""

    def __init__(self, teacher: PreTrainedModel, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher
        self.model_accepts_loss_kwargs = False  # the Trainer averages over accumulated micro-batches
        self.last_loss = math.nan

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        with torch.no_grad():
            log_r = self.teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        output = model(input_ids=ids, use_cache=False)
        loss = torch.nn.functional.kl_div(
            output.logits.float().log_softmax(-1), log_r, log_target=True, reduction="sum"
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


def _trainable(model: PreTrainedModel, train: str) -> dict[str, torch.nn.Parameter]:
    """Return the parameters to train by name, and freeze all others."""
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if train == "all" or _ATTENTION.search(name)
    }
    if not trainable:
        raise RequestError("the student has no weights that are recognised as attention: use all for `train`")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    mask_cross_group_gradients(model)
    return trainable


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
        raise RequestError(f"{student} cannot be its own teacher: give the original as `teacher`")
    if out != student and (out.exists() or out.is_symlink()):
        raise RequestError(f"{out} exists already: remove it, or choose another place")
    if (
        teacher == out
        or teacher in out.parents
        or out in teacher.parents
        or (out != student and student in out.parents)
    ):
        raise RequestError(f"{out} lies in a checkpoint that is read: choose another place")


def _sequences(
    text: Path | None,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    trained: int,
    seed: int,
    progress: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences to train on and sequences held out, ids (N, length) of each, N at least one.

    Args:
        text: Where they come from; None samples them from the teacher.
        teacher: The original.
        tokenizer: Makes ids of the text.
        length: Tokens of a sequence.
        trained: Sequences in all steps together; as many are sampled, within bounds.
        seed: Of sampling.
        progress: Show a bar on stderr.
    """
    if text is not None:
        ids = token_sequences(read_documents(text), tokenizer, length)
        if len(ids) < 2:
            raise RequestError(
                f"{text} fills one sequence of {length} tokens, and healing holds one out: "
                "give more text, or a smaller `sequence_length`"
            )
    else:
        count = min(trained, _MAX_SAMPLED)
        count += max(2, min(_MAX_HELD_OUT, count // 8))
        ids = sample_sequences(teacher, tokenizer.bos_token_id, count, length, seed, progress=progress)
    held_out = max(1, min(_MAX_HELD_OUT, len(ids) // 9))
    return ids[:-held_out], ids[-held_out:]


def _measure(model: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor) -> Comparison:
    """Sum the comparisons of ids (N, T), which have no padding."""
    total = NOTHING
    for rows in ids.split(max_batch_size(ids.shape[1], vocabulary_size(teacher))):
        total += compare_models(model, teacher, rows, torch.ones_like(rows, dtype=torch.bool))
    return total


def default_learning_rate(hidden_size: int) -> float:
    """Return the peak learning rate for a width: 2e-3 at 128 and below, then falling as 1 / width (1.2e-4 at 2048)."""
    return min(2e-3, 0.256 / hidden_size)


def heal(
    checkpoint: Path | str,
    *,
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
    """Distil a compressed checkpoint from its original, and keep the better of before and after.

    AdamW without weight decay on float32 masters, KL(teacher ‖ student) per token, a short warm-up and a cosine to
    zero. A tenth of the sequences (64 at most) is held out; the healed weights, rounded to the dtype they are stored
    in, are kept only where they lower the KL there.

    Args:
        checkpoint: Directory of the compressed checkpoint, the student.
        teacher: Directory of the original; never written to.
        text: ``.txt`` or ``.jsonl``; None samples the text from the teacher.
        steps: Optimiser steps.
        out: Directory of the healed checkpoint, which must not exist; None puts it in the student's place.
            Either way it appears complete or not at all.
        learning_rate: Peak; None suits it to the width (`default_learning_rate`).
        batch_size: Sequences in a step.
        sequence_length: Tokens of a sequence; None takes the model's context, at most 1024.
        seed: Of sampling and of the order of sequences.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        progress: Show bars on stderr.
        train: ``attention`` trains the attention blocks only, ``all`` every weight.

    Returns:
        What was done, as in ``healing.json`` in the directory of the weights.

    Raises:
        RequestError: A path is wrong or in the way, vocabularies differ, the text is too short, or a number
            makes no sense.

    Example:
        >>> result = heal("HALF", teacher="SRC", out="HEALED", text="held-out.txt", steps=2, progress=False)
        >>> result.kl_after <= result.kl_before
        True
    """
    began = time.monotonic()
    student, teacher = Path(checkpoint).resolve(), Path(teacher).resolve()
    out = student if out is None else Path(os.path.abspath(out))
    if steps < 1 or batch_size < 1:
        raise RequestError(f"`steps` {steps} with `batch_size` {batch_size} trains nothing: give 1 or more of each")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise RequestError(f"`learning_rate` {learning_rate} is not a positive number: give one such as 1e-4")
    if train not in ("attention", "all"):
        raise RequestError(f"`train` {train} is unknown: use attention or all")
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
            f"{student} stores {missing} under another name, so it cannot be trained: use attention for `train`"
        )
    source = None if text is None else Path(text)
    training, held_out = _sequences(
        source, teacher_model, load_tokenizer(student), length, steps * batch_size, seed, progress
    )

    for ids in (training, held_out):
        check_ids(ids, vocabulary_size(model), student)
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
            f"healing did not help (KL {before.kl / before.tokens:.4g} → {after.kl / after.tokens:.4g} on held-out "
            "text), and the weights stay as they were: try a lower learning rate, or more steps",
            file=sys.stderr,
        )
    weights = model.state_dict()
    # Under train: all a tied weight may be stored under both of its names.
    changed = {name: weights[name] for name in (stored if train == "all" else changed_names) if name in weights}
    _publish(student, out, changed if better else {}, result)
    return result


def _train(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    steps: int,
    peak: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> None:
    """Train a model in place on ids (N, T); `heal` says how."""
    micro = min(batch_size, max_batch_size(ids.shape[1], vocabulary_size(teacher)))
    while batch_size % micro:
        micro -= 1
    device = next(model.parameters()).device
    bar = _Bar(steps, progress)
    with tempfile.TemporaryDirectory() as scratch, seeded(seed, device):
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
            arguments._n_gpu = 1  # several devices take several processes
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
