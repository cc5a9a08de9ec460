"""Brief distillation, end to end, of a compressed model that is in memory with its original (METHOD §6 and §11).

The loss is KL(original ‖ compressed) of the next-token distributions, in nats per token, averaged over tokens. The step
size is found and not fixed: short runs from the start are tried, each tensor moving relative to its own size, and what
is kept is the best on held-out text, the start included.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mea_compress.checkpoint.files import refusal, write_text
from mea_compress.errors import RequestError
from mea_compress.loading import seeded, vocabulary_size
from mea_compress.measure.metrics import (
    NOTHING,
    Comparison,
    compare,
    compare_models,
    max_batch_size,
    predict,
    predictions,
)
from mea_compress.planning.sizes import HEALING_MICRO_TOKENS
from mea_compress.processes import from_first_process, is_first_process, process_count
from mea_compress.training.head_loss import HeadLoss, whole_row
from mea_compress.training.sharding import (
    gathered,
    is_sharded,
    load_parts,
    part_of,
    reshard,
    run_base,
    save_parts,
    whole,
)
from mea_compress.training.top_logits import top_divergence, top_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RATES = (0.0005, 0.0015, 0.005, 0.015, 0.05)
"""Step sizes to choose from, as a share of a tensor's root mean square."""
_TRIALS = 3  # as many as there mostly are
_LEAST_GAIN = 0.5
"""Share of the best trial's gain that one of a larger step size must have to be chosen."""
_LONGER, _RAISED = 4, 3
"""A run that is four times as long as a trial takes the step size that it found, a longer one more, as the root of its
length, up to three times as much (`benchmarks/NOTES.md`)."""
_TRIALS_WORTH = 4  # with a deadline: so many times a trial's steps must be left for another trial, once one has gained
MATCH_HIDDEN = 30.0
"""What the error of the layers' outputs counts when a run begins, where nothing else is asked for
(`benchmarks/NOTES.md`)."""
_LOOKS = 5  # at the held-out text, in the full run
_LAST_LOOKS = 7  # with a deadline: as long as measuring all in the end takes, and writing and checking what was learnt
_SURE = 0.96  # share of the time that is left to count on: steps of the full run are slower by what is kept of them
_LOOK_TOKENS = 1 << 13  # with a deadline half of them: looks were a tenth of 40 minutes
_PROGRESS, _TRAINED = "progress.json", "trained.safetensors"
_PARTS, _SCHEDULER = "parts", "scheduler.pt"  # of a sharded student
_ATTENTION = ("self_attn", "self_attention", "attention", "attn")  # what families call their attention blocks
_LEAST_FREE = 1 << 20  # bytes of a disk that is not full
_AGREEMENT = 1e-3  # of logits made in slices with the model's own, relative to the largest


@dataclass(frozen=True)
class DistillationSettings:
    """How a model is distilled.

    Attributes:
        steps: Optimiser steps of the full run.
        batch_size: Sequences in a step.
        learning_rate: Peak, the same for all tensors; None tries `rates`.
        rates: Step sizes to choose from, ascending, as a share of a tensor's root mean square; see `_next_rate`. One
            alone is taken as it is. The full run goes on from the best that a trial has come to.
        products: What matrix products are computed in; trained weights are float32 all the same.
        seed: Of the order of sequences.
        temperature: By which the logits of both are divided; the loss is multiplied by its square, as usual.
        cross_entropy: Share of the text's own cross-entropy in the loss.
        gradient_checkpointing: Keep a layer's input alone for its gradients, and run it a second time: less memory.
        top_logits: Tokens of the teacher that the loss tells apart, all others being one; None for all of them.
        match_hidden: Weight of the error of every layer's output in the loss, see `_relative_error`, when the run
            begins; it falls as the step size does. None takes `MATCH_HIDDEN` where both models tell these outputs.
        match_attention: Weight of the error of what every attention block sends to the stream; measured alike.
        deadline: When all is to be over, on the clock of `time.monotonic`: there are no more steps than fit, as long
            as those of the trials took; None for whenever. Without trials there are all steps, or with `rates` none
            where it is over already.
    """

    steps: int
    batch_size: int
    learning_rate: float | None = None
    rates: tuple[float, ...] = _RATES
    products: torch.dtype = torch.float32
    seed: int = 0
    temperature: float = 1.0
    cross_entropy: float = 0.0
    gradient_checkpointing: bool = False
    top_logits: int | None = None
    match_hidden: float | None = None
    match_attention: float = 0.0
    deadline: float | None = None

    @property
    def trial_steps(self) -> int:
        """Optimiser steps of one trial: a deadline may leave few of all the steps, so they are fewer with one."""
        return max(3, min(20 if self.deadline is None else 12, self.steps // 20))

    @property
    def look_tokens(self) -> int:
        """Tokens of the held-out text in one look."""
        return _LOOK_TOKENS if self.deadline is None else _LOOK_TOKENS // 2

    @property
    def all_steps(self) -> int:
        """Optimiser steps, trials among them, of which there are more or fewer as they turn out."""
        trials = 0 if self.learning_rate is not None or len(self.rates) == 1 else min(_TRIALS, len(self.rates))
        return self.steps + trials * self.trial_steps


@dataclass(frozen=True)
class Distillation:
    """What a distillation did.

    Attributes:
        rate: Step size of the full run, as a share of a tensor's root mean square; None where one was given.
        curve: KL on held-out text in nats per token by optimiser step, from 0 on.
        steps: Optimiser steps of the full run.
        all_steps: Optimiser steps, those of trials among them.
        losses: What was trained on by optimiser step, of the full run.
    """

    rate: float | None
    curve: tuple[tuple[int, float], ...]
    steps: int
    all_steps: int
    losses: tuple[float, ...] = ()


def distil(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    training: torch.Tensor,
    held_out: torch.Tensor,
    settings: DistillationSettings,
    tick: Callable[[float], object] = lambda loss: None,
    state: Path | None = None,
    counted: tuple[torch.Tensor, torch.Tensor] | None = None,
    known: Callable[[int, int], object] = lambda steps, done: None,
) -> Distillation:
    """Distil a model in place; what requires gradients is trained and holds the best weights afterwards.

    Several processes that a launcher has started share the sequences of every step among them.

    Args:
        model: The compressed model, float32; sharded or not, see `mea_compress.training.sharding`.
        teacher: Its original, in any dtype; sharded where the model is.
        training: Sequences to train on, ids (N, T).
        held_out: Sequences to choose by, ids (M, T).
        settings: Steps, step size, precision.
        tick: Called with the loss after every optimiser step.
        state: Directory that keeps how far it has come, and from which it goes on if it was stopped; None keeps
            nothing. It must be of the same model, teacher, sequences and settings.
        counted: Which tokens of the sequences to train on and of those held out count when they are predicted, bool
            (N, T) and (M, T), at least one of each sequence; None for all.
        known: Called when the run behind the trials begins, with all optimiser steps, those of trials among them, and
            with how many of these are done.
    """
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if settings.match_hidden is None:
        told = _tell_the_same_layers(model, teacher, training[:1, :8].to(next(model.parameters()).device))
        settings = replace(settings, match_hidden=MATCH_HIDDEN if told else 0.0)
    looked_at = held_out[: max(1, settings.look_tokens // held_out.shape[1])]
    learnt, judged = (None, None) if counted is None else (counted[0], counted[1][: len(looked_at)])
    if settings.products != torch.float32 and not is_sharded(model):  # whose dtypes are settled
        _convert_frozen(model, settings.products)

    kept = may_keep(teacher, looked_at, settings.products)

    def look() -> float:
        total = measure(model, teacher, looked_at, settings.products, judged, kept)
        return from_first_process(total.kl / total.tokens)  # what comes next follows from it, in all of them alike

    start = {name: weight.detach().clone() for name, weight in parameters.items()}
    progress = _Progress.resumed(state, start) or _Progress(state, look(), start)

    def train(groups: list[dict[str, Any]], steps: int, run: _Run | None = None) -> None:
        _set(parameters, start if progress.begun is None else progress.begun)
        _run(model, teacher, training, groups, settings, steps, tick, learnt, run)

    pace = progress.pace
    if settings.learning_rate is None:
        tried = None
        while progress.begun is None and (tried := _next_rate(settings.rates, progress)) is not None:
            left = _steps_left(settings, pace)
            hurries = settings.deadline is not None and left < _TRIALS_WORTH * settings.trial_steps
            if not left or (hurries and progress.gained):
                break
            _set(parameters, start)
            with pace.of_steps(settings.trial_steps):
                train(_group(parameters, tried), settings.trial_steps)
            progress.taken += settings.trial_steps
            with pace.of_a_look():
                value = look()
            progress.found[str(tried)] = value if math.isfinite(value) else math.inf
            progress.offer(value, parameters)
            progress.save()
        _set(parameters, start)
        if progress.steps is None:
            progress.steps = _steps_left(settings, pace) if tried is None or progress.gained else 0
        rate = _rate_of_run(_choose_rate(settings.rates, progress), progress.steps, settings)
        groups = _group(parameters, rate)
    else:
        rate, progress.steps = None, settings.steps
        groups = [{"params": list(parameters.values()), "lr": settings.learning_rate}]
    if progress.begun is None:  # what the trials have gained is not thrown away
        progress.begun = start = progress.best_weights
        progress.save()

    def on_step(step: int) -> None:
        value = look()
        progress.curve = [point for point in progress.curve if point[0] < step] + [(step, value)]
        progress.offer(value, parameters)
        progress.save()

    all_steps = progress.taken + progress.steps
    if progress.curve[-1][0] < progress.steps:  # otherwise it was through, and something else was stopped behind it

        def begins(step: int) -> None:
            known(all_steps, progress.taken + step)

        train(groups, progress.steps, _Run(state, progress.losses, on_step, begins))
    else:
        known(all_steps, all_steps)
    _set(parameters, progress.best_weights)
    return Distillation(rate, tuple(progress.curve), progress.steps, all_steps, tuple(progress.losses))


class _Progress:
    """How far a distillation has come: trials, curve, and the best weights so far with the KL that they have.

    Args:
        directory: Where `save` keeps it, or None.
        value: KL at the start.
        weights: At the start, by name.
    """

    def __init__(self, directory: Path | None, value: float, weights: Mapping[str, torch.Tensor]) -> None:
        self.directory = directory
        self.best_value = value if math.isfinite(value) else math.inf
        self.best_weights = dict(weights)
        self.found: dict[str, float] = {}
        self.curve: list[tuple[int, float]] = [(0, value)]
        self.losses: list[float] = []
        self.steps: int | None = None
        self.taken = 0
        self.pace = _Pace()
        # The weights that the full run begins with, once that is known, and the file that has them.
        self.begun: Mapping[str, torch.Tensor] | None = None
        self._begun_file: str | None = None
        self._offered = True

    @property
    def gained(self) -> bool:
        """Whether a trial ended below the start."""
        return min(self.found.values(), default=math.inf) < self.curve[0][1]

    @staticmethod
    def resumed(directory: Path | None, like: Mapping[str, torch.Tensor]) -> _Progress | None:
        """Return what `save` has kept, None where it has nothing."""
        if directory is None or not (directory / _PROGRESS).is_file():
            return None
        kept = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))

        def stored(name: str) -> dict[str, torch.Tensor]:
            weights = load_file(directory / name)
            return {k: part_of(weights[k], like[k]) for k in like}

        progress = _Progress(directory, kept["curve"][0][1], stored(kept["best"]))
        progress._begun_file = kept["begun"]
        progress.begun = None if kept["begun"] is None else stored(kept["begun"])
        progress.best_value, progress.found, progress.steps = kept["best_value"], kept["found"], kept["steps"]
        progress.curve, progress.taken = [(step, value) for step, value in kept["curve"]], kept["taken"]
        progress.losses = kept["losses"]
        progress.pace = _Pace(**kept.get("pace", {}))
        progress._offered = False
        return progress

    def offer(self, value: float, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep weights that are better than the best so far."""
        if value < self.best_value:
            self.best_value, self._offered = value, True
            self.best_weights = {name: weight.detach().clone() for name, weight in parameters.items()}

    def save(self) -> None:
        """Write it down, complete or not at all."""
        if self.directory is None:
            return
        weights = gathered(self.best_weights) if self._offered else {}
        if is_first_process():
            with _keeping(self.directory):
                self._write(self.directory, weights)
        self._offered = False

    def _write(self, directory: Path, weights: dict[str, torch.Tensor]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"best-{self.taken + self.curve[-1][0]}.safetensors"
        if not self._offered:
            name = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))["best"]
        else:
            save_file(weights, directory / name)
        if self.begun is not None and self._begun_file is None:
            self._begun_file = name
        record = {
            "best": name,
            "begun": self._begun_file,
            "best_value": self.best_value,
            "found": self.found,
            "curve": self.curve,
            "losses": self.losses,
            "steps": self.steps,
            "taken": self.taken,
            "pace": asdict(self.pace),
        }
        write_text(directory / _PROGRESS, json.dumps(record))  # JSON of Python has infinity
        for old in directory.glob("best-*.safetensors"):
            if old.name not in (name, self._begun_file):
                old.unlink()


@contextmanager
def _keeping(directory: Path) -> Iterator[None]:
    """Turn what libraries say of a full disk, each in words of its own and none as OSError, into the sentence for it.

    Raises:
        DiskFullError: The block failed, and there is no room left.
    """
    try:
        yield
    except RequestError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(directory.parent).free < _LEAST_FREE
        if not full:
            raise
        raise refusal(OSError(errno.ENOSPC, ""), directory) from error


def _next_rate(rates: Sequence[float], progress: _Progress) -> float | None:
    """Return the step size to try next: from the middle up for as long as that is good enough, or down until one gains.

    Returns:
        One of `rates`, or None if enough was tried.
    """
    middle, start = len(rates) // 2, progress.curve[0][1]
    if len(rates) == 1:
        return None
    if str(rates[middle]) not in progress.found:
        return rates[middle]
    climbs = progress.found[str(rates[middle])] < start
    for rate in rates[middle + 1 :] if climbs else reversed(rates[:middle]):
        value = progress.found.get(str(rate))
        if value is None:
            return rate
        if _choose_rate(rates, progress) != rate if climbs else value < start:
            return None
    return None


def _choose_rate(rates: Sequence[float], progress: _Progress) -> float:
    """Return the largest step size whose trial gained at least half of the best one's, or the one that ended lowest.

    A short run favours small steps: on babyllama105 at half of its cache 0.003 is ahead of 0.01 after 12 of 60 steps,
    and behind it at their end (KL 0.0317 and 0.0272).
    """
    start = progress.curve[0][1]
    found = {rate: progress.found.get(str(rate), math.inf) for rate in rates}
    best = min(rates, key=lambda rate: found[rate])
    gain = start - found[best]
    if not gain > 0:
        return best
    return max(rate for rate, value in found.items() if start - value >= _LEAST_GAIN * gain)


def _rate_of_run(rate: float, steps: int, settings: DistillationSettings) -> float:
    """Return the step size of a run of so many steps where trials have chosen one: what larger steps upset, more mend.

    Args:
        rate: What was chosen, or the only one there is, which is taken as it is.
        steps: Of the full run.
        settings: With the steps of a trial and the largest step size.
    """
    if len(settings.rates) == 1:
        return rate
    factor = math.sqrt(steps / (_LONGER * settings.trial_steps))
    return min(rate * min(max(1.0, factor), _RAISED), settings.rates[-1])


@dataclass
class _Pace:
    """How long the steps of trials, and looks at held-out text, have taken in seconds."""

    steps: int = 0
    in_steps: float = 0.0
    looks: int = 0
    in_looks: float = 0.0

    @contextmanager
    def of_steps(self, count: int) -> Iterator[None]:
        """Take the time of so many steps."""
        began = time.monotonic()
        yield
        self.steps, self.in_steps = self.steps + count, self.in_steps + time.monotonic() - began

    @contextmanager
    def of_a_look(self) -> Iterator[None]:
        """Take the time of a look."""
        began = time.monotonic()
        yield
        self.looks, self.in_looks = self.looks + 1, self.in_looks + time.monotonic() - began


def _steps_left(settings: DistillationSettings, pace: _Pace) -> int:
    """Return the steps of the full run that are left the time for, by the clock of the first process.

    Args:
        settings: With the deadline.
        pace: Of the trials.
    """
    if settings.deadline is None:
        return settings.steps
    left = settings.deadline - time.monotonic()
    if not pace.steps:
        return from_first_process(settings.steps if left > 0 else 0)
    left = _SURE * left - (_LOOKS + _LAST_LOOKS) * pace.in_looks / max(1, pace.looks)
    return from_first_process(max(0, min(settings.steps, int(left * pace.steps / pace.in_steps))))


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    products: torch.dtype = torch.float32,
    counted: torch.Tensor | None = None,
    kept: dict[int, torch.Tensor] | None = None,
) -> Comparison:
    """Sum the comparisons of sequences, with products in a given dtype.

    Args:
        model: The compressed model.
        teacher: Its original.
        ids: (N, T), int64, without padding.
        products: Dtype of matrix products.
        counted: Which tokens count when they are predicted, bool (N, T); None for all.
        kept: What the teacher's head reads of every batch, (B, T, D), by its number: for measurements of the same
            sequences, each but the first of which takes it from there; see `may_keep`. None keeps nothing.
    """
    total, size = NOTHING, max_batch_size(ids.shape[1], vocabulary_size(teacher))
    masks = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
    for index, (rows, mask) in enumerate(zip(ids.split(size), masks.split(size), strict=True)):
        with _autocast(model, products):
            if kept is None:
                total += compare_models(model, teacher, rows, mask, padded=False)
                continue
            if index not in kept:
                kept[index] = _hidden(teacher, rows.to(next(teacher.parameters()).device))[0]
            head = _head(teacher)
            logits = head(kept[index].to(head.weight.dtype))
            expected = predictions(logits, rows.to(logits.device), mask.to(logits.device))
            total += compare(predict(model, rows, mask, padded=False), expected)
    reshard(model, teacher)
    return total


def may_keep(teacher: PreTrainedModel, ids: torch.Tensor, products: torch.dtype) -> dict[int, torch.Tensor] | None:
    """Return where `measure` may keep what a teacher's head reads of ids (N, T), or None if its head is not all."""
    if is_sharded(teacher):
        return None
    with _autocast(teacher, products):
        sample = ids[:1, :8].to(next(teacher.parameters()).device)
        return {} if _head_alone_makes_logits(teacher, sample) else None


def _set(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(weights[name])


def _group(parameters: Mapping[str, nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Return optimiser groups in which every tensor moves relative to its root mean square."""
    sizes = {
        name: math.sqrt(float(whole(weight.detach().square().sum())) / weight.numel())
        for name, weight in parameters.items()
    }
    least = min((size for size in sizes.values() if size > 0), default=0.02)  # for what begins at zero
    return [{"params": [weight], "lr": rate * (sizes[name] or least)} for name, weight in parameters.items()]


def _convert_frozen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert linear maps that are not trained, which autocast would convert at every call."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not any(weight.requires_grad for weight in module.parameters()):
            module.to(dtype)


def _autocast(model: PreTrainedModel, products: torch.dtype) -> torch.autocast:
    device = next(model.parameters()).device
    return torch.autocast(device.type, products, enabled=products != torch.float32)


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
class _Run:
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

    def __init__(
        self,
        steps: int,
        tick: Callable[[float], object],
        run: _Run | None,
    ) -> None:
        self.tick, self.run = tick, run
        self.looks = {round(steps * (index + 1) / _LOOKS) for index in range(_LOOKS)}
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


class _Loss(nn.Module):
    """The loss of a student as a module, so that whatever wraps a model for several processes wraps this.

    Args:
        student: The model that is trained.
        teacher: Its original; no part of the module.
        settings: Temperature, cross-entropy, products.
        sliced: Whether each model's head alone makes its logits, so that those of one sequence at a time will do.
        per_sequence: Tokens that count in a sequence, on average; None where all do.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        settings: DistillationSettings,
        sliced: bool,
        per_sequence: float | None = None,
    ) -> None:
        super().__init__()
        self.student, self.settings, self.sliced, self.per_sequence = student, settings, sliced, per_sequence
        self.share_of_matching = 1.0
        object.__setattr__(self, "teacher", teacher)

    def train(self, mode: bool = True) -> _Loss:
        """Leave dropout off, which the teacher has not: layers are told of training where they are run again alone."""
        return super().train(mode and self.settings.gradient_checkpointing)

    def forward(
        self, input_ids: torch.Tensor, counted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss per token of ids (B, T), of which those that count may be given, (B, T).

        Returns:
            All of it, and without gradients what of it is of predictions, or all of it where that is not finite.
        """
        loss_of = _sliced_loss if self.sliced else _whole_loss
        teacher: Any = self.teacher
        # By the average of all sequences, so that it does not matter how they are shared out.
        weights = None if counted is None else _weights(counted, len(counted) * (self.per_sequence or 1))
        with _autocast(teacher, self.settings.products):
            of_predictions, of_states = loss_of(
                self.student,
                teacher,
                input_ids,
                self.settings.temperature,
                self.settings.cross_entropy,
                weights,
                self.settings.top_logits,
                self.share_of_matching * (self.settings.match_hidden or 0.0),
                self.share_of_matching * self.settings.match_attention,
            )
        loss = of_predictions + of_states
        return loss, of_predictions.detach() if loss.isfinite() else loss.detach()


class _Prepared(nn.Module):
    """A loss whose student is sharded, which neither Trainer nor accelerate wraps or moves: it is wrapped already."""

    def __init__(self, loss: _Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loss(**inputs)


class _Distiller(Trainer):
    """Trainer of a `_Loss`, whose checkpoints hold what is trained alone, in parts where the student is sharded."""

    def __init__(self, reporter: _Callback, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.reporter = reporter
        self.loss: _Loss = arguments["model"]
        self.student: Any = self.loss.student
        self.model_accepts_loss_kwargs = False  # the Trainer averages over accumulated micro-batches

    def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> torch.Tensor:
        """Match less and less: what is inside guides the first steps, the last ones are for what is predicted."""
        self.loss.share_of_matching = _share_of_peak(self.state.max_steps, self.state.global_step)
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
            _set(self._trained(), load_file(Path(resume_from_checkpoint) / _TRAINED))

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


def _weights(counted: torch.Tensor, total: float) -> torch.Tensor:
    """Return the weight of the prediction at every position, (B, T), from which tokens count when they are predicted.

    Args:
        counted: (B, T), bool.
        total: What the weights of a batch add up to 1 for.
    """
    return nn.functional.pad(counted[:, 1:] / total, (0, 1))


def _weights_of(
    ids: torch.Tensor, temperature: float, cross_entropy: float, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what KL and cross-entropy at every position of ids (B, T) count in the loss, (B, T) each or None."""
    if weights is None:
        everywhere = torch.ones_like(ids, dtype=torch.float32)
        of_kl, of_text = everywhere / ids.numel(), _weights(everywhere, ids[:, 1:].numel())
    else:
        of_kl = of_text = weights
    return (1 - cross_entropy) * temperature**2 * of_kl, cross_entropy * of_text if cross_entropy else None


def _whole_loss(
    model: Any,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    weights: torch.Tensor | None = None,
    top_logits: int | None = None,
    match_hidden: float = 0.0,
    match_attention: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss per token of ids (B, T): KL(teacher ‖ model), and a share of cross-entropy.

    Args:
        model: The student.
        teacher: Its original.
        ids: (B, T), int64.
        temperature: Divides the logits of both.
        cross_entropy: Share of the text's own.
        weights: Of the prediction at every position, (B, T); None for all of them alike.
        top_logits: Tokens that are told apart; see `top_divergence`.
        match_hidden: Weight of the error of every layer's output; see `_relative_error`.
        match_attention: Weight of the error of every attention block's output.

    Returns:
        The loss of predictions, and the weighted errors that are to be added to it.
    """
    more = {"use_cache": False, "output_hidden_states": match_hidden > 0}
    with torch.no_grad(), _attention_outputs(teacher, match_attention > 0) as targets:
        expected = teacher(input_ids=ids, **more)
        log_p = (expected.logits.float() / temperature).log_softmax(-1)
    with _attention_outputs(model, match_attention > 0) as outputs:
        found = model(input_ids=ids, **more)
    logits = found.logits.float()
    log_q = (logits / temperature).log_softmax(-1)
    of_kl, of_text = _weights_of(ids, temperature, cross_entropy, weights)
    if top_logits is None:
        divergence = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        divergence = top_divergence(log_p, log_q, top_logits)
    loss = (of_kl * divergence).sum()
    if of_text is not None:
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = loss + (of_text[:, :-1].flatten() * losses).sum()
    matched = torch.zeros_like(loss)
    if match_hidden:  # behind the embeddings, which come first
        matched = matched + match_hidden * _relative_error(found.hidden_states[1:], expected.hidden_states[1:])
    if match_attention:
        matched = matched + match_attention * _relative_error(outputs, targets)
    return loss, matched


def _sliced_loss(
    model: Any,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    weights: torch.Tensor | None = None,
    top_logits: int | None = None,
    match_hidden: float = 0.0,
    match_attention: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `_whole_loss` returns, with the logits of one sequence at a time in memory."""
    with torch.no_grad(), _attention_outputs(teacher, match_attention > 0) as targets:
        target, expected = _hidden(teacher, ids, match_hidden > 0)
    with _attention_outputs(model, match_attention > 0) as outputs:
        hidden, found = _hidden(model, ids, match_hidden > 0)
    own, other = _head(model), _head(teacher)
    of_kl, of_text = _weights_of(ids, temperature, cross_entropy, weights)
    loss_of = whole_row if top_logits is None else partial(top_row, count=top_logits)
    loss = HeadLoss.apply(hidden, target, own, other, ids, weights, of_kl, of_text, temperature, loss_of)
    matched = torch.zeros_like(loss)
    if match_hidden:
        matched = matched + match_hidden * _relative_error(found[1:], expected[1:])
    if match_attention:
        matched = matched + match_attention * _relative_error(outputs, targets)
    return loss, matched


def _hidden(
    model: PreTrainedModel, ids: torch.Tensor, every_layer: bool = False
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return what the language-model head reads, (B, T, D), and the outputs of every layer if they are asked for."""
    output = run_base(model, input_ids=ids, use_cache=False, output_hidden_states=every_layer)
    return output.last_hidden_state, output.hidden_states or ()


@contextmanager
def _attention_outputs(model: PreTrainedModel, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs (B, T, D) of a model's attention blocks while it runs in the block, if they are wanted.

    Raises:
        RequestError: It has no attention blocks that can be told.
    """
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    blocks = [each for name, each in model.named_modules() if name.rpartition(".")[2] in _ATTENTION] if wanted else []
    if wanted and not blocks:
        raise RequestError(f"the attention of a {type(model).__name__} cannot be told: leave `match_attention` out")
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:  # a layer that is run again for its gradients adds nothing
            handle.remove()


def _relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return |found - expected|² / |expected|² of (B, T, D) states, averaged over tokens and layers.

    Each token is measured by its own size, of which the first of a sequence has often a thousand times as much as the
    others.
    """
    # Made again for its gradients, so that of a layer no more is kept than its two outputs.
    errors = [checkpoint(_error_of, *states, use_reentrant=False) for states in zip(found, expected, strict=True)]
    return torch.stack(errors).mean()


def _error_of(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    found, expected = found.float(), expected.float()
    return ((found - expected).square().sum(-1) / expected.square().sum(-1).clamp_min(1e-12)).mean()


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


@torch.no_grad()
def _head_alone_makes_logits(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Return whether logits are the head applied to the base model's output, and the head is not trained.

    Families may scale or cap logits, which a loss made from hidden states would miss.
    """
    head = model.get_output_embeddings()
    if model.base_model is model:  # nothing that it would name makes hidden states alone
        return False
    if type(head) is not nn.Linear or any(weight.requires_grad for weight in head.parameters()):
        return False
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = head(_hidden(model, ids)[0].to(head.weight.dtype)).float()
    reshard(model)
    return bool((found - expected).abs().max() <= _AGREEMENT * expected.abs().max())


@torch.no_grad()
def _tell_the_same_layers(model: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Return whether the outputs of layers, which not all families tell, are as many in both models and as large.

    They are asked for in both ways that a loss may ask for them: with logits, and without.
    """
    shapes = []
    for one in (model, teacher):
        asked = {"input_ids": ids, "use_cache": False, "output_hidden_states": True}
        outputs = [one(**asked)] if one.base_model is one else [one(**asked), run_base(one, **asked)]
        shapes += [[state.shape for state in (getattr(each, "hidden_states", None) or ())[1:]] for each in outputs]
        reshard(one)
    return shapes[0] != [] and all(found == shapes[0] for found in shapes)


def _share_of_peak(steps: int, step: int) -> float:
    """Return the step size of a step as a share of its peak: a short warm-up, and a cosine to a twentieth."""
    warm_up = max(1, min(20, steps // 5))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * cosine)


def _run(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    groups: list[dict[str, Any]],
    settings: DistillationSettings,
    steps: int,
    tick: Callable[[float], object],
    counted: torch.Tensor | None = None,
    run: _Run | None = None,
) -> None:
    """Train a model in place on ids (N, T): AdamW without decay, see `_share_of_peak`; a trial without `run`."""
    state = None if run is None else run.state
    device = next(model.parameters()).device
    sample = ids[:1, :8].to(device)
    with _autocast(model, settings.products):
        sliced = all(_head_alone_makes_logits(one, sample) for one in (model, teacher))
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
            seed=settings.seed,
            data_seed=settings.seed,
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
            model=_Loss(model, teacher, settings, sliced, None if counted is None else float(counted.sum()) / len(ids)),
            args=arguments,
            train_dataset=_Rows(ids, counted),
            callbacks=[reporter],
            optimizers=(optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_share_of_peak, steps))),
        )
        distiller.remove_callback(PrinterCallback)
        with nullcontext() if state is None else _keeping(state):
            distiller.train(resume_from_checkpoint=None if state is None else _last_checkpoint(state))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()


def _micro_batch(
    settings: DistillationSettings, device: torch.device, length: int, sliced: bool, vocabulary: int
) -> tuple[int, int]:
    """Return the sequences that a process runs at once, and how often it does so in a step."""
    count = process_count()
    if settings.batch_size % count:
        raise RequestError(
            f"`batch_size` {settings.batch_size} cannot be shared out to {count} processes: give a multiple of {count}"
        )
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
