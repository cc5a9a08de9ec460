"""Sequential layer loop: fit a layer, save it, propagate the calibration activations through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from tqdm.auto import tqdm

from mea_compress.checkpoint import CheckpointReader, NewTensor, dtype_name, write_checkpoint
from mea_compress.checkpoint.system import trim_heap
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.emit.weights import layer_directory
from mea_compress.errors import RequestError
from mea_compress.fit.calibration import StatisticsAccumulator, check_tokens
from mea_compress.fit.closed_form import compose
from mea_compress.fit.refinement import Refiner, Settings
from mea_compress.heads.composed import Array
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import ComposedLayer
from mea_compress.layers.runner import Activations, LayerRunner, batches, embed
from mea_compress.layers.store import StoredLayer, store_layer
from mea_compress.loading import check_ids, load_model, load_tokenizer, resolve_device
from mea_compress.planning.sizes import TOKENS_PER_STEP
from mea_compress.planning.types import LayerPlan, LayerSpec, Plan
from mea_compress.text import read_documents, sample_sequences, token_sequences

_HELD_OUT = 64
# Shares of a layer's components that keys get where the split is searched, besides the even one. Refined values repay
# width more than refined keys do, most of all in late layers.
_KEY_SHARES = (0.4, 0.3)


@contextmanager
def reserve_one_blas_thread() -> Iterator[None]:
    """Leave a processor to a thread that copies: where one of NumPy's does not run, all others wait for it."""
    pools = ThreadpoolController().select(user_api="blas")
    threads = max((pool.num_threads for pool in pools.lib_controllers), default=1)
    with pools.limit(limits=max(1, threads - 1)):
        yield


def fit_layers(
    plan: Plan, workspace: Workspace, progress: bool, stored: Callable[[int], object] = lambda layer: None
) -> None:
    """Fit every layer that is to be compressed, and store its tensors in a directory of its own.

    Args:
        plan: What to do.
        workspace: Where to, and what is finished.
        progress: Show bars on stderr.
        stored: Called with the number of each layer whose tensors have been stored.

    Raises:
        RequestError: As `compose`, `store_layer`, `calibration_tokens` and `CalibratedFit`.
    """
    calibrated: CalibratedFit | None = None
    unfinished = [
        layer.layer
        for layer in plan.layers
        if layer.compressed and workspace.result_of("layers", str(layer.layer)) is None
    ]
    if unfinished and plan.decisions.needs_calibration:
        calibrated = CalibratedFit(plan, _stored_tokens(plan, workspace, progress), progress)
    for layer in tqdm(plan.layers, desc="fitting layers", unit="layer", disable=not progress):
        if layer.layer > max(unfinished, default=-1):
            continue
        stored_layer, directory = None, layer_directory(workspace, layer.layer)
        if layer.layer in unfinished:
            composed, fidelity = calibrated.fit(layer) if calibrated else compose(plan, layer, None)
            stored_layer = store_layer(composed, plan.source.config.mea["bias"], plan.decisions.stored_dtype)
            entries = [_entry(name, array) for name, array in stored_layer.tensors.items()]
            write_checkpoint(directory, entries, durable=False)
            workspace.commit_later(str(layer.layer), directory, fidelity=fidelity, layers=stored_layer.section)
            stored(layer.layer)
            del composed
            if calibrated:
                trim_heap()
        elif calibrated and layer.compressed:
            reader = CheckpointReader(directory)
            section = workspace.result_of("layers", str(layer.layer))
            stored_layer = StoredLayer(section, {name: reader.read_array(name) for name in reader.tensors})
        if calibrated and layer.layer < unfinished[-1]:
            calibrated.advance(layer.layer, stored_layer)


class CalibratedFit:
    """Fit the layers of a model in order, one decoder layer (and the next) in memory.

    Args:
        plan: What to do.
        tokens: Calibration sequences, (N, T), int64.
        progress: Show bars on stderr.

    Raises:
        RequestError: There are too few tokens for the statistics, or too few sequences to hold one out.
    """

    def __init__(self, plan: Plan, tokens: torch.Tensor, progress: bool) -> None:
        self.plan, self.progress = plan, progress
        self.device = resolve_device(plan.recipe.device)
        check_tokens(tokens, plan.source.config.hidden_size)
        self.batch = max(1, TOKENS_PER_STEP // tokens.shape[1])
        self.original = embed(plan.source, tokens)
        self.compressed = self.original
        self.following: Activations | None = None
        # Sequences at the front are for choosing; no statistic and no step looks at them.
        self.steps = plan.decisions.refinement_steps
        if self.steps and len(tokens) < 2:
            raise RequestError(
                "refinement holds a calibration sequence out and there is only one; give --sequences 2 or more, a "
                "longer --text, a smaller --sequence-length, or --refine 0"
            )
        self.held_out = max(1, min(_HELD_OUT, len(tokens) // 4)) if self.steps else 0
        self.runner = self._runner(0)

    def fit(self, layer: LayerPlan) -> tuple[ComposedLayer, dict[str, Any]]:
        """Take the next layer's statistics, fit its closed form and refine it; `advance` comes after it.

        Returns:
            The layer, and what is reported of it.
        """
        statistics = self._statistics(layer.layer)
        candidates = [layer]
        if self.plan.decisions.searches_kv_split:
            candidates += kv_split_candidates(layer, self.plan)
        fits = [compose(self.plan, candidate, statistics) for candidate in candidates]
        for composed, _ in fits:
            _check_finite(composed, layer.layer)
        if not self.steps:
            return fits[0]
        settings = Settings(self.steps, self.batch, self.held_out)
        trials = len(settings.rates) + (len(fits) if len(fits) > 1 else 0)
        with self._bar(f"layer {layer.layer}: refining", settings.steps + trials * settings.trial_steps) as bar:
            seed = self.plan.recipe.seed + layer.layer
            refiner = Refiner(self.compressed, self._targets(), settings, seed, bar.update)
            best = 0
            if len(fits) > 1:
                errors = [refiner.try_out(self._composed_runner(layer.layer, composed)) for composed, _ in fits]
                best = min(range(len(fits)), key=lambda index: errors[index])
            composed, report = fits[best]
            refined = refiner.refine(composed, self._composed_runner(layer.layer, composed))
        fidelity = {"before": refined.before, "after": refined.after, "rate": refined.rate}
        return refined.layer, {**report, "refinement": fidelity}

    def advance(self, layer: int, stored: StoredLayer | None) -> None:
        """Send the calibration text through a finished layer, as the original has it and as it was stored."""
        following = self._targets()
        if stored is not None and self.compressed is self.original:
            self.compressed = self.original.copy()
        if self.compressed is self.original:
            self.compressed = following
        else:
            runner = self.runner if stored is None else self._runner(layer, stored)
            with self._bar(f"layer {layer}: passing on", self.compressed.shape[0]) as bar:
                for part in batches(self.compressed.shape[0], self.batch):
                    self.compressed[part] = runner.run(self.compressed[part])[0].cpu()
                    bar.update(part.stop - part.start)
        self.original, self.following = following, None
        if layer + 1 < len(self.plan.layers):
            self.runner = self._runner(layer + 1)

    def _targets(self) -> Activations:
        """Return what the original has behind the present layer, computed once."""
        if self.following is None:
            self.following = Activations(self.original.shape, torch.float32)
            for part in batches(self.original.shape[0], self.batch):
                self.following[part] = self.runner.run(self.original[part])[0].cpu()
        return self.following

    def _composed_runner(self, layer: int, composed: ComposedLayer) -> LayerRunner:
        return self._runner(layer, store_layer(composed, self.plan.source.config.mea["bias"], "F32"))

    def _runner(self, layer: int, stored: StoredLayer | None = None) -> LayerRunner:
        return LayerRunner(self.plan.source, layer, stored, device=self.device)

    def _bar(self, description: str, total: int) -> tqdm:
        return tqdm(total=total, desc=description, leave=False, disable=not self.progress)

    def _statistics(self, layer: int) -> LayerStatistics | None:
        if self.plan.recipe.fit == "weights":
            return None
        inputs = self.compressed if self.plan.recipe.statistics == "sequential" else self.original
        accumulator = StatisticsAccumulator(self.runner.attention)
        with self._bar(f"layer {layer}: statistics", inputs.shape[0] - self.held_out) as bar:
            for part in batches(inputs.shape[0] - self.held_out, self.batch):
                shifted = slice(part.start + self.held_out, part.stop + self.held_out)
                accumulator.add(self.runner.run(inputs[shifted])[1])
                bar.update(part.stop - part.start)
        return accumulator.finish()


def kv_split_candidates(layer: LayerPlan, plan: Plan) -> list[LayerPlan]:
    """Return other ways to divide the layer's components between keys and values; the even split is the layer's own."""
    key, value = layer.spec.key, layer.spec.value
    total = key.components + value.components
    fractional = key.form.fractional
    step = 2 / plan.source.head_dim if fractional else 1
    tried, candidates = {key.components}, []
    for share in _KEY_SHARES:
        count = max(1, round(total * share / step)) * step
        keys = count if fractional else int(count)
        if keys not in tried and total - keys <= plan.source.config.num_key_value_heads:
            tried.add(keys)
            spec = LayerSpec(replace(key, components=keys), replace(value, components=total - keys))
            candidates.append(replace(layer, spec=spec))
    return candidates


def calibration_tokens(plan: Plan, progress: bool) -> torch.Tensor:
    """Return the calibration sequences, (N, T), int64: of the recipe's text, or sampled from the model itself.

    Raises:
        RequestError: There is too little text, or the model cannot be loaded to sample from.
    """
    directory, recipe = plan.source.reader.directory, plan.recipe
    count, length = plan.decisions.sequences, plan.decisions.sequence_length
    if recipe.text is not None:
        tokenizer = load_tokenizer(directory)
        tokens = token_sequences(read_documents(recipe.text), tokenizer, length, limit=count)
        check_ids(tokens, plan.source.config.vocab_size, directory)
        return tokens
    model = load_model(directory, device=recipe.device)
    try:  # as in all text: a family may begin none, whatever its configuration names
        bos = load_tokenizer(directory).bos_token_id
    except RequestError:
        bos = model.config.bos_token_id
    return sample_sequences(model, bos, count, length, recipe.seed, progress=progress).cpu()


def _stored_tokens(plan: Plan, workspace: Workspace, progress: bool) -> torch.Tensor:
    """Return the calibration sequences, (N, T), kept in the workspace so that a resumed run has the same."""
    directory = workspace.work / "calibration"
    if not workspace.result_of("calibration", "tokens"):
        tokens = calibration_tokens(plan, progress)
        write_checkpoint(directory, [_entry("tokens", tokens.numpy())])
        workspace.commit("calibration", "tokens", list(tokens.shape))
    return CheckpointReader(directory).read("tokens")


def _check_finite(composed: ComposedLayer, layer: int) -> None:
    for side in (composed.key, composed.value):
        if not np.isfinite(side.reconstruct()).all():
            raise RequestError(
                f"layer {layer} cannot be composed from this text: a head came out as NaN; give other --text, or leave "
                "the layer out with --layers"
            )


def _entry(name: str, array: Array) -> NewTensor:
    return NewTensor(name, dtype_name(array.dtype), array.shape, lambda: array)
