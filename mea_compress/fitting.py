"""Fits layer after layer: statistics, closed form, refinement, and on to the next with what was stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from mea_compress.architectures import Source
from mea_compress.calibration import LayerStatistics, StatisticsAccumulator, check_tokens
from mea_compress.checkpoint import CheckpointReader, NewTensor, dtype_name, torch_dtype, write_checkpoint
from mea_compress.compositions import COMPOSITIONS, Request
from mea_compress.compositions.groups import cluster, compose_groups
from mea_compress.errors import RequestError
from mea_compress.heads import AttentionHeads, ComposedLayer, StoredLayer, read_composed, read_heads, store_layer
from mea_compress.memory import release
from mea_compress.modeling.section_mea import FRACTIONAL
from mea_compress.plan import (
    LayerPlan,
    Plan,
    calibration_shape,
    needs_text,
    needs_whole_layer,
    refinement_steps,
    splits_itself,
)
from mea_compress.recipe import Recipe
from mea_compress.refinement import Refiner, Settings
from mea_compress.streaming import Activations, LayerRunner, batches, embed
from mea_compress.text import (
    load_model,
    load_tokenizer,
    read_documents,
    resolve_device,
    sample_sequences,
    token_sequences,
)
from mea_compress.weights import layer_directory
from mea_compress.workspace import Workspace

_TOKENS_PER_STEP = 4096
_HELD_OUT = 64


@contextmanager
def one_thread_less() -> Iterator[None]:
    """Leaves a processor to a thread that copies: where one of PyTorch's does not run, all others wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_layers(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    workspace: Workspace,
    progress: bool,
    stored: Callable[[int], object] = lambda layer: None,
) -> None:
    """Fits every chosen layer and stores its tensors in a directory of its own.

    Args:
        source: The checkpoint.
        plan: What to do to every layer.
        recipe: How.
        workspace: Where to, and what is finished.
        progress: Show bars on stderr.
        stored: Called with the number of each layer whose tensors have been stored.

    Raises:
        RequestError: As `compose`, `calibration_tokens` and `Fitter`.
    """
    dtype = torch_dtype(source.dtype) if recipe.dtype is None else getattr(torch, recipe.dtype)
    fitter = None
    unfinished = [
        layer.layer
        for layer in plan.layers
        if layer.compressed and workspace.finished("layers", str(layer.layer)) is None
    ]
    if unfinished and needs_text(source, recipe):
        fitter = Fitter(source, recipe, _tokens(source, recipe, workspace, progress), progress)
    for layer in tqdm(plan.layers, desc="fitting layers", unit="layer", disable=not progress):
        if layer.layer > max(unfinished, default=-1):
            continue
        made, directory = None, layer_directory(workspace, layer.layer)
        if layer.layer in unfinished:
            composed, fidelity = fitter.fit(layer) if fitter else compose(source, layer, None, recipe)
            made = store_layer(composed, source.config.mea["bias"], dtype)
            write_checkpoint(directory, [_entry(name, tensor) for name, tensor in made.tensors.items()], durable=False)
            workspace.note(str(layer.layer), directory, fidelity=fidelity, layers=made.section)
            stored(layer.layer)
            del composed
            if fitter:
                release()
        elif fitter and layer.compressed:
            reader = CheckpointReader(directory)
            section = workspace.finished("layers", str(layer.layer))
            made = StoredLayer(section, {name: reader.read(name) for name in reader.tensors})
        if fitter and layer.layer < unfinished[-1]:
            fitter.advance(layer.layer, made)


def _tokens(source: Source, recipe: Recipe, workspace: Workspace, progress: bool) -> torch.Tensor:
    """Calibration sequences, kept in the workspace so that a resumed run has the same."""
    directory = workspace.work / "calibration"
    if not workspace.finished("calibration", "tokens"):
        tokens = calibration_tokens(source, recipe, progress)
        write_checkpoint(directory, [_entry("tokens", tokens)])
        workspace.record("calibration", "tokens", list(tokens.shape))
    return CheckpointReader(directory).read("tokens")


def _entry(name: str, tensor: torch.Tensor) -> NewTensor:
    tensor = tensor.contiguous()
    return NewTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), lambda: tensor)


def compose(
    source: Source, layer: LayerPlan, statistics: LayerStatistics | None, recipe: Recipe
) -> tuple[ComposedLayer, dict[str, float]]:
    """The closed form of one layer.

    Args:
        source: The checkpoint.
        layer: What the plan says of the layer.
        statistics: Of its inputs; None with the ``weights`` fit.
        recipe: Fit and what else compositions are asked.

    Returns:
        The composed layer, and for each side the share of the heads' squared weights that is lost.

    Raises:
        RequestError: A weight is not finite, or the composition cannot do what is asked.
    """
    # Weights alone never change what is not keys or values, so queries and output need not be in memory.
    grouped = recipe.kv_groups > 1
    heads = original = read_heads(source, layer.layer, whole=needs_whole_layer(recipe, layer))
    if grouped:
        heads, statistics = cluster(heads, statistics, recipe.fit, recipe.kv_groups)
    sides = {}
    spec = source.config.mea["layers"][layer.layer]
    for side in ("key", "value"):
        kind = getattr(layer, f"{side}_composition")
        if (kind, getattr(layer, f"{side}_components")) == (spec[f"{side}_composition"], spec[f"{side}_components"]):
            continue
        fitter = getattr(COMPOSITIONS[kind], f"{side}s")
        other = layer.value_components if side == "key" else layer.key_components
        own = getattr(layer, f"{side}_components")
        request = Request(own, recipe.fit, recipe.rotary_budget, recipe.prune_by, other)
        if grouped:
            sides[side], heads = compose_groups(fitter, heads, statistics, request, recipe.kv_groups)
        else:
            sides[side], heads = fitter(heads, statistics, request)
    for side in {"key", "value"} - set(sides):
        kept = read_composed(source, layer.layer, side)
        if kept.kind == "none":  # heads may have come into another order
            kept = replace(kept, projection=getattr(heads, side).flatten(0, 1))
        sides[side] = kept
    composed = ComposedLayer(
        sides["key"],
        sides["value"],
        query=None if heads.query is original.query else heads.query,
        output=None if heads.output is original.output else heads.output,
        head_norm=None if heads.head_norm is original.head_norm else heads.head_norm,
    )
    lost = {f"{side}_relative_error": _lost(heads, sides[side], side) for side in ("key", "value")}
    return composed, {name: value for name, value in lost.items() if value is not None}


def _lost(heads: AttentionHeads, composed: Any, side: str) -> float | None:
    target = getattr(heads, side)
    if composed.kind == "pool":  # the heads' own factors went into q_proj or o_proj
        return None
    if composed.kind in ("head", "prune", "share"):  # inner products of heads and components tell
        rows = target.flatten(1)
        components = composed.projection.reshape(-1, rows.shape[1])
        whole = float(torch.linalg.vector_norm(rows)) ** 2
        found = composed.weight.T  # (H, C)
        gained = (rows @ components.T * found).sum() - ((found @ (components @ components.T)) * found).sum() / 2
        return max(0.0, whole - 2 * float(gained)) / max(whole, 1e-300)
    lost = whole = 0.0
    for wanted, found in zip(target, composed.each_head(), strict=True):
        if composed.kind == "frequency" and heads.key_norm is not None:  # lanes compose weighted keys
            found = found / heads.key_norm[:, None]
        lost += float((wanted - found).square_().sum())
        whole += float(wanted.square().sum())
    return lost / max(whole, 1e-300)


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
        if self.steps and splits_itself(self.recipe, layer.key_composition, layer.value_composition):
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
        return self._runner(layer, store_layer(composed, self.source.config.mea["bias"], torch.float32))

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
        if not torch.isfinite(side.composed_heads()).all():
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
    fractional = layer.key_composition in FRACTIONAL
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
