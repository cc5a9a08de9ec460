"""Brief distillation, end to end, of a compressed model that is in memory with its original (METHOD §6 and §11).

The loss is KL(original ‖ compressed) of the next-token distributions, in nats per token, averaged over tokens. The step
size is found and not fixed: short runs from the start are tried, each tensor moving relative to its own size, and what
is kept is the best on held-out text, the start included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mea_compress.loading import vocabulary_size
from mea_compress.measure.metrics import (
    NOTHING,
    Comparison,
    compare,
    compare_models,
    max_batch_size,
    predict,
    predictions,
)
from mea_compress.processes import from_first_process
from mea_compress.training.losses import autocast, base_states, head_alone_makes_logits, head_of, tell_the_same_layers
from mea_compress.training.settings import MATCH_HIDDEN, DistillationSettings
from mea_compress.training.sharding import is_sharded, reshard, whole
from mea_compress.training.trainer import Run, set_weights, train_student, trained_sequences
from mea_compress.training.trials import Progress, best_rate, next_rate, rate_of_run, steps_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIALS_WORTH = 4  # with a deadline: so many times a trial's steps must be left for another trial, once one has gained


@dataclass(frozen=True)
class Distillation:
    """What a distillation did.

    Attributes:
        rate: Step size of the full run, as a share of a tensor's root mean square; None where one was given.
        curve: KL on held-out text in nats per token by optimiser step, from 0 on.
        steps: Optimiser steps of the full run.
        all_steps: Optimiser steps, those of trials among them.
        tokens: Tokens trained on, those of trials among them.
        losses: What was trained on by optimiser step, of the full run.
        trial_rate: Step size that is best in a trial, by those that there were or as the settings say; None without.
    """

    rate: float | None
    curve: tuple[tuple[int, float], ...]
    steps: int
    all_steps: int
    tokens: int
    losses: tuple[float, ...] = ()
    trial_rate: float | None = None


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
        with autocast(model, settings.products):
            told = tell_the_same_layers(model, teacher, training[:1, :8].to(next(model.parameters()).device))
        settings = replace(settings, match_hidden=MATCH_HIDDEN * (1 - settings.cross_entropy) if told else 0.0)
    looked_at = held_out[: max(1, settings.look_tokens // held_out.shape[1])]
    learnt, judged = (None, None) if counted is None else (counted[0], counted[1][: len(looked_at)])
    if settings.products != torch.float32 and not is_sharded(model):  # whose dtypes are settled
        _convert_frozen(model, settings.products)

    kept = may_keep(teacher, looked_at, settings.products)

    def look() -> float:
        total = measure(model, teacher, looked_at, settings.products, judged, kept)
        return from_first_process(total.kl / total.tokens)  # what comes next follows from it, in all of them alike

    start = {name: weight.detach().clone() for name, weight in parameters.items()}
    progress = Progress.resumed(state, start) or Progress(state, look(), start)

    def train(groups: list[dict[str, Any]], steps: int, run: Run | None = None) -> None:
        set_weights(parameters, start if progress.begun is None else progress.begun)
        train_student(model, teacher, training, groups, settings, steps, tick, learnt, run)

    pace, best, rate = progress.pace, None, None
    if settings.learning_rate is None:
        tried, tries = None, progress.begun is None and settings.trial_rate is None
        while tries and (tried := next_rate(settings.rates, progress)) is not None:
            left = steps_left(settings, pace)
            hurries = settings.deadline is not None and left < _TRIALS_WORTH * settings.trial_steps
            if not left or (hurries and progress.gained):
                break
            set_weights(parameters, start)
            with pace.of_steps(settings.trial_steps):
                train(_group(parameters, tried), settings.trial_steps)
            progress.taken += settings.trial_steps
            with pace.of_a_look():
                value = look()
            progress.found[str(tried)] = value if math.isfinite(value) else math.inf
            progress.offer(value, parameters)
            progress.save()
        set_weights(parameters, start)
        if progress.steps is None:
            progress.steps = steps_left(settings, pace) if tried is None or progress.gained else 0
        rate = best = settings.trial_rate or best_rate(settings.rates, progress)
        if progress.gained or settings.trial_rate is not None:  # otherwise the least bad is large enough
            rate = rate_of_run(best, progress.steps, settings)
        groups = _group(parameters, rate)
    else:
        progress.steps = settings.steps
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

        train(groups, progress.steps, Run(state, progress.losses, on_step, begins))
    else:
        known(all_steps, all_steps)
    set_weights(parameters, progress.best_weights)
    runs = [*[settings.trial_steps] * (progress.taken // settings.trial_steps), progress.steps]
    tokens = sum(trained_sequences(steps, len(training), settings.batch_size) for steps in runs) * training.shape[1]
    curve, losses = tuple(progress.curve), tuple(progress.losses)
    return Distillation(rate, curve, progress.steps, all_steps, tokens, losses, best)


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
        with autocast(model, products):
            if kept is None:
                total += compare_models(model, teacher, rows, mask, padded=False)
                continue
            if index not in kept:
                kept[index] = base_states(teacher, rows.to(next(teacher.parameters()).device))[0]
            head = head_of(teacher)
            logits = head(kept[index].to(head.weight.dtype))
            expected = predictions(logits, rows.to(logits.device), mask.to(logits.device))
            total += compare(predict(model, rows, mask, padded=False), expected)
    reshard(model, teacher)
    return total


def may_keep(teacher: PreTrainedModel, ids: torch.Tensor, products: torch.dtype) -> dict[int, torch.Tensor] | None:
    """Return where `measure` may keep what a teacher's head reads of ids (N, T), or None if its head is not all."""
    if is_sharded(teacher):
        return None
    with autocast(teacher, products):
        sample = ids[:1, :8].to(next(teacher.parameters()).device)
        return {} if head_alone_makes_logits(teacher, sample) else None


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


__all__ = ["Distillation", "distil", "may_keep", "measure"]
