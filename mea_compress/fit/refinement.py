"""Layer-local refinement: a composed layer is fitted, by gradient, to what the original layer sends.

The layer gets what the already compressed layers really send it; the target is the residual stream that the original
has behind the layer, so that earlier errors are corrected as well. Each token's error counts relative to the size of
its stream, for the next norm divides by it. The result is the best on held-out calibration sequences and never worse
than the start.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mea_compress.checkpoint import as_array
from mea_compress.heads.composed import Array, FactoredHeads, split_heads
from mea_compress.heads.types import ComposedLayer
from mea_compress.layers.runner import Activations, LayerRunner, batches
from mea_compress.modeling.attention_mea import MeaAttention


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
    """

    steps: int
    batch: int
    held_out: int
    rates: tuple[float, ...] = (0.03, 0.12)
    trial_steps: int = 30
    checks: int = 5


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


class Refiner:
    """Refine one layer, or tries out several forms of it.

    Args:
        inputs: What the compressed model sends into the layer, (N, T, D).
        targets: What the original model has behind it, (N, T, D).
        settings: Steps, batches, step sizes.
        seed: Seed of the order of sequences.
        tick: Called with the number of optimiser steps done since its last call.
    """

    def __init__(
        self,
        inputs: Activations,
        targets: Activations,
        settings: Settings,
        seed: int,
        tick: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.inputs, self.targets, self.settings = inputs, targets, settings
        self.seed, self.tick = seed, tick

    def try_out(self, runner: LayerRunner) -> float:
        """Return the held-out error after a short refinement at the largest step size, inf if it diverges."""
        run = _Run(self, runner)
        return min(run.descend(self.settings.trial_steps, self.settings.rates[-1], 1), run.best.value)

    def refine(self, composed: ComposedLayer, runner: LayerRunner) -> Refined:
        """Refine a composed layer.

        Args:
            composed: The layer's closed form.
            runner: The layer with that closed form in place; its weights are trained.

        Returns:
            The refined layer, float64 from float32.
        """
        run = _Run(self, runner)
        before, settings = run.best.value, self.settings
        trials = {rate: run.descend(min(settings.trial_steps, settings.steps), rate, 1) for rate in settings.rates}
        chosen = min(settings.rates, key=lambda rate: trials[rate])
        if math.isfinite(trials[chosen]):
            run.descend(settings.steps, chosen, settings.checks)
        _set(run.parameters, run.best.weights)
        improved = run.best.value < before
        layer = _read_back(composed, runner.attention) if improved else composed
        return Refined(layer, before, run.best.value, chosen if improved else 0.0)


@dataclass
class _Best:
    value: float
    weights: dict[str, torch.Tensor]

    def offer(self, value: float, parameters: dict[str, torch.nn.Parameter]) -> None:
        if value < self.value:
            self.value = value
            self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}


class _Run:
    """One layer's weights, where they began, and the best of them so far."""

    def __init__(self, refiner: Refiner, runner: LayerRunner) -> None:
        self.runner, self.refiner, self.settings = runner, refiner, refiner.settings
        self.inputs, self.targets = refiner.inputs, refiner.targets
        self.parameters = _trainable(runner.attention)
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        first = self.settings.held_out
        reach = slice(first, first + self.settings.batch)
        moved = (self.targets[reach] - self.inputs[reach]).square() / _size(self.targets[reach])
        self.scale = float(moved.mean().clamp(min=1e-30))
        self.best = _Best(self.held_out(), self.start)

    def error(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Return the squared error of the residual stream, relative to each token's size, over that of no layer."""
        hidden = self.runner.forward(self.inputs[index])
        target = self.targets[index].to(hidden.device)
        return ((hidden - target).square() / _size(target)).mean() / self.scale

    @torch.no_grad()
    def held_out(self) -> float:
        """Return the error on the held-out sequences."""
        total = 0.0
        for part in batches(self.settings.held_out, self.settings.batch):
            total += float(self.error(part)) * (part.stop - part.start)
        return total / self.settings.held_out

    def descend(self, steps: int, rate: float, checks: int) -> float:
        """Run Adam from the start, with a short warm-up and a cosine to zero; every look at the held-out error counts.

        Returns:
            The last held-out error, inf if it diverged.
        """
        _set(self.parameters, self.start)
        groups = []
        for name, parameter in self.parameters.items():
            size = float(self.start[name].square().mean().sqrt()) or _fallback_size(self.start)
            groups.append({"params": [parameter], "lr": 0.0, "size": size})
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
        order = _order(self.inputs.shape[0] - self.settings.held_out, self.settings.batch, self.refiner.seed)
        warm_up = max(1, min(10, steps // 5))
        looks = {round(steps * (i + 1) / checks) - 1 for i in range(checks)}
        value = math.inf
        for step in range(steps):
            factor = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = rate * factor * group["size"]
            loss = self.error(next(order) + self.settings.held_out)
            if not torch.isfinite(loss):
                return math.inf
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            self.refiner.tick(1)
            if step in looks:
                value = self.held_out()
                if not math.isfinite(value):
                    return math.inf
                self.best.offer(value, self.parameters)
        return value


def _size(target: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each token's stream, (…, 1)."""
    return target.square().mean(-1, keepdim=True).clamp(min=1e-12)


def _trainable(attention: Any) -> dict[str, torch.nn.Parameter]:
    """Return the attention's weights but for norms and what a form promises to keep."""
    frozen: list[str] = []
    for side, form in (("key", attention.key_form), ("value", attention.value_form)):
        names = {"proj": f"{side[0]}_proj.", "composition": f"{side}_composition."}
        frozen += [names[part] for part in form.frozen]
    chosen = {}
    for name, parameter in attention.named_parameters():
        if "norm" not in name and not name.startswith(tuple(frozen)):
            chosen[name] = parameter.requires_grad_(True)
    mask_cross_group_gradients(attention)
    return chosen


def _order(count: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of indices, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < batch:
            queue = torch.cat((queue, torch.randperm(count, generator=generator)))
        yield queue[:batch]
        queue = queue[batch:]


def _fallback_size(start: dict[str, torch.Tensor]) -> float:
    """Return a size for tensors that begin at zero (biases): that of the smallest other tensor."""
    return min((float(tensor.square().mean().sqrt()) for tensor in start.values() if tensor.any()), default=0.02)


def _set(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _read_back(composed: ComposedLayer, attention: Any) -> ComposedLayer:
    def exact(parameter: torch.Tensor) -> Array:
        return as_array(parameter).astype(np.float64)

    def rows(projection: Any) -> Array:
        weight = exact(projection.weight)
        column = np.zeros(len(weight)) if projection.bias is None else exact(projection.bias)
        return np.concatenate((weight, column[:, None]), 1)

    latent = np.concatenate((rows(attention.k_proj), rows(attention.v_proj))) if attention.key_form.joint else None

    def side(old: FactoredHeads, projection: Any, composition: Any) -> FactoredHeads:
        weight = None if composition is None else exact(composition.weight)
        return replace(old, projection=rows(projection), weight=weight, latent=latent)

    head_dim, output = attention.head_dim, exact(attention.o_proj.weight)
    return replace(
        composed,
        key=side(composed.key, attention.k_proj, attention.key_composition),
        value=side(composed.value, attention.v_proj, attention.value_composition),
        query=split_heads(rows(attention.q_proj), head_dim),
        output=output.reshape(len(output), -1, head_dim).swapaxes(0, 1).copy(),
    )


def mask_cross_group_gradients(model: torch.nn.Module) -> None:
    """Keep off-diagonal blocks at zero while a model or an attention module is trained."""
    for module in model.modules():
        if not isinstance(module, MeaAttention):
            continue
        attention: Any = module
        groups = attention.config.mea["layers"][attention.layer_idx].get("groups", 1)
        for composition in (attention.key_composition, attention.value_composition):
            if groups > 1 and composition is not None and composition.weight.requires_grad:
                within = _within_groups(composition, groups)
                composition.weight.register_hook(lambda gradient, within=within: gradient * within)


def _within_groups(composition: Any, groups: int) -> Array:
    """Where a composition's weight connects a component with the heads of its group, in the weight's shape."""
    used = composition.weight.detach() != 0
    if used.dim() == 2 and len(used) == composition.sizes.heads * composition.sizes.head_dim:  # (H * d, m)
        blocks = used.unflatten(0, (groups, -1)).any(1)
        return blocks.repeat_interleave(len(used) // groups, dim=0)
    blocks = used.unflatten(-1, (groups, -1)).any(-1)  # heads come last
    if blocks.dim() == 3:  # real and imaginary parts
        blocks = blocks.any(0)
    return blocks.repeat_interleave(used.shape[-1] // groups, dim=-1).expand_as(used)
