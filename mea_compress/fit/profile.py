"""Measure what compressing one side of one layer costs, by width (METHOD §7 and §9).

The original runs once over the calibration text, layer by layer. At each layer every candidate is fitted as `compress`
would fit it, and runs over held-out text; then all candidates of the layer go together through the layers above it, so
that each is loaded once for all, and their next-token distributions are compared with the original's. No first-order
estimate stands in: each cost is a real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch

from mea_compress.architectures import open_checkpoint
from mea_compress.checkpoint.files import write_json
from mea_compress.checkpoint.hub import local_directory
from mea_compress.checkpoint.system import raise_trim_threshold
from mea_compress.checkpoint.untrusted import printable_path
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.emit.directory import fingerprint
from mea_compress.errors import RequestError
from mea_compress.fit.closed_form import compose
from mea_compress.fit.comparison import compare_streams
from mea_compress.fit.layers import (
    CalibratedFit,
    calibration_tokens,
    check_finite,
    measured_sequences,
    measured_tokens,
    stored_tokens,
)
from mea_compress.fit.progress import (
    WorkBar,
    comparison_units,
    fitted_tokens,
    measured_on,
    measured_window,
    profile_units,
    rounds,
)
from mea_compress.layers.runner import LayerRunner, batches
from mea_compress.layers.store import store_layer
from mea_compress.planning.budget import candidates, with_side
from mea_compress.planning.plans import plan_source
from mea_compress.planning.profiles import Profile, ProfilePoint
from mea_compress.planning.sizes import TOKENS_PER_STEP, largest_layer
from mea_compress.planning.types import LayerPlan, Plan
from mea_compress.recipe import Recipe, make_recipe, to_yaml
from mea_compress.text.reading import text_state

# Decoder layers stay in memory, in float32, up to this many bytes.
_RESIDENT_BYTES = 4 << 30
# Relative noise that changes nothing but the roundings behind it.
_NOISE = 1e-6


def measure_profile(plan: Plan, tokens: torch.Tensor, commit: Commit, progress: bool) -> Profile:
    """Measure the profile of a plan.

    Args:
        plan: Methods, fit and layers; its widths do not matter.
        tokens: Calibration sequences, (N, T), int64; costs are measured on the first.
        commit: Results of layers that an earlier run has measured, and where new ones go.
        progress: Show a bar on stderr.

    Raises:
        RequestError: There is too little text, a layer cannot be composed from it, or layers differ in their heads.
    """
    if plan.source.at_cache and not plan.source.is_alike:
        raise RequestError(
            f"the layers of this {plan.source.family.model_type} model differ in the heads that they cache, and a "
            "profile counts heads; compress it with a uniform budget"
        )
    measured, fitted = divide_text(plan, tokens)
    layers = [layer for layer in plan.layers if layer.compressed and candidates(layer, plan)]
    if not layers:
        raise RequestError(
            "no layer has a width between nothing and all that it caches, so there is nothing to profile"
        )
    missing = [layer.layer for layer in layers if commit.get(layer.layer) is None]
    if missing:
        profiler = _Profiler(plan, tokens[: measured + fitted], measured, missing, progress)
        with closing(profiler.bar):
            for layer in plan.layers[: missing[-1] + 1]:
                if layer.layer in missing:
                    commit.put(layer.layer, profiler.profile(layer))
                if layer.layer < missing[-1]:
                    profiler.advance(layer.layer)
    results = [commit.results[str(layer.layer)] for layer in layers]
    source, first = plan.source, layers[0].spec
    return Profile(
        source=source.name,
        key_composition=first.key.composition,
        value_composition=first.value.composition,
        fit=plan.recipe.fit,
        layers=len(plan.layers),
        heads=source.heads,
        head_dim=source.head_dim,
        tokens=measured_tokens(plan, tokens)[:, 1:].numel(),
        cross_entropy=results[0]["cross_entropy"],
        floor=sum(result["floor"] for result in results) / len(results),
        points=tuple(ProfilePoint(**point) for result in results for point in result["points"]),
    )


class Commit:
    """Keeps what was measured of each layer, so that nothing is measured twice.

    Args:
        results: What an earlier run has kept, by layer.
        save: Called with a layer and its results.
    """

    def __init__(
        self, results: dict[str, Any], save: Callable[[str, Any], object] = lambda layer, result: None
    ) -> None:
        self.results, self.save = results, save

    def get(self, layer: int) -> dict[str, Any] | None:
        """Return what was measured of a layer, or None."""
        return self.results.get(str(layer))

    def put(self, layer: int, result: dict[str, Any]) -> None:
        """Keep what was measured of a layer."""
        self.results[str(layer)] = result
        self.save(str(layer), result)


def divide_text(plan: Plan, tokens: torch.Tensor) -> tuple[int, int]:
    """Return how many of the sequences (N, T) costs are measured on, and how many candidates are fitted to.

    Raises:
        RequestError: There are too few.
    """
    count, length = tokens.shape
    measured = measured_sequences(plan, tokens)
    return measured, min(ceil(fitted_tokens(plan) / length), count - measured)


def profile_in(plan: Plan, workspace: Workspace, progress: bool) -> Profile:
    """Measure the profile of a compression that is under way, on its own calibration text."""
    commit = Commit(
        dict(workspace.manifest.get("profile", {})), lambda layer, result: workspace.commit("profile", layer, result)
    )
    return measure_profile(plan, stored_tokens(plan, workspace, progress)[: plan.decisions.sequences], commit, progress)


class _Profiler:
    """The original's text on its way through the layers, and the layers above.

    Args:
        plan: Methods and fit.
        tokens: Sequences, (N, T), those that costs are measured on in front.
        measured: Sequences that costs are measured on.
        missing: Layers that are still to be measured.
        progress: Show a bar on stderr.
    """

    def __init__(self, plan: Plan, tokens: torch.Tensor, measured: int, missing: Sequence[int], progress: bool) -> None:
        self.plan, self.tokens = plan, tokens[:measured, : measured_window(plan)]  # (M, T')
        self.batch = max(1, TOKENS_PER_STEP // self.tokens.shape[1])
        self.fit = CalibratedFit(plan, tokens, measured)
        self.head: Any = None
        self.final: torch.Tensor | None = None  # what the original's last layer sends for the measured text, (M, T', D)
        self.resident: dict[int, LayerRunner] = {}
        self.keeps_layers = 4 * largest_layer(plan.source) * len(plan.layers) <= _RESIDENT_BYTES
        parts, sampled, share = len(list(self.fit.parts())), len(self.fit.sample), measured / self.batch
        units = profile_units(plan, missing, parts, sampled, share, self.fit.products)
        self.fit.work = self.bar = WorkBar("profiling", units, progress)

    def profile(self, layer: LayerPlan) -> dict[str, Any]:
        """Measure every candidate of the present layer."""
        fit, plan = self.fit, self.plan
        fit.compressed = fit.original.copy()
        statistics = fit.pass_original(layer.layer, with_statistics=plan.recipe.fit != "weights")
        sent = []  # what the layer sends for the measured text, one (M, T', D) for each candidate
        wanted = [(side, count) for side, counts in candidates(layer, plan).items() for count in counts]
        held, length = list(batches(fit.held_out, self.batch)), self.tokens.shape[1]
        for side, count in wanted:
            composed, _ = compose(plan, with_side(layer, side, count), statistics)
            check_finite(composed, layer.layer)
            if plan.recipe.fit == "aligned":
                composed, _ = fit.regress(layer.layer, composed, fit.sample)
            bias = plan.source.config.mea["bias"]
            runner = fit.runner_of(layer.layer, store_layer(composed, bias, plan.decisions.stored_dtype))
            sent.append(torch.cat([runner.run(fit.compressed[part][:, :length])[0].cpu() for part in held]))
        assert fit.following is not None
        original = torch.cat([fit.following[part][:, :length] for part in held])  # (M, T', D)
        if rounds(fit.products):
            noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(layer.layer))
            sent.insert(0, original * (1 + _NOISE * noise))
        behind = self._above(layer.layer, torch.stack([original, *sent] if self.final is None else sent))
        if self.final is None:
            self.final, behind = behind[0].clone(), behind[1:]
        if self.head is None:
            self.head = fit.head_runner()
        own, costs = compare_streams(self.head, self.tokens, self.final, behind)
        self.bar.add(comparison_units(plan, (1 + len(behind)) * len(self.tokens) / self.batch))
        if not all(isfinite(number) for numbers in costs for number in numbers):
            raise RequestError(
                "the model's logits are not all numbers, so no cost can be measured: look for NaN in its weights"
            )
        floor = costs.pop(0)[0] if rounds(fit.products) else 0.0
        points = [
            ProfilePoint(layer.layer, side, count, kl - floor, cross_entropy - own)
            for (side, count), (kl, cross_entropy) in zip(wanted, costs, strict=True)
        ]
        return {"floor": floor, "cross_entropy": own, "points": [asdict(point) for point in points]}

    def advance(self, layer: int) -> None:
        """Send the original's text through the present layer."""
        self.fit.compressed = self.fit.original
        self.fit.advance(layer, None)

    def _above(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the last layer sends where a layer sends (C, M, T', D)."""
        rows = hidden.flatten(0, 1)  # (C M, T', D)
        for above in range(layer + 1, len(self.plan.layers)):
            runner = self.resident.get(above) or self.fit.runner_of(above)
            if self.keeps_layers:
                self.resident[above] = runner
            for part in batches(len(rows), self.batch):
                rows[part] = runner.run(rows[part])[0].cpu()
                self.bar.add(len(rows[part]) / self.batch)
        self.resident.pop(layer, None)
        return rows.unflatten(0, hidden.shape[:2])


def profile(
    source: Path | str,
    *,
    out: Path | str | None = None,
    recipe: Recipe | Path | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Profile:
    """Measure what compressing one side of one layer costs, by width, on text that nothing was fitted to.

    Args:
        source: Checkpoint directory or hub id.
        out: JSON file for the result, which `budget` of a recipe takes. What is measured is kept beside it as it comes,
            and a run that was interrupted goes on there.
        recipe: A `Recipe`, a built-in recipe's name or a YAML file; None for the defaults. Methods, fit, layers and
            text count; how much to keep does not.
        progress: Show a bar on stderr.
        **settings: Fields of `Recipe` that win over it, such as ``text="calibration.txt"``.

    Raises:
        RequestError: The checkpoint is not usable, or there is too little text.
        KeyboardInterrupt: With a message that says how to go on, where something is kept.

    Example:
        >>> found = profile("SRC", text="held-out.txt", sequence_length=32, sequences=16, progress=False)
        >>> sorted({point.side for point in found.points})
        ['key', 'value']
    """
    unsaid = recipe is None or (isinstance(recipe, Recipe) and not recipe.says_how_much)
    share = {"kv_ratio": 0.5} if unsaid else {}  # costs do not depend on it
    wanted = make_recipe(recipe, settings | share | {"budget": "uniform", "heal": "0"})
    plan = plan_source(open_checkpoint(local_directory(source)), wanted)
    file = None if out is None else Path(out)
    kept, commit = None, Commit({})
    if file is not None:
        kept = file.with_name(f"{file.name}.partial")
        request = {
            "source": fingerprint(plan.source.reader, plan.source.raw_config),
            "recipe": to_yaml(plan.recipe),
            "text": text_state(plan.recipe.text) if plan.recipe.text else None,
            "measured": measured_on(plan),
        }
        commit = Commit(_kept_results(kept, request))
        commit.save = lambda layer, result: write_json(kept, {"request": request, "layers": commit.results})
    raise_trim_threshold()
    try:
        result = measure_profile(plan, calibration_tokens(plan, progress), commit, progress)
    except KeyboardInterrupt:
        if kept is None or not kept.exists():
            raise
        raise KeyboardInterrupt(
            f"interrupted; {printable_path(kept)} keeps what was measured: the same command goes on there"
        ) from None
    if file is not None and kept is not None:
        write_json(file, result.to_json())
        kept.unlink(missing_ok=True)
    return result


def _kept_results(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return what an interrupted run of the same request has measured, by layer."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return dict(data["layers"]) if data["request"] == request else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


__all__ = ["Commit", "Profile", "ProfilePoint", "divide_text", "measure_profile", "profile", "profile_in"]
