"""Layer-local refinement: a composed layer is fitted, by gradient, to what the original layers send.

The layer gets what the already compressed layers really send it; the target is the residual stream of the original, so
that earlier errors are corrected as well. The error is looked at behind the following layers of a short window, each
token relative to the size of its stream (the next norm divides by it). The result is the best on held-out calibration
sequences and never worse than the start.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mea_compress.compositions.groups import hold_groups
from mea_compress.heads import ComposedLayer
from mea_compress.streaming import Activations, LayerRunner, batches

# Composed sides whose components are kept heads, bit-identical to the original's, and stay so.
_FROZEN = {"prune": ("proj",), "share": ("proj", "composition")}


@dataclass(frozen=True)
class Settings:
    """How a layer is refined.

    Attributes:
        steps: Optimiser steps of the full run.
        batch: Sequences in a step.
        held_out: Sequences at the front that are only looked at to choose.
        rates: Step sizes to try, as a share of a tensor's root mean square.
        trial_steps: Length of each trial.
        checks: How often the full run looks at the held-out sequences.
        window: Layers behind which the error is looked at, the refined one included.
    """

    steps: int
    batch: int = 16
    held_out: int = 64
    rates: tuple[float, ...] = (0.03, 0.1)
    trial_steps: int = 20
    checks: int = 5
    window: int = 2


@dataclass(frozen=True)
class Refined:
    """A refined layer and how far it came.

    Attributes:
        layer: The layer, never worse than it began.
        before: Relative squared error on held-out sequences before.
        after: The same after.
        rate: The step size chosen, 0 where no step helped.
    """

    layer: ComposedLayer
    before: float
    after: float
    rate: float


def refine(
    composed: ComposedLayer,
    runner: LayerRunner,
    following: list[LayerRunner],
    inputs: Activations,
    targets: Activations,
    settings: Settings,
    seed: int,
    tick: Callable[[int], object] = lambda _: None,
) -> Refined:
    """Fits a composed layer.

    Args:
        composed: The layer's closed form.
        runner: The layer with that closed form in place; its weights are trained.
        following: The original's next layers, as many as the window goes on.
        inputs: What the compressed model sends into the layer, (N, T, D).
        targets: What the original model has behind the window, (N, T, D).
        settings: Steps, batches, step sizes.
        seed: Seed of the order of sequences.
        tick: Called with the number of optimiser steps done since its last call.

    Returns:
        The refined layer, float64 from float32.
    """
    objective = _Objective(runner, following, inputs, targets, settings)
    parameters = _trainable(runner.attention)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before = objective.held_out()
    best, rate = _Best(before, start), 0.0
    trials: dict[float, float] = {}
    for candidate in settings.rates:
        _set(parameters, start)
        order = _order(len(range(*inputs_range(inputs, settings))), settings, seed)
        trials[candidate] = _descend(
            parameters, start, objective, order, settings.trial_steps, candidate, 1, best, tick
        )
    chosen = min(settings.rates, key=lambda r: trials[r])
    # A step size that blew up may still be right when halved.
    if math.isfinite(trials[chosen]):
        _set(parameters, start)
        order = _order(len(range(*inputs_range(inputs, settings))), settings, seed)
        _descend(parameters, start, objective, order, settings.steps, chosen, settings.checks, best, tick)
        rate = chosen if best.value < before else 0.0
    _set(parameters, best.weights)
    return Refined(_read_back(composed, runner.attention), before, best.value, rate)


def inputs_range(inputs: Activations, settings: Settings) -> tuple[int, int]:
    """First and past-last sequence that may be trained on."""
    return min(settings.held_out, inputs.shape[0] // 4), inputs.shape[0]


@dataclass
class _Best:
    value: float
    weights: dict[str, torch.Tensor]

    def offer(self, value: float, parameters: dict[str, torch.nn.Parameter]) -> None:
        if value < self.value:
            self.value = value
            self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}


class _Objective:
    """Squared error of the residual stream, each token relative to its size, over that of doing nothing."""

    def __init__(
        self,
        runner: LayerRunner,
        following: list[LayerRunner],
        inputs: Activations,
        targets: Activations,
        settings: Settings,
    ) -> None:
        self.runners = [runner, *following]
        self.inputs, self.targets, self.settings = inputs, targets, settings
        self.first, self.count = inputs_range(inputs, settings)
        reach = slice(self.first, min(self.first + settings.batch, self.count))
        size = self._size(self.targets[reach])
        self.scale = float(((self.targets[reach] - self.inputs[reach]).square() / size).mean().clamp(min=1e-30))

    @staticmethod
    def _size(target: torch.Tensor) -> torch.Tensor:
        return target.square().mean(-1, keepdim=True).clamp(min=1e-12)

    def __call__(self, index: slice | torch.Tensor) -> torch.Tensor:
        hidden = self.inputs[index]
        for runner in self.runners:
            hidden = runner.forward(hidden)
        target = self.targets[index].to(hidden.device)
        return ((hidden - target).square() / self._size(target)).mean() / self.scale

    @torch.no_grad()
    def held_out(self) -> float:
        total = 0.0
        for part in batches(self.first, self.settings.batch):
            total += float(self(part)) * (part.stop - part.start)
        return total / self.first


def _trainable(attention: Any) -> dict[str, torch.nn.Parameter]:
    """The attention's weights but for norms and what a composition promises to keep."""
    frozen: list[str] = []
    for side, kind in (("k", attention.key_kind), ("v", attention.value_kind)):
        parts = _FROZEN.get(kind, ())
        frozen += [f"{side}_proj."] if "proj" in parts else []
        frozen += [f"{'key' if side == 'k' else 'value'}_composition."] if "composition" in parts else []
    chosen = {}
    for name, parameter in attention.named_parameters():
        if "norm" not in name and not name.startswith(tuple(frozen)):
            chosen[name] = parameter.requires_grad_(True)
    hold_groups(attention)
    return chosen


def _order(count: int, settings: Settings, seed: int) -> Iterator[torch.Tensor]:
    """Batches of indices, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < settings.batch:
            queue = torch.cat((queue, torch.randperm(count, generator=generator)))
        yield queue[: settings.batch]
        queue = queue[settings.batch :]


def _descend(
    parameters: dict[str, torch.nn.Parameter],
    start: dict[str, torch.Tensor],
    objective: _Objective,
    order: Iterator[torch.Tensor],
    steps: int,
    rate: float,
    checks: int,
    best: _Best,
    tick: Callable[[int], object],
) -> float:
    """Adam with a short warm-up and a cosine to zero; returns the last held-out error and offers every one."""
    groups = []
    for name, parameter in parameters.items():
        size = float(start[name].square().mean().sqrt())
        groups.append({"params": [parameter], "lr": 0.0, "size": size or float(_fallback_size(start))})
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    warm = max(1, min(10, steps // 5))
    value = math.inf
    looks = {round(steps * (i + 1) / checks) - 1 for i in range(checks)}
    for step in range(steps):
        factor = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * factor * group["size"]
        loss = objective(next(order) + objective.first)
        if not torch.isfinite(loss):
            return math.inf
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        tick(1)
        if step in looks:
            value = objective.held_out()
            if not math.isfinite(value):
                return math.inf
            best.offer(value, parameters)
    return value


def _fallback_size(start: dict[str, torch.Tensor]) -> torch.Tensor:
    """A step size for tensors that begin at zero (biases): that of the smallest other tensor."""
    sizes = [tensor.square().mean().sqrt() for tensor in start.values() if tensor.any()]
    return torch.stack(sizes).min() if sizes else torch.tensor(0.02)


def _set(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _read_back(composed: ComposedLayer, attention: Any) -> ComposedLayer:
    def rows(projection: Any) -> torch.Tensor:
        weight = projection.weight.detach().double().cpu()
        bias = projection.bias
        column = weight.new_zeros(len(weight)) if bias is None else bias.detach().double().cpu()
        return torch.cat((weight, column[:, None]), 1)

    def side(old: Any, projection: Any, composition: Any) -> Any:
        weight = None if composition is None else composition.weight.detach().double().cpu()
        return replace(old, projection=rows(projection), weight=weight)

    head_dim = attention.head_dim
    output = attention.o_proj.weight.detach().double().cpu()
    return replace(
        composed,
        key=side(composed.key, attention.k_proj, attention.key_composition),
        value=side(composed.value, attention.v_proj, attention.value_composition),
        query=rows(attention.q_proj).unflatten(0, (-1, head_dim)),
        output=output.unflatten(1, (-1, head_dim)).transpose(0, 1).contiguous(),
    )
