"""Train a small native MEA model and its tokenizer, with transformers' Trainer."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import patch_environment
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from mea_compress.architectures.families import FAMILIES
from mea_compress.checkpoint.files import write_json
from mea_compress.emit.code import write_code
from mea_compress.emit.directory import auto_map
from mea_compress.errors import RequestError

SETTINGS = "training.json"
"""File in a trained checkpoint that says what it was trained with."""
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
# Pretraining of arXiv 2601.19611, section 4: decay, cosine to a tenth. Its peak rate of 1e-3 is for models a thousand
# times as large; this one's loss after 600 steps falls from 4.42 to 4.08 with five times that.
_LEARNING_RATE, _LAST_SHARE, _WEIGHT_DECAY, _BETAS = 5e-3, 0.1, 0.1, (0.9, 0.95)


@dataclass(frozen=True)
class Size:
    """How large the demonstration is: model, text, training, and what is measured.

    Attributes:
        steps: Training steps of the original; `healing_share` of them heal.
        healing_share: Healing steps as a share of the training steps.
        calibration_sequences: Sequences of the training text that calibrate the fit.
        text_bytes: UTF-8 bytes of text taken from the library, at most.
        held_out_share: Share of these bytes that is held out, in whole documents.
        vocabulary: Tokens of the byte-level BPE tokenizer, the special ones included.
        layers: Depth.
        heads: Key/value heads of a layer, and query heads.
        head_dim: Channels of a head; the hidden size is ``heads * head_dim``.
        intermediate: Width of the MLP.
        context: Tokens of a sequence.
        batch_size: Sequences in a step.
        measured_sequences: Held-out sequences that are measured, at most.
    """

    steps: int = 800
    healing_share: float = 0.125
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


def train_original(
    out: Path,
    documents: list[str],
    size: Size,
    device: torch.device,
    seed: int,
    settings: dict[str, Any],
    progress: bool = True,
) -> None:
    """Train tokenizer and model, and put the checkpoint in its place when it is complete.

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
        with _seeded(seed, device):
            model = build_model(tokenizer, size)
            model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its signature
            train(model, ids, size, seed, progress)
        _save(model, work)
        tokenizer.save_pretrained(work)
        write_json(work / SETTINGS, settings)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that training uses, and restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _save(model: PreTrainedModel, directory: Path) -> None:
    """Save weights, configuration, and the code that loads them where this package is not installed."""
    model.config._attn_implementation = None
    model.config.auto_map = auto_map(FAMILIES[0])
    model.cpu().save_pretrained(directory)
    write_code(directory)


def train_tokenizer(documents: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts BOS in front; it encodes every text, without an unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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


def training_sequences(documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """Return all documents, an EOS after each, as one stream cut into rows with BOS in front: int64 (N, length)."""
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    count = len(stream) // (length - 1)
    if not count:
        raise RequestError(f"Python's library has {len(stream)} tokens of text, fewer than one sequence of {length}")
    rows = torch.tensor(stream[: count * (length - 1)], dtype=torch.int64).view(count, length - 1)
    return torch.cat((torch.full((count, 1), tokenizer.bos_token_id), rows), dim=1)


def build_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> PreTrainedModel:
    """Return a native MEA model with head norm and as many components as heads, from the current random state."""
    from mea_compress.modeling.configuration_mea import MeaLlamaConfig
    from mea_compress.modeling.modeling_mea import MeaLlamaForCausalLM

    config = MeaLlamaConfig(**model_settings(tokenizer, size), num_attention_heads=size.heads, mea={"head_norm": True})
    return MeaLlamaForCausalLM(config)


def model_settings(tokenizer: PreTrainedTokenizerFast, size: Size) -> dict[str, Any]:
    """Return what the configuration of a model of this size says, whatever its family; not its query heads."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size.heads * size.head_dim,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.context,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def train(model: PreTrainedModel, ids: torch.Tensor, size: Size, seed: int, progress: bool) -> None:
    """Train for next tokens: AdamW, warm-up, cosine. The batches are the same on every device.

    Weights are float32, and products bfloat16 where that is faster (`_bfloat16_is_faster`).

    Args:
        model: A causal language model, trained where it is.
        ids: Rows of tokens, int64 (N, context).
        size: Steps and batch size.
        seed: Of the order of rows.
        progress: Show a bar with loss and time left on stderr.
    """
    use_cache, model.config.use_cache = model.config.use_cache, False
    if model.device.type == "cpu":
        model.config._attn_implementation = "eager"  # faster than sdpa to differentiate at this length
    # Accelerate places batches by this variable, and on the first GPU without it.
    with tempfile.TemporaryDirectory() as scratch, patch_environment(ACCELERATE_TORCH_DEVICE=str(model.device)):
        make_trainer(model, ids, size, seed, Path(scratch), progress).train()
    model.config.use_cache = use_cache
    model.eval()


def make_trainer(
    model: PreTrainedModel, ids: torch.Tensor, size: Size, seed: int, scratch: Path, progress: bool
) -> Trainer:
    """Return the Trainer of `train`; `scratch` is a directory for files that it may write."""
    arguments = _OneDeviceArguments(
        output_dir=str(scratch),
        use_cpu=model.device.type == "cpu",
        bf16=_bfloat16_is_faster(model.device),
        seed=seed,
        data_seed=seed,
        max_steps=size.steps,
        per_device_train_batch_size=size.batch_size,
        learning_rate=_LEARNING_RATE,
        weight_decay=_WEIGHT_DECAY,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=1.0,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": _LAST_SHARE},
        warmup_steps=max(1, min(1000, size.steps // 10)),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # `_LossBar` shows the loss too
        dataloader_pin_memory=model.device.type == "cuda",
    )
    arguments.place = model.device
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[_LossBar(size.steps, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _bfloat16_is_faster(device: torch.device) -> bool:
    """Return whether autocast to bfloat16 saves time: on CPUs that multiply it; GPUs wait for launches at this size."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release of torch
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class _OneDeviceArguments(TrainingArguments):
    """Training arguments for one chosen device, where the Trainer would take all GPUs of the machine."""

    place: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """The chosen device."""
        default = super().device
        return self.place or default

    @property
    def n_gpu(self) -> int:
        """One GPU at most."""
        return min(1, super().n_gpu)


class _LossBar(TrainerCallback):
    """A progress bar on stderr with the smoothed loss."""

    def __init__(self, steps: int, progress: bool) -> None:
        self.bar = tqdm(total=steps, desc="training", unit="step", disable=not progress, file=sys.stderr)
        self.loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Take a step's loss into the running mean."""
        if logs and "loss" in logs:
            self.loss = logs["loss"] if self.loss is None else 0.95 * self.loss + 0.05 * logs["loss"]
            self.bar.set_postfix(loss=f"{self.loss:.3f}", refresh=False)
            self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar as it is."""
        self.bar.close()
