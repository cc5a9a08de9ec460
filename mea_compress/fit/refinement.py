"""Layer-local refinement: a composed layer's attention is fitted, by gradient, to what the original's sends.

The layer gets what the already compressed layers really send it; the target is the residual stream that the original
has behind its attention, so that earlier errors are corrected as well. The MLP behind it is left out: a step then costs
a third. Each token's error counts relative to the size of its stream, for the next norm divides by it. The result is
the best on held-out calibration sequences and never worse than the start.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mea_compress.checkpoint import as_array
from mea_compress.fit.sharing import Share
from mea_compress.heads.composed import Array, FactoredHeads, split_heads
from mea_compress.heads.types import ComposedLayer
from mea_compress.layers.blocks import BlockRunner
from mea_compress.layers.runner import Activations, LayerRunner, batches
from mea_compress.layers.stream import stream_size
from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.modeling.encoded_mea import EncodedAttention
from mea_compress.processes import add_up
from mea_compress.training.sharding import part_of, whole

_WARM_UP = 5


@dataclass(frozen=True)
class Settings:
    """How a layer is refined.

    Attributes:
        steps: Optimiser steps at most, one trial's among them.
        batch: Sequences in a step.
        held_out: Sequences at the front that are only looked at to choose.
        rates: Step sizes to try, as a share of a tensor's root mean square.
        trial_steps: Length of each trial; the best one is continued.
        between_looks: Steps from one look at the held-out sequences to the next.
        decay: Share of all steps in which the step size falls to zero, at the end.
        least_gain: Share of the held-out error that steps between two looks must gain; below, the end begins.
    """

    steps: int
    batch: int
    held_out: int
    rates: tuple[float, ...] = (0.02, 0.06)
    trial_steps: int = 20
    between_looks: int = 20
    decay: float = 0.4
    least_gain: float = 0.01

    @property
    def all_steps(self) -> int:
        """Optimiser steps that are taken at most, those of trials that are not continued among them."""
        return self.steps + (len(self.rates) - 1) * min(self.trial_steps, self.steps)


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
    """Refine one layer.

    Args:
        inputs: What the compressed model sends into the layer, (N, T, D).
        targets: What the original model has behind its attention, (N, T, D).
        settings: Steps, batches, step sizes.
        seed: Seed of the order of sequences.
        tick: Called with the number of optimiser steps done since its last call.
        share: Which sequences inputs and targets are where other processes have others, and settings are of all;
            without it they are all.
    """

    def __init__(
        self,
        inputs: Activations,
        targets: Activations,
        settings: Settings,
        seed: int,
        tick: Callable[[int], object] = lambda _: None,
        share: Share | None = None,
    ) -> None:
        self.share = share or Share.whole(inputs.shape[0], settings.held_out)
        self.inputs, self.targets, self.settings = inputs, targets, settings
        self.seed, self.tick = seed, tick

    def refine(self, composed: ComposedLayer, runner: LayerRunner | BlockRunner) -> Refined:
        """Refine a composed layer.

        Every step size is tried for a few steps, and the best is continued for as long as the held-out error gains;
        then the step size falls to zero.

        Args:
            composed: The layer's closed form.
            runner: The layer with that closed form in place; its weights are trained.

        Returns:
            The refined layer, float64 from float32.
        """
        run = _Run(self, runner)
        before, settings = run.best.value, self.settings
        trial = min(settings.trial_steps, settings.steps)
        trials = {}
        for rate in settings.rates:
            descent = _Descent(run, rate)
            trials[rate] = (descent.advance(trial), descent)
        chosen = min(settings.rates, key=lambda rate: trials[rate][0])
        value, descent = trials[chosen]
        if math.isfinite(value):
            descent.resume()
            self._continue(descent, value)
        _set(run.parameters, run.best.weights)
        improved = run.best.value < before
        layer = _read_back(composed, runner.attention) if improved else composed
        return Refined(layer, before, run.best.value, chosen if improved else 0.0)

    def _continue(self, descent: "_Descent", value: float) -> None:
        """Go on at the full step size while that gains, then let it fall."""
        settings = self.settings
        ending = max(1, round(settings.decay * settings.steps))
        while descent.steps + ending + settings.between_looks <= settings.steps:
            now = descent.advance(settings.between_looks)
            if not now < value * (1 - settings.least_gain):
                break
            value = now
        remaining = min(ending, settings.steps - descent.steps)
        if remaining > 0 and math.isfinite(value):
            descent.advance(remaining, falling=True)


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

    def __init__(self, refiner: Refiner, runner: LayerRunner | BlockRunner) -> None:
        self.runner, self.refiner, self.settings = runner, refiner, refiner.settings
        self.inputs, self.targets = refiner.inputs, refiner.targets
        self.parameters = trainable_parameters(runner.attention)
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.share, first = refiner.share, self.settings.held_out
        reach = self.share.between(first, first + self.settings.batch)
        moved = (self.targets[reach] - self.inputs[reach]).square()
        moved = moved / stream_size(self.targets[reach], self.inputs[reach])
        mean = moved.mean()
        if self.share.is_part:
            total, count = add_up(torch.tensor([float(moved.double().sum()), moved.numel()], dtype=torch.float64))
            mean = total / count
        self.scale = float(mean.clamp(min=1e-30))
        self.best = _Best(self.held_out(), self.start)

    def error(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Return the squared error of the residual stream, relative to each token's size, over that of no attention."""
        inputs = self.inputs[index].to(self.runner.device)
        target = self.targets[index].to(inputs.device)
        errors = (inputs + self.runner.send(inputs) - target).square()
        return (errors / stream_size(target, inputs)).mean() / self.scale

    @torch.no_grad()
    def held_out(self) -> float:
        """Return the error on the held-out sequences."""
        total = 0.0
        for part in batches(self.share.place(self.settings.held_out), self.settings.batch):
            total += float(self.error(part)) * (part.stop - part.start)
        if self.share.is_part:
            total = float(add_up(torch.tensor(total, dtype=torch.float64)))
        return total / self.settings.held_out

    def descend(self, numbers: torch.Tensor) -> bool:
        """Make the gradients of the mean error of some sequences; return whether it is finite.

        Processes make them together, each of the sequences that it has.
        """
        places = self.share.places(numbers) if self.share.is_part else numbers
        loss = torch.zeros(())
        if len(places):
            loss = self.error(places) * (len(places) / len(numbers))
        total = add_up(loss.detach().double().cpu()) if self.share.is_part else loss
        if not torch.isfinite(total):
            return False
        if len(places):
            loss.backward()
        if self.share.is_part:
            weights = list(self.parameters.values())
            gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
            sums = add_up(torch.cat([gradient.flatten() for gradient in gradients]))
            for weight, part in zip(weights, sums.split([weight.numel() for weight in weights]), strict=True):
                weight.grad = part.view_as(weight)
        return True


class _Descent:
    """Adam from a run's start at one step size, in pieces; every look at the held-out error counts."""

    def __init__(self, run: _Run, rate: float) -> None:
        self.run, self.rate, self.steps = run, rate, 0
        _set(run.parameters, run.start)
        groups = []
        for name, parameter in run.parameters.items():
            size = float(run.start[name].square().mean().sqrt()) or _fallback_size(run.start)
            groups.append({"params": [parameter], "lr": 0.0, "size": size})
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
        settings = run.settings
        self.order = _order(run.share.total - settings.held_out, settings.batch, run.refiner.seed)
        self.reached: dict[str, torch.Tensor] = {}

    def resume(self) -> None:
        """Go back to where `advance` ended, for another descent has moved the weights since."""
        _set(self.run.parameters, self.reached)

    def advance(self, steps: int, falling: bool = False) -> float:
        """Take some steps, the first of all with a warm-up; `falling`: with a cosine to zero.

        Returns:
            The held-out error behind them, inf if they diverged.
        """
        run = self.run
        for step in range(steps):
            factor = min(1.0, (self.steps + 1) / _WARM_UP)
            if falling:
                factor *= 0.5 * (1 + math.cos(math.pi * (step + 1) / (steps + 1)))
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * factor * group["size"]
            self.optimiser.zero_grad(set_to_none=True)
            if not run.descend(next(self.order) + run.settings.held_out):
                return math.inf
            self.optimiser.step()
            self.steps += 1
            run.refiner.tick(1)
        value = run.held_out()
        if not math.isfinite(value):
            return math.inf
        run.best.offer(value, run.parameters)
        self.reached = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
        return value


def trainable_parameters(attention: Any) -> dict[str, torch.nn.Parameter]:
    """Return the attention's weights but for norms and what a form promises to keep, with gradients from now on.

    Of a block that stays as it is, those are its encoders and decoders.
    """
    if isinstance(attention, EncodedAttention):
        coded = {name: parameter for name, parameter in attention.named_parameters() if "_composition." in name}
        for parameter in coded.values():
            parameter.requires_grad_(True)
        return coded
    frozen = kept_by_forms(attention)
    chosen = {}
    for name, parameter in attention.named_parameters():
        if "norm" not in name and not name.startswith(frozen):
            chosen[name] = parameter.requires_grad_(True)
    mask_cross_group_gradients(attention)
    return chosen


def kept_by_forms(attention: Any) -> tuple[str, ...]:
    """Return what the names begin with of weights that the forms of an attention module promise to keep."""
    kept: list[str] = []
    for side, form in (("key", attention.key_form), ("value", attention.value_form)):
        names = {"proj": f"{side[0]}_proj.", "composition": f"{side}_composition."}
        kept += [names[part] for part in form.frozen]
    return tuple(kept)


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

    if composed.block is not None:

        def coded(old: FactoredHeads, composition: Any) -> FactoredHeads:
            if composition is None:
                return old
            return replace(old, weight=exact(composition.weight)).with_encoder(exact(composition.encoder))

        key = coded(composed.key, attention.key_composition)
        return replace(composed, key=key, value=coded(composed.value, attention.value_composition))

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
                within = part_of(_within_groups(composition, groups), composition.weight)
                if hasattr(composition.weight, "full_tensor"):  # sharded: gradients come to it behind autograd
                    composition.weight.register_post_accumulate_grad_hook(
                        lambda weight, within=within: weight.grad.mul_(within)
                    )
                else:
                    composition.weight.register_hook(lambda gradient, within=within: gradient * within)


def _within_groups(composition: Any, groups: int) -> torch.Tensor:
    """Where a composition's weight connects a component with the heads of its group, in the weight's shape."""
    used = whole(composition.weight.detach()) != 0
    if used.dim() == 2 and len(used) == composition.sizes.heads * composition.sizes.head_dim:  # (H * d, m)
        blocks = used.unflatten(0, (groups, -1)).any(1)
        return blocks.repeat_interleave(len(used) // groups, dim=0)
    blocks = used.unflatten(-1, (groups, -1)).any(-1)  # heads come last
    if blocks.dim() == 3:  # real and imaginary parts
        blocks = blocks.any(0)
    return blocks.repeat_interleave(used.shape[-1] // groups, dim=-1).expand_as(used)
