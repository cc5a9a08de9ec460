"""What of the closed form is left out or done on less text, so that all of it ends within a time limit.

Distillation behind the fit gains more a minute than anything in front of it once there is a closed form, so measuring a
budget and the closed form itself may take a share of the time each. What is decided is kept in the workspace, for it
depends on the machine and on when it was asked.
"""

from __future__ import annotations

import time
from dataclasses import replace
from math import ceil

from mea_compress.checkpoint.workspace import Workspace
from mea_compress.fit.layers import stored_tokens
from mea_compress.fit.progress import budget_units, closed_form_units, fitted_tokens, measured_count, unit_seconds
from mea_compress.planning.types import Plan
from mea_compress.processes import process_count

_SECTION = "time_limit"
# Shares of the time that is left. On SmolLM2-135M (40 minutes, two cores, half of the cache) measuring takes a fifth
# with joint keys and values, whose closed form is a fifth closer for it or more (`budget` of their rows in
# benchmarks/results/smollm2.json); with frequency and latent ones it took a third, and equal widths end closer
# (KL 0.203 and 0.217).
_BUDGET_SHARE, _CLOSED_SHARE = 0.3, 0.2
_ALONE_SHARE = 0.9  # of a closed form that nothing follows


def within_limit(measured: Plan, equal: Plan, workspace: Workspace, deadline: float, progress: bool) -> Plan:
    """Return the plan that measures a budget, or the one with equal widths where measuring takes too much of the time.

    A budget that the recipe asks for is measured.

    Args:
        measured: A plan that measures a budget.
        equal: The same with equal widths.
        workspace: Keeps the calibration text and what was decided.
        deadline: See `deadline_of`.
        progress: Show bars on stderr.
    """
    if measured.recipe.budget == "measured":
        return measured
    told = workspace.result_of(_SECTION, "budget")
    if told is None:
        there = _sequences(measured, workspace, progress)  # text that is sampled takes its time before any is counted
        seconds, left = unit_seconds(measured) * budget_units(measured, equal, there), deadline - time.monotonic()
        told = "measured"
        if seconds > _BUDGET_SHARE * left:
            told = f"equal widths, for measuring others takes {seconds / 60:.1f} of {max(0.0, left) / 60:.1f} minutes"
        workspace.commit(_SECTION, "budget", told)
    if told == "measured":
        return measured
    choice = "; ".join([*filter(None, [equal.decisions.choice]), told])
    return replace(equal, decisions=replace(equal.decisions, choice=choice))


def with_less_text(plan: Plan, workspace: Workspace, deadline: float, progress: bool) -> Plan:
    """Return the plan with as many calibration sequences as there is time to fit the closed form of all layers to.

    They are about as many as a profile has at least; a number that the recipe names stays.

    Args:
        plan: What is to be fitted, its widths decided.
        workspace: Keeps the calibration text and what was decided.
        deadline: See `deadline_of`.
        progress: Show bars on stderr.
    """
    decisions = plan.decisions
    if plan.recipe.sequences is not None:
        return plan
    sequences = workspace.result_of(_SECTION, "sequences")
    if sequences is None:
        there = _sequences(plan, workspace, progress)
        follows = decisions.healing_steps or decisions.refinement_steps
        left = (_CLOSED_SHARE if follows else _ALONE_SHARE) * (deadline - time.monotonic())
        wanted = unit_seconds(plan) * closed_form_units(plan, there) / process_count()  # which share the sequences
        fitted, measured = ceil(fitted_tokens(plan) / decisions.sequence_length), measured_count(plan, there)
        least = max(fitted + measured + process_count(), 4 * measured)  # costs keep their sequences
        sequences = min(there, max(least, int(there * left / wanted)))
        workspace.commit(_SECTION, "sequences", sequences)
    return replace(plan, decisions=replace(decisions, sequences=sequences))


def _sequences(plan: Plan, workspace: Workspace, progress: bool) -> int:
    """Return how many calibration sequences there are: a text may have fewer than were decided on."""
    return min(plan.decisions.sequences, len(stored_tokens(plan, workspace, progress)))


__all__ = ["with_less_text", "within_limit"]
