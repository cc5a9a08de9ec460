"""Which of two allocations of the cache is the better one, by a trial: all layers in closed form, measured as a whole.

A profile takes one layer's cost after the other as if they added up. Mostly they nearly do; where much is taken from a
small model they do not, and widths that are cheap one by one can cost more together than equal ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import replace

import torch

from mea_compress.checkpoint.workspace import Workspace
from mea_compress.fit.layers import CalibratedFit, measured_tokens, stored_tokens
from mea_compress.fit.profile import divide_text
from mea_compress.fit.progress import TRIED_TOKENS, FitProgress
from mea_compress.layers.store import store_layer
from mea_compress.planning.types import Plan


def better_plan(plans: Mapping[str, Plan], workspace: Workspace, progress: bool, believe_profile: bool = False) -> Plan:
    """Return the plan whose closed form says what is closest to the original, on text that nothing is fitted to.

    What each of them costs is committed to the workspace as the result ``trial`` of ``budget``, in nats per token.

    Args:
        plans: By their names; of one source and recipe, with calibration.
        workspace: Keeps the calibration text, and what an earlier run has found.
        progress: Show bars on stderr.
        believe_profile: Do not try a plan that costs more by its profile's prediction than another did in its trial:
            layers cost more together than one by one, if anything, and equal widths are not chosen by the prediction.

    Raises:
        RequestError: As `fit_layers`.
    """
    found = dict(workspace.result_of("budget", "trial") or {})
    for name, plan in plans.items():
        if name not in found and not (believe_profile and _is_predicted_above(plan, found.values())):
            tokens = stored_tokens(plan, workspace, progress)[: plan.decisions.sequences]
            found[name] = closed_form_kl(plan, tokens, f"trying the {name} budget,", progress)
            workspace.commit("budget", "trial", dict(found))
    return plans[min(found, key=lambda name: found[name])]


def _is_predicted_above(plan: Plan, found: Collection[float]) -> bool:
    """Return whether a profile predicts a higher KL of a plan than one of those found."""
    return plan.predicted_kl is not None and any(kl < plan.predicted_kl for kl in found)


def closed_form_kl(plan: Plan, tokens: torch.Tensor, title: str, progress: bool) -> float:
    """Return KL(original ‖ compressed) of a plan's closed form in nats per token, without refinement and healing.

    It is fitted to what a profile's candidates are fitted to, and measured on sequences behind these where there are
    enough: a profile has chosen its widths by those in front.

    Args:
        plan: What to do.
        tokens: Calibration sequences, (N, T), int64.
        title: Of the bar.
        progress: Show it on stderr.
    """
    held_out, fitted = divide_text(plan, tokens)
    others = tokens[held_out + fitted :][: TRIED_TOKENS // tokens.shape[1]]
    tokens, measured = tokens[: held_out + fitted], measured_tokens(plan, tokens)
    if others.numel() >= measured.numel():
        tokens, held_out, measured = torch.cat((others, tokens[held_out:])), len(others), others
    decisions = replace(plan.decisions, refinement_steps=0, healing_steps=0)
    plan = replace(plan, decisions=decisions)
    fit = CalibratedFit(plan, tokens, held_out)
    last = max(layer.layer for layer in plan.layers if layer.compressed)
    composed_layers = sum(layer.compressed for layer in plan.layers)
    work = FitProgress(plan, len(list(fit.parts())), len(fit.sample), 0, composed_layers, progress=progress)
    fit.work, work.name = work, title
    stored = None
    with closing(work):
        for layer in plan.layers[: last + 1]:
            stored = None
            if layer.compressed:
                composed, _ = fit.fit(layer)
                stored = store_layer(composed, plan.source.config.mea["bias"], plan.decisions.stored_dtype)
            if layer.layer < last:
                fit.advance(layer.layer, stored)
        assert stored is not None
        return fit.measure(last, stored, measured)


__all__ = ["better_plan", "closed_form_kl"]
