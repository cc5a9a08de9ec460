"""Brief distillation, end to end, of a compressed model that is in memory with its original (METHOD §6 and §11).

The loss is KL(original ‖ compressed) of the next-token distributions, in nats per token, averaged over tokens. The step
size is found and not fixed: short runs from the start are tried, each tensor moving relative to its own size, and what
is kept is the best on held-out text, the start included.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mea_compress.loading import seeded, vocabulary_size
from mea_compress.measure.metrics import NOTHING, Comparison, compare_models, max_batch_size
from mea_compress.planning.sizes import HEALING_MICRO_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RATES = (0.003, 0.01, 0.03)
"""Step sizes to try, as a share of a tensor's root mean square."""
_LOOKS = 5  # at the held-out text, in the full run
_LOOK_TOKENS = 1 << 13
_AGREEMENT = 1e-3  # of logits made in slices with the model's own, relative to the largest


@dataclass(frozen=True)
class DistillationSettings:
    """How a model is distilled.

    Attributes:
        steps: Optimiser steps of the full run.
        batch_size: Sequences in a step.
        learning_rate: Peak, the same for all tensors; None tries `rates`.
        rates: Step sizes to try, as a share of a tensor's root mean square.
        products: What matrix products are computed in; trained weights are float32 all the same.
        seed: Of the order of sequences.
        deadline: When all is to be over, on the clock of `time.monotonic`: there are no more steps than fit, as long
            as those of the trials took; None for whenever. Without trials it is not heeded.
    """

    steps: int
    batch_size: int
    learning_rate: float | None = None
    rates: tuple[float, ...] = _RATES
    products: torch.dtype = torch.float32
    seed: int = 0
    deadline: float | None = None

    @property
    def trial_steps(self) -> int:
        """Optimiser steps of one trial."""
        return max(3, self.steps // 20)

    @property
    def all_steps(self) -> int:
        """Optimiser steps, trials among them."""
        return self.steps + (0 if self.learning_rate is not None else len(self.rates) * self.trial_steps)


@dataclass(frozen=True)
class Distillation:
    """What a distillation did.

    Attributes:
        rate: Step size of the full run, as a share of a tensor's root mean square; None where one was given.
        curve: KL on held-out text in nats per token by optimiser step, from 0 on.
        steps: Optimiser steps of the full run.
        all_steps: Optimiser steps, those of trials among them.
    """

    rate: float | None
    curve: tuple[tuple[int, float], ...]
    steps: int
    all_steps: int


def distil(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    training: torch.Tensor,
    held_out: torch.Tensor,
    settings: DistillationSettings,
    tick: Callable[[float], object] = lambda loss: None,
) -> Distillation:
    """Distil a model in place; what requires gradients is trained and holds the best weights afterwards.

    Args:
        model: The compressed model, float32.
        teacher: Its original, in any dtype.
        training: Sequences to train on, ids (N, T).
        held_out: Sequences to choose by, ids (M, T).
        settings: Steps, step size, precision.
        tick: Called with the loss after every optimiser step.
    """
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    looked_at = held_out[: max(1, _LOOK_TOKENS // held_out.shape[1])]
    if settings.products != torch.float32:
        _convert_frozen(model, settings.products)

    def look() -> float:
        total = measure(model, teacher, looked_at, settings.products)
        return total.kl / total.tokens

    best = _Best(parameters, look())
    start = best.weights
    curve, rate, steps, taken = [(0, best.value)], None, settings.steps, 0

    def count(loss: float) -> None:
        nonlocal taken
        taken += 1
        tick(loss)

    if settings.learning_rate is None:
        began, found = time.monotonic(), {}
        for tried in settings.rates:
            if not _steps_left(settings, began, taken):
                break
            _set(parameters, start)
            _run(model, teacher, training, _group(parameters, tried), settings, settings.trial_steps, count)
            found[tried] = look()
            best.offer(found[tried], parameters)
        finite = {tried: value for tried, value in found.items() if math.isfinite(value)}
        rate = min(finite or found or settings.rates, key=lambda tried: found.get(tried, math.inf))
        steps = _steps_left(settings, began, taken) if len(found) == len(settings.rates) else 0
        _set(parameters, start)
        groups = _group(parameters, rate)
    else:
        groups = [{"params": list(parameters.values()), "lr": settings.learning_rate}]

    def on_step(step: int) -> None:
        value = look()
        curve.append((step, value))
        best.offer(value, parameters)

    if steps:
        _run(model, teacher, training, groups, settings, steps, count, on_step)
    _set(parameters, best.weights)
    return Distillation(rate, tuple(curve), steps, taken)


def _steps_left(settings: DistillationSettings, began: float, taken: int) -> int:
    """Return the steps of the full run that are left the time for.

    Args:
        settings: With the deadline.
        began: When the first trial began.
        taken: Steps since then.
    """
    if settings.deadline is None:
        return settings.steps
    now = time.monotonic()
    left = settings.deadline - now
    if not taken:
        return settings.steps if left > 0 else 0
    return max(0, min(settings.steps, int(left * taken / (now - began))))


@torch.no_grad()
def measure(
    model: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, products: torch.dtype = torch.float32
) -> Comparison:
    """Sum the comparisons of ids (N, T), which have no padding, with products in a given dtype."""
    total = NOTHING
    for rows in ids.split(max_batch_size(ids.shape[1], vocabulary_size(teacher))):
        with _autocast(model, products):
            total += compare_models(model, teacher, rows, torch.ones_like(rows, dtype=torch.bool))
    return total


class _Best:
    """The best weights so far and the KL that they have."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], value: float) -> None:
        self.value = math.inf
        self.offer(value, parameters)

    def offer(self, value: float, parameters: Mapping[str, nn.Parameter]) -> None:
        if value < self.value or not hasattr(self, "weights"):
            self.value = value if math.isfinite(value) else math.inf
            self.weights = {name: weight.detach().clone() for name, weight in parameters.items()}


def _set(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(weights[name])


def _group(parameters: Mapping[str, nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Return optimiser groups in which every tensor moves relative to its root mean square."""
    sizes = {name: float(weight.detach().square().mean().sqrt()) for name, weight in parameters.items()}
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
    """Training sequences, ids (N, T), one an item."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


class _Callback(TrainerCallback):
    """Reports every step, looks at the held-out text every so often, and stops at a loss that is not finite."""

    def __init__(self, steps: int, tick: Callable[[float], object], look: Callable[[int], object] | None) -> None:
        self.tick, self.look = tick, look
        self.looks = {round(steps * (index + 1) / _LOOKS) for index in range(_LOOKS)}
        self.last_loss = math.nan

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.tick(self.last_loss)
        if not math.isfinite(self.last_loss):
            control.should_training_stop = True
        elif self.look is not None and state.global_step in self.looks:
            self.look(state.global_step)
        return control


class _Distiller(Trainer):
    """Trainer whose loss is KL(teacher ‖ student) per token."""

    def __init__(
        self, teacher: PreTrainedModel, products: torch.dtype, reporter: _Callback, sliced: bool, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.teacher, self.products, self.reporter, self.sliced = teacher, products, reporter, sliced
        self.model_accepts_loss_kwargs = False  # the Trainer averages over accumulated micro-batches

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        with _autocast(self.teacher, self.products):
            # Wrapped for several processes, a model is called as a whole, or its gradients would not be shared.
            loss_of = _sliced_loss if self.sliced and model is self.model else _whole_loss
            loss = loss_of(model, self.teacher, ids)
        self.reporter.last_loss = loss.item()
        return (loss, {}) if return_outputs else loss


def _whole_loss(model: Any, teacher: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ model) per token of ids (B, T)."""
    with torch.no_grad():
        log_r = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    logits = model(input_ids=ids, use_cache=False).logits
    divergence = nn.functional.kl_div(logits.float().log_softmax(-1), log_r, log_target=True, reduction="sum")
    return divergence / ids.numel()


def _sliced_loss(model: Any, teacher: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return what `_whole_loss` returns, with the logits of one sequence at a time in memory."""
    with torch.no_grad():
        target = _hidden(teacher, ids)
    return _SlicedDivergence.apply(_hidden(model, ids), target, _head(model), _head(teacher))


def _hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return what the language-model head reads, (B, T, D)."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


class _SlicedDivergence(torch.autograd.Function):
    """KL per token of two heads' logits; the gradient of the hidden states is made with them and kept."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, head: nn.Linear, expected: nn.Linear) -> Any:
        gradient = torch.empty_like(hidden)
        tokens = hidden.shape[0] * hidden.shape[1]
        total = hidden.new_zeros((), dtype=torch.float32)
        for row, (own, other) in enumerate(zip(hidden, target, strict=True)):  # (T, D) each
            logits = nn.functional.linear(own.to(head.weight.dtype), head.weight, head.bias)
            expected_logits = nn.functional.linear(other.to(expected.weight.dtype), expected.weight, expected.bias)
            wide = torch.promote_types(logits.dtype, torch.float32)
            q, p = logits.softmax(-1, dtype=wide), expected_logits.softmax(-1, dtype=wide)
            difference = expected_logits.to(wide, copy=True).sub_(logits)
            # KL = sum of p (a - b) - log-sum of a + log-sum of b.
            total += (torch.linalg.vecdot(p, difference) - _log_sum(expected_logits, p) + _log_sum(logits, q)).sum()
            gradient[row] = (q.sub_(p).to(head.weight.dtype) @ head.weight).to(gradient.dtype)  # of logits: q - p
        gradient /= tokens
        ctx.save_for_backward(gradient)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


def _log_sum(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return log Σ exp of logits (T, V) whose softmax is known: (T,)."""
    largest = probabilities.amax(-1)
    return logits.amax(-1).to(largest.dtype) - largest.log()


@torch.no_grad()
def _head_alone_makes_logits(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Return whether logits are the head applied to the base model's output, and the head is not trained.

    Families may scale or cap logits, which a loss made from hidden states would miss.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(weight.requires_grad for weight in head.parameters()):
        return False
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = head(_hidden(model, ids).to(head.weight.dtype)).float()
    return bool((found - expected).abs().max() <= _AGREEMENT * expected.abs().max())


def _share_of_peak(steps: int, step: int) -> float:
    """Return the step size of a step as a share of its peak: a short warm-up, and a cosine to a twentieth."""
    warm_up = max(1, min(8, steps // 5))
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
    look: Callable[[int], object] | None = None,
) -> None:
    """Train a model in place on ids (N, T): AdamW without decay, see `_share_of_peak`."""
    device = next(model.parameters()).device
    sample = ids[:1, :8].to(device)
    with _autocast(model, settings.products):
        sliced = all(_head_alone_makes_logits(one, sample) for one in (model, teacher))
    micro = settings.batch_size
    if device.type == "cpu":  # what is kept for gradients should stay small, and products are no faster with more
        micro = min(micro, max(1, HEALING_MICRO_TOKENS // ids.shape[1]))
    if not sliced:
        micro = min(micro, max_batch_size(ids.shape[1], vocabulary_size(teacher)))
    while settings.batch_size % micro:
        micro -= 1
    reporter = _Callback(steps, tick, look)
    with tempfile.TemporaryDirectory() as scratch, seeded(settings.seed, device):
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=settings.batch_size // micro,
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
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # several devices take several processes
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        distiller = _Distiller(
            teacher,
            settings.products,
            reporter,
            sliced,
            model=model,
            args=arguments,
            train_dataset=_Rows(ids),
            callbacks=[reporter],
            optimizers=(optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_share_of_peak, steps))),
        )
        distiller.remove_callback(PrinterCallback)
        distiller.train()
    model.eval()
