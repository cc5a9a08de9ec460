"""How much work a fit is, how far it has come, and how much of it fits into a time.

One unit of work is one batch of the calibration text that is run through one decoder layer. What other things cost is
said in that unit; a bar over units shows the time left however the work is divided, and a limit of time is turned
into steps of refinement by the seconds that a unit has taken so far.
"""

import sys
import time
from collections.abc import Sequence
from math import ceil

import torch
from tqdm.auto import tqdm

from mea_compress.architectures.rope import length_dependent_rope
from mea_compress.checkpoint import torch_dtype
from mea_compress.layers.blocks import BlockRunner
from mea_compress.layers.runner import LayerRunner, fast_products
from mea_compress.loading import resolve_device
from mea_compress.planning.budget import candidates
from mea_compress.planning.decisions import kept_healing_steps
from mea_compress.planning.plans import equal_widths
from mea_compress.planning.sizes import (
    SAMPLED_QUERIES,
    TOKENS_PER_STEP,
    fits_scores,
    healing_batch,
    largest_layer,
    scored_sequences,
)
from mea_compress.planning.types import Plan

# Passes over the queries that a fit to their scores makes, and what a number of these costs beside one of a layer's.
_SCORE_PASSES, _SCORE_COST = 24, 2.0
# In units; measured on SmolLM2-135M (two cores, bfloat16) and babyllama105 (float32).
STATISTICS, ATTENTION, MLP, STEP = 0.8, 0.4, 0.6, 1.3
# Of a regression of o_proj, its solutions for every strength of the ridge, for each channel of the model; and of the
# next-token distributions of a batch, which cost as many layers as the head has their numbers, and their comparison.
_SOLUTION, _HEAD = 0.008, 1.4
# Of a step of distillation: each layer in teacher and student with its gradients, and the logits of both, which cost
# as many layers as have their numbers.
_HEAL_LAYER, _HEAL_LOGITS = 4.0, 5.0
HEALING_TRIALS = 1.15
"""All steps of a distillation, those of the trials of step sizes among them, for each of the full run."""
TRIAL_TOKENS = 1 << 13
"""Tokens that the ways to divide a layer's budget are tried on."""
_MEASURED_TOKENS = 1 << 11
"""Tokens that costs are measured on, of a profile and of the whole."""
_MEASURED_WINDOW = 1 << 9
"""Tokens of each sequence that costs are measured on: many sequences differ less from other text than a few do."""
TRIED_TOKENS = 1 << 13
"""Tokens that two allocations of the cache are tried on: what they cost can be close."""
_FITTED_TOKENS = 1 << 14
"""Tokens that a profile's candidates are fitted to; a model wider than half of these takes more."""
_TRIALS = 4  # other ways to divide a layer's budget, which see a part of the text


def fitted_tokens(plan: Plan) -> int:
    """Return how many tokens a profile's candidates are fitted to, as far as there are so many."""
    return max(_FITTED_TOKENS, 2 * plan.source.config.hidden_size)


def measured_on(plan: Plan) -> list[int]:
    """Return the tokens that costs are measured on, in all and of a sequence: what kept costs must have in common."""
    return [_MEASURED_TOKENS, measured_window(plan)]


def measured_window(plan: Plan) -> int:
    """Return how many tokens of a sequence costs are measured on: all where rotary frequencies follow its length."""
    length = plan.decisions.sequence_length
    return length if length_dependent_rope(plan.source.config) else min(length, _MEASURED_WINDOW)


def measured_count(plan: Plan, sequences: int) -> int:
    """Return how many of the sequences that there are costs are measured on."""
    return max(1, min(_MEASURED_TOKENS // measured_window(plan), sequences // 4))


class Work:
    """Is told what goes on and how much is done; this one tells nobody, and knows no limit of time."""

    def begin_fit(self) -> None:
        """Say that the present layer is fitted, and not only passed through."""

    def say(self, layer: int, what: str) -> None:
        """Say what is going on."""

    def add(self, units: float) -> None:
        """Count work."""

    def finish_layer(self) -> None:
        """Say that the present layer is done."""

    def steps_allowed(self, steps: int, trials: int) -> int:
        """Return how many of some steps there is time for, with others beside them that are not kept."""
        return steps


class WorkBar(Work):
    """A bar on stderr over units of work, with the time left.

    Args:
        name: Of the work, such as "fitting".
        total: Units of all of it.
        progress: Show the bar.
    """

    def __init__(self, name: str, total: float, progress: bool) -> None:
        self.name = name
        self.bar = tqdm(
            total=total,
            desc=name,
            disable=not progress,
            file=sys.stderr,
            bar_format="{l_bar}{bar}| {elapsed}, {remaining} left",
        )

    def say(self, layer: int, what: str) -> None:
        """Say what is going on."""
        self.bar.set_description(f"{self.name} layer {layer}: {what}")

    def add(self, units: float) -> None:
        """Count work, of which the bar shows no more than its total: fractions add up to a little more than 1."""
        self.bar.update(min(units, max(0.0, (self.bar.total or 0.0) - self.bar.n)))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


class FitProgress(WorkBar):
    """One bar over all layers of a fit.

    Args:
        plan: What is done.
        batches: Batches of the calibration text.
        trial_batches: Batches that ways to divide a layer's budget are tried on.
        steps: Optimiser steps of a layer at most, trials of step sizes among them.
        unfinished: Layers to be fitted; an earlier run may have finished others.
        deadline: When all is to be over, distillation behind the fit included; see `deadline_of`.
        progress: Show the bar on stderr.
    """

    def __init__(
        self,
        plan: Plan,
        batches: int,
        trial_batches: int,
        steps: int,
        unfinished: int,
        deadline: float | None = None,
        progress: bool = False,
    ) -> None:
        self.deadline = deadline
        self.behind = healing_units(plan, kept_healing_steps(plan.recipe, plan.decisions.healing_steps))
        self.began = time.monotonic()
        self.left = unfinished
        self.without_steps = _closed_units(plan, batches, trial_batches)
        self.layer_units = self.without_steps + STEP * steps
        self.passing = batches * 2.0  # a layer that is only passed through, as it was and as it is
        self.total = self.left * self.layer_units + (len(plan.layers) - self.left) * self.passing
        super().__init__("fitting", self.total, progress)
        self.done = 0.0
        self.expected = 0.0  # of the present layer
        self.before = 0.0  # done when it began

    def begin_fit(self) -> None:
        """Say that the present layer is fitted, and not only passed through."""
        self.left -= 1
        self.expected = self.layer_units

    def add(self, units: float) -> None:
        """Count work."""
        self.done += units
        super().add(units)

    def finish_layer(self) -> None:
        """Take off what the layer did not need: steps that would have gained nothing, for instance."""
        expected = self.expected or self.passing
        self.total = max(self.total - (expected - (self.done - self.before)), self.done)
        self.bar.total = self.total
        self.before, self.expected = self.done, 0.0
        self.bar.refresh()

    def steps_allowed(self, steps: int, trials: int) -> int:
        """Return how many of the steps of the layer that is being fitted fit into the time limit, 0 for none.

        Args:
            steps: As many as are wanted.
            trials: Steps beside them, of step sizes that are not kept.
        """
        if self.deadline is None or not self.done:
            return steps
        now = time.monotonic()
        units = (self.deadline - now) / ((now - self.began) / self.done)
        # What distillation gains, end to end, comes before what a layer gains by itself.
        share = (units - self.behind - self.left * self.without_steps) / (self.left + 1)
        allowed = int(share / STEP) - trials
        return min(steps, allowed) if allowed > trials else 0


def solution_units(plan: Plan) -> float:
    """Return the work of solving for o_proj once its sums are there."""
    return _SOLUTION * plan.source.config.hidden_size


def score_units(plan: Plan) -> float:
    """Return the work of fitting q_proj of a layer to the scores of the original's queries."""
    source, length = plan.source, plan.decisions.sequence_length
    sequences = min(plan.decisions.sequences, scored_sequences(source, length))
    queries = sequences * min(length, SAMPLED_QUERIES) * source.config.num_attention_heads
    numbers = length * source.head_dim**2  # of a query's moments
    numbers += _SCORE_PASSES * source.head_dim * (2 * source.config.hidden_size + source.head_dim)
    return _SCORE_COST * queries * numbers / (TOKENS_PER_STEP * largest_layer(source))


def comparison_units(plan: Plan, batches: float) -> float:
    """Return the work of comparing one model's next-token distributions on so many batches."""
    return batches * _HEAD * _head_layers(plan)


def _head_layers(plan: Plan) -> float:
    """Return how many layers have as many numbers as the language-model head."""
    return plan.source.config.vocab_size * plan.source.config.hidden_size / largest_layer(plan.source)


def _closed_units(plan: Plan, batches: int, trial_batches: int) -> float:
    """Return the work on one layer without its refinement."""
    recipe = plan.recipe
    units = batches * (1.0 + (STATISTICS if recipe.fit != "weights" else 0.0) + MLP + ATTENTION)
    if recipe.fit == "aligned":
        units += batches * ATTENTION + solution_units(plan)
    if any(fits_scores(plan.source, recipe, layer) for layer in plan.layers):
        sequences = min(plan.decisions.sequences, scored_sequences(plan.source, plan.decisions.sequence_length))
        units += ATTENTION * sequences * plan.decisions.sequence_length / TOKENS_PER_STEP + score_units(plan)
    if plan.decisions.searches_kv_split:
        units += (1 + _TRIALS) * (trial_batches * ATTENTION + solution_units(plan))
    return units


def rounds(products: torch.dtype) -> bool:
    """Return whether roundings of products make a KL that counts: in float32 it is 1e-9, in bfloat16 7e-4."""
    return products.itemsize < 4


def profile_units(
    plan: Plan, missing: Sequence[int], batches: int, trial_batches: int, measured: float, products: torch.dtype
) -> float:
    """Return the work of a profile.

    Args:
        plan: What is profiled.
        missing: Layers that are still to be measured, ascending.
        batches: Batches of the text that candidates are fitted to.
        trial_batches: Those of them that o_proj is fitted again to.
        measured: Batches that costs are measured on, part of one as well.
        products: What matrix products are computed in.
    """
    recipe = plan.recipe
    units = measured * (len(plan.layers) - missing[0] - 1)  # of the original
    units += (missing[-1] + 1) * batches * (1.0 + (STATISTICS if recipe.fit != "weights" else 0.0))
    for number in missing:
        count = sum(len(counts) for counts in candidates(plan.layers[number], plan).values())
        units += count * (trial_batches * ATTENTION + solution_units(plan)) if recipe.fit == "aligned" else 0.0
        count += rounds(products)
        units += count * measured * (len(plan.layers) - number - 1) + comparison_units(plan, (count + 1) * measured)
    return units


def healing_units(plan: Plan, steps: int) -> float:
    """Return the work of so many steps of the distillation behind a fit, and of its trials of step sizes."""
    if not steps:
        return 0.0
    length = plan.decisions.sequence_length
    batches = steps * healing_batch(length) / max(1, TOKENS_PER_STEP // length)
    return HEALING_TRIALS * batches * (_HEAL_LAYER * len(plan.layers) + _HEAL_LOGITS * _head_layers(plan))


def least_healing_units(plan: Plan, trial: int, held_out: int) -> float:
    """Return the work of the shortest distillation that can change anything: one trial, and measuring three times.

    Args:
        plan: What is distilled.
        trial: Optimiser steps of a trial.
        held_out: Sequences that it measures on.
    """
    measured = held_out * plan.decisions.sequence_length / TOKENS_PER_STEP
    looks = 3 * (2 * len(plan.layers) * measured + comparison_units(plan, measured))
    return healing_units(plan, trial) / HEALING_TRIALS + looks


def closed_form_units(plan: Plan, sequences: int) -> float:
    """Return the work of all layers of a fit on so many sequences, without refinement and distillation."""
    batches = ceil(sequences / max(1, TOKENS_PER_STEP // plan.decisions.sequence_length))
    compressed = sum(layer.compressed for layer in plan.layers)
    layer = _closed_units(plan, batches, min(batches, ceil(TRIAL_TOKENS / TOKENS_PER_STEP)))
    return compressed * layer + (len(plan.layers) - compressed) * 2.0 * batches


def budget_units(measured: Plan, equal: Plan, sequences: int) -> float:
    """Return the work of measuring a budget.

    Args:
        measured: A plan that measures one.
        equal: The same with equal widths, which are tried beside what the profile says.
        sequences: As many as there are.
    """
    length = measured.decisions.sequence_length
    there = sequences * length
    fitted = min(there, fitted_tokens(measured))
    read = min(there, fitted + measured_count(measured, sequences) * length)
    parts, sampled = ceil(read / TOKENS_PER_STEP), TRIAL_TOKENS // TOKENS_PER_STEP
    profiled = [layer.layer for layer in measured.layers if layer.compressed]
    device = resolve_device(measured.recipe.device)
    products = fast_products(torch_dtype(measured.source.dtype), device)
    units = profile_units(measured, profiled, parts, sampled, _MEASURED_TOKENS / TOKENS_PER_STEP, products)
    tried = min(there, fitted + TRIED_TOKENS)
    parts, compared = ceil(tried / TOKENS_PER_STEP), (tried - fitted) / TOKENS_PER_STEP
    for plan in (measured, equal):
        units += len(profiled) * _closed_units(plan, parts, sampled) + 2 * comparison_units(plan, compared)
    return units


def unit_seconds(plan: Plan) -> float:
    """Return how long a unit takes on this machine, in seconds: batches are run through a layer to see."""
    device = resolve_device(plan.recipe.device)
    kind = BlockRunner if plan.source.at_cache else LayerRunner
    number = next((layer.layer for layer in plan.layers if layer.compressed), 0)  # others may have no attention
    runner = kind(plan.source, number, device=device, products=fast_products(torch_dtype(plan.source.dtype), device))
    length = plan.decisions.sequence_length
    size = max(1, TOKENS_PER_STEP // length)
    hidden = torch.randn(size, length, plan.source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    runner.run(hidden)  # the first takes longer
    found = []
    for _ in range(3):  # what else the machine does makes some of them slow
        began = time.monotonic()
        runner.run(hidden)[0].sum().item()  # waits for a GPU
        found.append(time.monotonic() - began)
    return min(found)


def estimate_seconds(plan: Plan) -> float:
    """Return how long the fit of a plan takes on this machine, without sampling text and writing files.

    Early ends of refinement are not foreseen.

    Example:
        >>> from mea_compress import plan
        >>> 0 < estimate_seconds(plan("SRC", kv_ratio=0.5, refine=0)) < 600
        True
    """
    decisions, recipe = plan.decisions, plan.recipe
    if not decisions.needs_calibration and not decisions.healing_steps:
        return 0.0
    fit = closed_form_units(plan, decisions.sequences)
    fit += STEP * decisions.refinement_steps * sum(layer.compressed for layer in plan.layers)
    if decisions.measures_budget:
        fit += budget_units(plan, equal_widths(plan), decisions.sequences)
    seconds = unit_seconds(plan) * (fit * decisions.needs_calibration + healing_units(plan, decisions.healing_steps))
    return seconds if recipe.time_limit is None else min(seconds, 60 * recipe.time_limit)
