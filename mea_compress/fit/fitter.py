"""The fit that looks at text: statistics, closed forms, refinement, and on to the next layer with what was stored."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mea_compress.architectures import Source
from mea_compress.errors import RequestError
from mea_compress.fit.calibration import StatisticsAccumulator, check_tokens
from mea_compress.fit.closed_form import compose
from mea_compress.fit.refinement import Refiner, Settings
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import ComposedLayer
from mea_compress.layers.runner import Activations, LayerRunner, batches, embed
from mea_compress.layers.store import StoredLayer, store_layer
from mea_compress.plan.planning import LayerPlan, calibration_shape, refinement_steps, splits_itself
from mea_compress.recipe import Recipe
from mea_compress.text import (
    load_model,
    load_tokenizer,
    read_documents,
    resolve_device,
    sample_sequences,
    token_sequences,
)

_TOKENS_PER_STEP = 4096
_HELD_OUT = 64


class Fitter:
    """Fits the layers of a model in order, one decoder layer (and the next) in memory.

    Args:
        source: The checkpoint.
        recipe: Fit, refinement, seed, device.
        tokens: Calibration sequences, (N, T).
        progress: Show bars on stderr.

    Raises:
        RequestError: There are too few tokens for the statistics, or too few sequences to hold one out.
    """

    def __init__(self, source: Source, recipe: Recipe, tokens: torch.Tensor, progress: bool) -> None:
        self.source, self.recipe, self.progress = source, recipe, progress
        self.device = resolve_device(recipe.device)
        check_tokens(tokens, source.config.hidden_size)
        self.batch = max(1, _TOKENS_PER_STEP // tokens.shape[1])
        self.original = embed(source, tokens)
        self.compressed = self.original
        self.following: Activations | None = None
        # Sequences at the front are for choosing; no statistic and no step looks at them.
        self.steps = refinement_steps(source, recipe)
        if self.steps and len(tokens) < 2:
            raise RequestError(
                "refinement holds a calibration sequence out and there is only one; give --sequences 2 or more, a "
                "longer --text, a smaller --sequence-length, or --refine 0"
            )
        self.held_out = max(1, min(_HELD_OUT, len(tokens) // 4)) if self.steps else 0
        self.depth = source.config.num_hidden_layers
        self.runner = self._runner(0)

    def fit(self, layer: LayerPlan) -> tuple[ComposedLayer, dict[str, Any]]:
        """Statistics, closed form and refinement of the next layer; `advance` comes after it."""
        statistics = self._statistics(layer.layer)
        forms = [layer]
        if self.steps and splits_itself(self.recipe, layer.key_form, layer.value_form):
            forms += splits(layer, self.source.config.num_key_value_heads, self.source.head_dim)
        composed = [compose(self.source, form, statistics, self.recipe) for form in forms]
        for form, _ in composed:
            _check_finite(form, layer.layer)
        if not self.steps:
            return composed[0]
        settings = Settings(self.steps, self.batch, self.held_out)
        trials = len(settings.rates) + (len(forms) if len(forms) > 1 else 0)
        with self._bar(f"layer {layer.layer}: refining", settings.steps + trials * settings.trial_steps) as bar:
            seed = self.recipe.seed + layer.layer
            refiner = Refiner(self.compressed, self._targets(), settings, seed, bar.update)
            best = 0
            if len(forms) > 1:
                errors = [refiner.try_out(self._composed_runner(layer.layer, form)) for form, _ in composed]
                best = min(range(len(forms)), key=lambda index: errors[index])
            form, report = composed[best]
            refined = refiner.refine(form, self._composed_runner(layer.layer, form))
        fidelity = {"before": refined.before, "after": refined.after, "rate": refined.rate}
        return refined.layer, {**report, "refinement": fidelity}

    def advance(self, layer: int, stored: StoredLayer | None) -> None:
        """Sends the calibration text through a finished layer, as the original has it and as it was stored."""
        following = self._targets()
        if stored is not None and self.compressed is self.original:
            self.compressed = self.original.copy()
        if self.compressed is self.original:
            self.compressed = following
        else:
            own = self.runner if stored is None else self._runner(layer, stored)
            with self._bar(f"layer {layer}: passing on", self.compressed.shape[0]) as bar:
                for part in batches(self.compressed.shape[0], self.batch):
                    self.compressed[part] = own.run(self.compressed[part])[0].cpu()
                    bar.update(part.stop - part.start)
        self.original, self.following = following, None
        if layer + 1 < self.depth:
            self.runner = self._runner(layer + 1)

    def _targets(self) -> Activations:
        """What the original has behind the present layer, computed once."""
        if self.following is None:
            self.following = Activations(self.original.shape, torch.float32)
            for part in batches(self.original.shape[0], self.batch):
                self.following[part] = self.runner.run(self.original[part])[0].cpu()
        return self.following

    def _composed_runner(self, layer: int, composed: ComposedLayer) -> LayerRunner:
        return self._runner(layer, store_layer(composed, self.source.config.mea["bias"], "F32"))

    def _runner(self, layer: int, stored: StoredLayer | None = None) -> LayerRunner:
        return LayerRunner(self.source, layer, stored, device=self.device)

    def _bar(self, description: str, total: int) -> Any:
        return tqdm(total=total, desc=description, leave=False, disable=not self.progress)

    def _statistics(self, layer: int) -> LayerStatistics | None:
        if self.recipe.fit == "weights":
            return None
        seen = self.compressed if self.recipe.statistics == "sequential" else self.original
        accumulator = StatisticsAccumulator(self.runner.attention)
        with self._bar(f"layer {layer}: statistics", seen.shape[0] - self.held_out) as bar:
            for part in batches(seen.shape[0] - self.held_out, self.batch):
                own = slice(part.start + self.held_out, part.stop + self.held_out)
                accumulator.add(self.runner.run(seen[own])[1])
                bar.update(part.stop - part.start)
        return accumulator.finish()


def _check_finite(composed: ComposedLayer, layer: int) -> None:
    for side in (composed.key, composed.value):
        if not np.isfinite(side.reconstruct()).all():
            raise RequestError(
                f"layer {layer} cannot be composed from this text: a head came out as NaN; give other --text, or leave "
                "the layer out with --layers"
            )


def splits(layer: LayerPlan, heads: int, head_dim: int) -> list[LayerPlan]:
    """Other ways to divide the layer's components between keys and values: keys get 2/5 or 3/10 of them.

    Refined values repay width more than refined keys do, most of all in late layers; the even split stays the first
    candidate.
    """
    total = layer.key_components + layer.value_components
    fractional = layer.key_form.fractional
    step = 2 / head_dim if fractional else 1
    found: list[LayerPlan] = []
    for share in (0.4, 0.3):
        keys = max(1, round(total * share / step)) * step
        keys = keys if fractional else int(keys)
        known = [layer.key_components, *(form.key_components for form in found)]
        if keys not in known and total - keys <= heads:
            found.append(replace(layer, key_components=keys, value_components=total - keys))
    return found


def calibration_tokens(source: Source, recipe: Recipe, progress: bool) -> torch.Tensor:
    """Calibration sequences, (N, T): of the recipe's text, or sampled from the model itself.

    Raises:
        RequestError: There is too little text, or the model cannot be loaded to sample from.
    """
    directory = source.reader.directory
    count, length = calibration_shape(source, recipe)
    if recipe.text is not None:
        tokenizer = load_tokenizer(directory)
        return token_sequences(read_documents(recipe.text), tokenizer, length, limit=count)
    model = load_model(directory, device=recipe.device)
    try:  # as in all text: a family may begin none, whatever its configuration names
        bos = load_tokenizer(directory).bos_token_id
    except RequestError:
        bos = model.config.bos_token_id
    return sample_sequences(model, bos, count, length, recipe.seed, progress=progress).cpu()
