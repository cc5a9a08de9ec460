"""Optimiser steps of a distillation, by transformers' Trainer: several processes, checkpoints, going on from them."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mea_compress.loading import seeded, vocabulary_size
from mea_compress.measure.metrics import max_batch_size
from mea_compress.planning.sizes import HEALING_MICRO_TOKENS
from mea_compress.processes import process_count
from mea_compress.training.losses import DistillationLoss, autocast, head_alone_makes_logits
from mea_compress.training.settings import LOOKS, DistillationSettings
from mea_compress.training.sharding import is_sharded, load_parts, save_parts
from mea_compress.training.trials import keeping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEEDS = 1 << 32  # NumPy, which the Trainer seeds too, has no more
_TRAINED = "trained.safetensors"
_PARTS, _SCHEDULER = "parts", "scheduler.pt"  # of a sharded student


class _Rows(Dataset[dict[str, torch.Tensor]]):
    """Training sequences, ids (N, T), one an item, and which of their tokens count (N, T)."""

    def __init__(self, ids: torch.Tensor, counted: torch.Tensor | None) -> None:
        self.ids, self.counted = ids, counted

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        counted = {} if self.counted is None else {"counted": self.counted[index]}
        return {"input_ids": self.ids[index]} | counted


@dataclass(frozen=True)
class Run:
    """What is kept and told of the run behind the trials, and of no trial.

    Attributes:
        state: Directory of checkpoints, one whenever `look` is called, from the last of which training goes on; None
            keeps none.
        losses: The loss of every step.
        look: Called every so often with the steps that are done.
        begins: Called with the steps that were done before.
    """

    state: Path | None
    losses: list[float]
    look: Callable[[int], object]
    begins: Callable[[int], object]


class _Callback(TrainerCallback):
    """Reports every step, looks at the held-out text every so often, and stops at a loss that is not finite."""

    def __init__(self, steps: int, tick: Callable[[float], object], run: Run | None) -> None:
        self.tick, self.run = tick, run
        self.looks = {round(steps * (index + 1) / LOOKS) for index in range(LOOKS)}
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell how far it has come already."""
        if self.run is not None:
            self.run.begins(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        loss = sum(self.losses) / len(self.losses)
        self.losses.clear()
        if self.run is not None:  # steps behind the checkpoint it went on from are done again
            self.run.losses[state.global_step - 1 :] = [loss]
        self.tick(loss)
        if not math.isfinite(loss):
            control.should_training_stop = True
        elif self.run is not None and state.global_step in self.looks:
            self.run.look(state.global_step)
            control.should_save = self.run.state is not None
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the checkpoints before the last, which is complete."""
        if state.is_world_process_zero:
            for directory in Path(args.output_dir).glob("checkpoint-*"):
                if directory.name != f"checkpoint-{state.global_step}":
                    shutil.rmtree(directory, ignore_errors=True)


class _Prepared(nn.Module):
    """A loss whose student is sharded, which neither Trainer nor accelerate wraps or moves: it is wrapped already."""

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loss(**inputs)


class _Distiller(Trainer):
    """Trainer of a `DistillationLoss`; its checkpoints hold what is trained alone, in parts where the student is."""

    def __init__(self, reporter: _Callback, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.reporter = reporter
        self.loss: DistillationLoss = arguments["model"]
        self.student: Any = self.loss.student
        self.model_accepts_loss_kwargs = False  # the Trainer averages over accumulated micro-batches

    def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> torch.Tensor:
        """Match less and less: what is inside guides the first steps, the last ones are for what is predicted."""
        self.loss.share_of_matching = _fallen(self.state.max_steps, self.state.global_step)
        return super().training_step(model, inputs, *more, **named)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, told = model(**inputs)
        # Of all processes, for all of them are to stop where one meets a loss that is not finite.
        self.reporter.losses.append(float(self.accelerator.reduce(told, "mean")))
        return (loss, {}) if return_outputs else loss

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if training and is_sharded(self.student):
            return _Prepared(model)
        return super()._wrap_model(model, training, dataloader)

    def _trained(self) -> dict[str, nn.Parameter]:
        model: Any = self.model
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        if is_sharded(self.student):  # written with the optimiser, by all processes
            return
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trained().items()}
        save_file(weights, directory / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.student):
            set_weights(self._trained(), load_file(Path(resume_from_checkpoint) / _TRAINED))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.student):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_parts(Path(output_dir) / _PARTS, self.student, self._own_optimiser())
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.student):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_parts(Path(checkpoint) / _PARTS, self.student, self._own_optimiser())
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))

    def _own_optimiser(self) -> torch.optim.Optimizer:
        """Return the optimiser that accelerate has wrapped."""
        optimiser: Any = self.optimizer
        return getattr(optimiser, "optimizer", optimiser)


def share_of_peak(steps: int, step: int) -> float:
    """Return the step size of a step as a share of its peak: a short warm-up, and a cosine to a twentieth."""
    return min(1.0, (step + 1) / max(1, min(20, steps // 5))) * _fallen(steps, step)


def _fallen(steps: int, step: int) -> float:
    """Return what falls from one to a twentieth over a run."""
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def trained_sequences(steps: int, count: int, batch: int) -> int:
    """Return how many sequences so many steps train on: the last step of each pass over all of them has what is left.

    Example:
        >>> trained_sequences(5, 10, 4)  # 4, 4 and 2, 4 and 4
        18
    """
    passes, rest = divmod(steps, math.ceil(count / batch))
    return passes * count + min(count, rest * batch)


def set_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    """Copy values into parameters of the same names."""
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(weights[name])


def train_student(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    groups: list[dict[str, Any]],
    settings: DistillationSettings,
    steps: int,
    tick: Callable[[float], object],
    counted: torch.Tensor | None = None,
    run: Run | None = None,
) -> None:
    """Train a model in place on ids (N, T): AdamW without decay, see `share_of_peak`; a trial without `run`."""
    state = None if run is None else run.state
    device = next(model.parameters()).device
    sample = ids[:1, :8].to(device)
    with autocast(model, settings.products):
        sliced = all(head_alone_makes_logits(one, sample) for one in (model, teacher))
    reporter = _Callback(steps, tick, run)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    micro, accumulated = _micro_batch(settings, device, ids.shape[1], sliced, vocabulary_size(teacher))
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed, device):
        arguments = TrainingArguments(
            output_dir=str(state or scratch),
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            max_grad_norm=1.0,
            seed=settings.seed % _SEEDS,
            data_seed=settings.seed % _SEEDS,
            use_cpu=device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # several devices take several processes
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        distiller = _Distiller(
            reporter,
            model=DistillationLoss(
                model, teacher, settings, sliced, None if counted is None else float(counted.sum()) / len(ids)
            ),
            args=arguments,
            train_dataset=_Rows(ids, counted),
            callbacks=[reporter],
            optimizers=(optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, partial(share_of_peak, steps))),
        )
        distiller.remove_callback(PrinterCallback)
        with nullcontext() if state is None else keeping(state):
            distiller.train(resume_from_checkpoint=None if state is None else _last_checkpoint(state))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()


def _micro_batch(
    settings: DistillationSettings, device: torch.device, length: int, sliced: bool, vocabulary: int
) -> tuple[int, int]:
    """Return the sequences that a process runs at once, and how often it does so in a step."""
    count = process_count()
    own = micro = settings.batch_size // count
    if device.type == "cpu":  # what is kept for gradients should stay small, and products are no faster with more
        micro = min(micro, max(1, HEALING_MICRO_TOKENS // length))
    if not sliced:
        micro = min(micro, max_batch_size(length, vocabulary))
    while own % micro:
        micro -= 1
    return micro, own // micro


def _last_checkpoint(state: Path) -> str | None:
    """Return the last of the Trainer's checkpoints that is complete: its state is written behind all else."""
    complete = []
    for directory in state.glob("checkpoint-*"):
        with suppress(OSError, ValueError):
            complete.append((json.loads((directory / "trainer_state.json").read_text())["global_step"], str(directory)))
    return max(complete)[1] if complete else None


__all__ = ["Run", "set_weights", "share_of_peak", "train_student", "trained_sequences"]
