"""Sequential layer loop: fit a layer, save it, propagate the calibration activations through it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from tqdm.auto import tqdm

from mea_compress.architectures import Checkpoint
from mea_compress.checkpoint import CheckpointReader, NewTensor, as_array, dtype_name, torch_dtype, write_checkpoint
from mea_compress.checkpoint.system import trim_heap
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.emit.directory import fingerprint, versions
from mea_compress.emit.weights import layer_directory
from mea_compress.errors import RequestError
from mea_compress.fit.calibration import StatisticsAccumulator, check_tokens
from mea_compress.fit.closed_form import compose
from mea_compress.fit.comparison import compare_streams
from mea_compress.fit.observation import CacheAccumulator, CacheStatistics
from mea_compress.fit.progress import (
    ATTENTION,
    MLP,
    STATISTICS,
    STEP,
    TRIAL_TOKENS,
    FitProgress,
    Work,
    measured_count,
    measured_window,
    score_units,
    solution_units,
)
from mea_compress.fit.refinement import Refined, Refiner, Settings
from mea_compress.fit.regression import OutputRegression
from mea_compress.fit.scores import OriginalScores, ScoreRegression
from mea_compress.fit.sharing import Share
from mea_compress.fit.split import kv_split_candidates
from mea_compress.heads.composed import Array, split_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import ComposedLayer
from mea_compress.layers.blocks import BlockHeadRunner, BlockRunner, embed_tokens
from mea_compress.layers.output_map import OutputMap, find_output_map
from mea_compress.layers.read import read_projection
from mea_compress.layers.runner import Activations, HeadRunner, LayerRunner, batches, embed, fast_products
from mea_compress.layers.store import StoredLayer, store_layer
from mea_compress.layers.stream import stream_size
from mea_compress.loading import check_ids, load_model, load_tokenizer, resolve_device
from mea_compress.planning.sizes import TOKENS_PER_STEP, fits_scores, healing_batch, scored_sequences
from mea_compress.planning.types import LayerPlan, Plan
from mea_compress.processes import add_up, from_first_process, is_first_process, process_count
from mea_compress.text.kept_samples import kept_samples
from mea_compress.text.reading import read_documents
from mea_compress.text.sampling import sample_sequences
from mea_compress.text.sequences import token_sequences

# Sequences, and tokens, that are held out to choose by.
_HELD_OUT, _HELD_OUT_TOKENS = 64, 1 << 14
_ORIGINS = "origins"


@contextmanager
def reserve_one_blas_thread() -> Iterator[None]:
    """Leave a processor to a thread that copies: where one of NumPy's does not run, all others wait for it."""
    pools = ThreadpoolController().select(user_api="blas")
    threads = max((pool.num_threads for pool in pools.lib_controllers), default=1)
    with pools.limit(limits=max(1, threads - 1)):
        yield


def fit_layers(
    plan: Plan,
    workspace: Workspace,
    progress: bool,
    stored: Callable[[int], object] = lambda layer: None,
    deadline: float | None = None,
) -> None:
    """Fit every layer that is to be compressed, and store its tensors in a directory of its own.

    Several processes share the calibration sequences, all fit every layer, and the first one stores it.

    Args:
        plan: What to do.
        workspace: Where to, and what is finished.
        progress: Show bars on stderr.
        deadline: See `deadline_of`.
        stored: Called with the number of each layer whose tensors have been stored.

    Raises:
        RequestError: As `compose`, `store_layer`, `calibration_tokens` and `CalibratedFit`.
    """
    calibrated: CalibratedFit | None = None
    work: FitProgress | None = None
    unfinished = [
        layer.layer
        for layer in plan.layers
        if layer.compressed and workspace.result_of("layers", str(layer.layer)) is None
    ]
    calibrates = plan.decisions.needs_calibration
    measures = calibrates and plan.profile is not None and workspace.result_of("budget", "kl") is None
    if measures and not unfinished:  # interrupted while the whole was measured
        unfinished = [layer.layer for layer in plan.layers if layer.compressed][-1:]
    if unfinished and calibrates:
        tokens = shared_tokens(plan, workspace, progress)[: plan.decisions.sequences]
        held_out = choosing_sequences(plan, tokens)
        share = Share.own(len(tokens), held_out)
        calibrated = CalibratedFit(plan, tokens, held_out, share)
        steps = Settings(calibrated.steps, calibrated.batch, held_out).all_steps
        if calibrated.steps and plan.decisions.searches_kv_split:
            ways = 1 + len(kv_split_candidates(next(layer for layer in plan.layers if layer.compressed), plan))
            steps += ways * calibrated.split_trial.steps
        parts, sampled = len(list(calibrated.parts())), len(calibrated.sample)
        calibrated.work = work = FitProgress(plan, parts, sampled, steps, len(unfinished), deadline, progress)
    own_bar = calibrated is not None or not progress
    with nullcontext() if work is None else closing(work):  # so that what goes wrong is said below the bar
        for layer in tqdm(plan.layers, desc="fitting layers", unit="layer", disable=own_bar):
            if layer.layer > max(unfinished, default=-1):
                continue
            stored_layer, directory = None, layer_directory(workspace, layer.layer)
            if layer.layer in unfinished:
                composed, fidelity = calibrated.fit(layer) if calibrated else compose(plan, layer, None)
                stored_layer = store_layer(composed, plan.source.config.mea["bias"], plan.decisions.stored_dtype)
                entries = [_entry(name, array) for name, array in stored_layer.tensors.items()]
                if is_first_process():
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
        if calibrated and measures and stored_layer is not None:
            kl = calibrated.measure(unfinished[-1], stored_layer, measured_tokens(plan, tokens))
            workspace.commit("budget", "kl", kl)


class CalibratedFit:
    """Fit the layers of a model in order, one decoder layer (and the next) in memory.

    Args:
        plan: What to do.
        tokens: Calibration sequences, (N, T), int64, of all processes.
        held_out: Sequences at the front that are for choosing; no statistic and no step looks at them.
        share: Which of them this process has; all without.

    Attributes:
        held_out: Of this process's sequences, those at the front that are for choosing.
        work: Is told what goes on and how much is done.
        original: This process's text as the original has it, (N, T, D): before the present layer, behind its
            attention once `pass_original` was called.
        compressed: The text as the compressed layers send it into the present layer, (N, T, D).
        following: The text behind the present layer of the original, once it was run.

    Raises:
        RequestError: There are too few tokens for the statistics, or too few sequences for so many processes.
    """

    def __init__(self, plan: Plan, tokens: torch.Tensor, held_out: int, share: Share | None = None) -> None:
        self.share = share or Share.whole(len(tokens), held_out)
        self.plan, self.held_out, self.work = plan, self.share.place(held_out), Work()
        self.device = resolve_device(plan.recipe.device)
        self.products = fast_products(torch_dtype(plan.source.dtype), self.device)
        check_tokens(tokens, plan.source.config.hidden_size)
        if self.share.is_part and len(tokens) - held_out < process_count():
            raise RequestError(
                f"there are {len(tokens) - held_out} calibration sequences beside those held out and {process_count()} "
                "processes: give more `sequences`, or start fewer processes"
            )
        self.batch = max(1, TOKENS_PER_STEP // tokens.shape[1])
        own = tokens[self.share.index]
        self.original = (embed_tokens if plan.source.at_cache else embed)(plan.source, own)
        self.compressed = self.original
        self.following: Activations | None = None
        # What o_proj reads in the finished layer, where it was computed.
        self.mixed: Activations | None = None
        self._outputs: dict[int, OutputMap | str] = {}
        self.steps = plan.decisions.refinement_steps
        rates, trial = Settings.rates[-1:], Settings.trial_steps
        self.split_trial = Settings(min(trial, self.steps), self.batch, self.share.held_out, rates)
        self.runner = self.runner_of(0)
        every = [*batches(held_out, self.batch), *batches(len(tokens), self.batch, held_out)]
        self.sampled_from = every[-max(1, TRIAL_TOKENS // (self.batch * tokens.shape[1])) :][0].start
        self.sample = self.share.reaching(list(self.parts()), self.sampled_from)

    def fit(self, layer: LayerPlan) -> tuple[ComposedLayer, dict[str, Any]]:
        """Take the next layer's statistics, fit its closed form and refine it; `advance` comes after it.

        Returns:
            The layer, and what is reported of it.
        """
        self.work.begin_fit()
        if self.compressed is self.original:
            self.compressed = self.original.copy()
        scores = self._scores_of(layer)
        statistics = self.pass_original(layer.layer, self.plan.recipe.fit != "weights", scores)
        candidates = [layer]
        if self.plan.decisions.searches_kv_split and statistics is not None:
            candidates += kv_split_candidates(layer, self.plan)
        fits = [compose(self.plan, candidate, statistics) for candidate in candidates]
        for composed, _ in fits:
            check_finite(composed, layer.layer)
        composed, report = self._agreed(self._best_split(layer.layer, fits))
        if scores is not None:
            composed = self._agreed(self.regress_scores(layer.layer, composed, scores))
        if self.plan.recipe.fit == "aligned":
            composed, error = self._agreed(self.regress(layer.layer, composed))
            report = {**report, "attention_relative_error": error}
            if composed.block is not None:
                report["output_projection"] = self._output_report(layer.layer, composed)
        settings = Settings(self.steps, self.batch, self.share.held_out)
        steps = self._agreed(self.work.steps_allowed(self.steps, settings.all_steps - settings.steps))
        if not steps:
            return composed, report
        self.work.say(layer.layer, "refining")
        refined = self._agreed(self._refine(layer.layer, composed, replace(settings, steps=steps)))
        self.mixed = None
        fidelity = {"before": refined.before, "after": refined.after, "rate": refined.rate}
        return refined.layer, {**report, "refinement": fidelity}

    def _best_split(
        self, layer: int, fits: list[tuple[ComposedLayer, dict[str, Any]]]
    ) -> tuple[ComposedLayer, dict[str, Any]]:
        """Return the fit whose keys and values divide the layer's budget best.

        That is the one with the least error once o_proj is fitted again, or, where refinement follows, after a few of
        its steps: values gain more of them than keys do.
        """
        if len(fits) == 1:
            return fits[0]
        regressed = [self.regress(layer, composed, self.sample) for composed, _ in fits]
        errors = [error for _, error in regressed]
        if self._agreed(self.work.steps_allowed(self.steps, len(fits) * self.split_trial.steps)):
            self.work.say(layer, "dividing the budget")
            errors = [self._refine(layer, composed, self.split_trial).after for composed, _ in regressed]
        return fits[min(range(len(fits)), key=errors.__getitem__)]

    def _refine(self, layer: int, composed: ComposedLayer, settings: Settings) -> Refined:
        """Refine a layer on what the already compressed ones send it."""
        seed = self.plan.recipe.seed + layer
        runner = self.runner_of(layer, self._stored(composed, "F32"))
        refiner = Refiner(
            self.compressed, self.original, settings, seed, lambda done: self.work.add(STEP * done), self.share
        )
        return refiner.refine(composed, runner)

    def _agreed(self, result: Any) -> Any:
        """Return what the first of the processes that share the text has found, to the last bit."""
        return from_first_process(result) if self.share.is_part else result

    def advance(self, layer: int, stored: StoredLayer | None) -> None:
        """Send the calibration text through a finished layer, as the original has it and as it was stored."""
        unchanged = self.compressed is self.original and stored is None
        if self.compressed is self.original and stored is not None:
            self.compressed = self.original.copy()
        following = self._targets()
        if unchanged:
            self.compressed = following
        else:
            runner = self.runner if stored is None else self.runner_of(layer, stored)
            self.work.say(layer, "passing on")
            for part in self.parts():
                self.compressed[part] = self._passed(runner, part)
                self.work.add(MLP if self.mixed is not None else MLP + ATTENTION)
        self.original, self.following, self.mixed = following, None, None
        self.work.finish_layer()
        if layer + 1 < len(self.plan.layers):
            self.runner = self.runner_of(layer + 1)

    def measure(self, layer: int, stored: StoredLayer, tokens: torch.Tensor) -> float:
        """Return KL(original ‖ compressed) in nats per token on sequences that nothing was fitted to.

        Args:
            layer: The last layer that is compressed; it was fitted, and not advanced over.
            stored: The layer as it was stored.
            tokens: The first of the calibration sequences, of those that were held out, or the beginning of each of
                them: (M, T').
        """
        measured, length = tokens.shape
        part = self.share.between(0, measured)
        tokens = tokens[self.share.index[part]]
        self.work.say(layer, "measuring")
        original = self._targets()[part][:, :length]
        compressed = self.runner_of(layer, stored).run(self.compressed[part][:, :length])[0].cpu()
        for above in range(layer + 1, len(self.plan.layers)):
            runner = self.runner_of(above)
            original, compressed = (runner.run(stream)[0].cpu() for stream in (original, compressed))
        head = self.head_runner()
        if not self.share.is_part:
            return compare_streams(head, tokens, original, compressed[None])[1][0][0]
        total = compare_streams(head, tokens, original, compressed[None])[1][0][0] * len(tokens) if len(tokens) else 0.0
        return float(add_up(torch.tensor(total, dtype=torch.float64))) / measured

    def _passed(self, runner: LayerRunner, part: slice) -> torch.Tensor:
        """Return what a finished layer makes of a part of the compressed stream."""
        if self.mixed is None:
            return runner.run(self.compressed[part])[0]
        return runner.finish(self.compressed[part], runner.output_of(self.mixed[part]))

    def _targets(self) -> Activations:
        """Return what the original has behind the present layer, computed once."""
        if self.following is None:
            self.pass_original(None, with_statistics=False)
        assert self.following is not None
        return self.following

    def _accumulator(self, layer: int) -> StatisticsAccumulator | CacheAccumulator:
        """Return what takes the statistics of a layer."""
        geometry = self.plan.source.geometry(layer)
        if isinstance(self.runner, BlockRunner):
            assert geometry is not None
            return CacheAccumulator(geometry, self.runner, self.plan.recipe.fit == "aligned")
        return StatisticsAccumulator(self.runner.attention, self.products)

    def _scores_of(self, layer: LayerPlan) -> OriginalScores | None:
        """Return what is to take the scores of the original's queries, None where q_proj is not fitted to them."""
        if not fits_scores(self.plan.source, self.plan.recipe, layer):
            return None
        wanted = scored_sequences(self.plan.source, self.original.shape[1])
        return OriginalScores(ceil(wanted / process_count()) if self.share.is_part else wanted)

    def pass_original(
        self, layer: int | None, with_statistics: bool, scores: OriginalScores | None = None
    ) -> LayerStatistics | CacheStatistics | None:
        """Run the original layer once over the text, and keep everything that is wanted of it.

        Afterwards `following` is the stream behind the layer, and `original` that behind its attention.

        Args:
            layer: Its number; None for a layer of which nothing is wanted.
            with_statistics: Take its statistics.
            scores: Gets what makes the scores of sampled queries.

        Returns:
            The layer's statistics, where they are asked for.
        """
        sequential = self.plan.recipe.statistics == "sequential"
        accumulator = self._accumulator(layer) if with_statistics and layer is not None else None
        self.following = Activations(self.original.shape, torch.float32)
        if layer is not None:
            self.work.say(layer, "statistics" if accumulator else "targets")
        for part in self.parts():
            hidden = self.original[part]
            behind, captured = self.runner.run(hidden)
            if accumulator and part.start >= self.held_out:
                if isinstance(accumulator, CacheAccumulator):
                    accumulator.observe(self.compressed[part] if sequential else hidden)
                elif sequential:
                    accumulator.add(self.runner.attend(self.compressed[part]))
                    if scores is not None and scores.wants_more:  # which are the original's
                        StatisticsAccumulator(self.runner.attention, self.products).add(captured, scores)
                else:
                    accumulator.add(captured, scores)
            self.following[part] = behind
            self.original[part] = hidden.to(captured.outputs.device) + captured.outputs
            self.work.add(1.0 + (STATISTICS if accumulator else 0.0))
        if accumulator and self.share.is_part:
            accumulator.add_processes()
        return accumulator.finish() if accumulator else None

    def regress(
        self, layer: int, composed: ComposedLayer, sample: Sequence[slice] | None = None
    ) -> tuple[ComposedLayer, float]:
        """Fit o_proj again to what the composed layer's attention really sends.

        Args:
            layer: Its number.
            composed: The layer.
            sample: Batches to look at; without them all of the text, and what o_proj reads is kept in `mixed`.

        Returns:
            The layer, and the squared error that is left of its attention's output; see `OutputRegression.solve`.
        """
        runner = self.runner_of(layer, self._stored(composed))
        output = None if composed.block is None else self.output_map(layer)
        if isinstance(output, str):
            return composed, self._remaining_error(runner, layer, sample)
        if output is None:
            weight, bias = runner.attention.o_proj.weight, runner.attention.o_proj.bias
        else:
            weight, bias = output.weight(runner.attention), runner.attention.get_submodule(output.name).bias
        regression = OutputRegression(weight.shape[1], weight.shape[0])
        if sample is None and output is None:
            self.mixed = Activations((*self.original.shape[:2], weight.shape[1]), self.products)
        self.work.say(layer, "regression" if sample is None else "dividing the budget")
        first = max(self.share.held_out, 0 if sample is None else self.sampled_from)
        for part in self.parts() if sample is None else sample:
            hidden = self.compressed[part]
            mixed = runner.attend(hidden).mixed if output is None else output.read(runner, hidden)
            if sample is None and self.mixed is not None:
                self.mixed[part] = mixed
            if part.start >= self.held_out:
                wanted, given = (stream[part].to(mixed.device) for stream in (self.original, self.compressed))
                missing = wanted - given if bias is None else wanted - given - bias
                turns = self.share.index[part] - first if self.share.is_part else None
                regression.add(mixed, missing, stream_size(wanted, given), turns)
            self.work.add(ATTENTION)
        if self.share.is_part:
            regression.add_processes()
        old = as_array(weight).astype(np.float64)
        fitted, error = regression.solve(old)
        self.work.add(solution_units(self.plan))
        if output is not None:
            if fitted is old:
                return composed, error
            stored = np.ascontiguousarray(fitted.T) if output.transposed else fitted
            return replace(composed, refitted={f"{output.name}.weight": stored}), error
        heads = fitted.reshape(len(fitted), -1, self.plan.source.head_dim).swapaxes(0, 1).copy()
        return replace(composed, output=heads), error

    def regress_scores(self, layer: int, composed: ComposedLayer, scores: OriginalScores) -> ComposedLayer:
        """Fit q_proj again, to the scores that the original's queries give.

        Args:
            layer: Its number.
            composed: The layer.
            scores: Of the original's, as `pass_original` has taken them.
        """
        source, runner = self.plan.source, self.runner_of(layer, self._stored(composed))
        regression = ScoreRegression(scores, runner.attention, self.products, self.share.is_part)
        self.work.say(layer, "queries")
        for part in batches(self.held_out + len(scores), self.batch, self.held_out):
            turns = self.share.index[part] - self.share.held_out
            size = stream_size(self.original[part], self.compressed[part])
            regression.add(runner.attend(self.compressed[part]), size, turns)
            self.work.add(ATTENTION)
        query = composed.query
        if query is None:
            query = split_heads(read_projection(source, layer, "query"), source.head_dim)
        heads = source.config.num_key_value_heads
        places = np.arange(len(query)).reshape(heads, -1)[list(composed.order or range(heads))].reshape(-1)
        width = query.shape[-1] - (runner.attention.q_proj.bias is None)  # without a bias its column stays zero
        fitted = query.copy()
        fitted[..., :width] = regression.solve(torch.from_numpy(query[..., :width]), places.tolist()).numpy()
        self.work.add(score_units(self.plan))
        return replace(composed, query=fitted)

    def output_map(self, layer: int) -> OutputMap | str:
        """Return the linear map that the present layer's block ends in, or why it is not fitted again.

        Args:
            layer: Its number; its keys and values are composed at the cache.
        """
        source = self.plan.source
        if layer not in self._outputs:
            found = find_output_map(self.runner, self.compressed[:1])
            if isinstance(found, OutputMap):
                found = _storable(source, f"{found.name}.weight") or found
            self._outputs[layer] = found
        return self._outputs[layer]

    def _output_report(self, layer: int, composed: ComposedLayer) -> str:
        """Say whether what a layer's block ends in was fitted again, or why not."""
        output = self.output_map(layer)
        if isinstance(output, str):
            return output
        if composed.refitted:
            return f"{output.name} is fitted again"
        return f"{output.name} stays as it is: no other does better on text that it was not fitted to"

    def _remaining_error(self, runner: BlockRunner, layer: int, sample: Sequence[slice] | None) -> float:
        """Return the squared error behind a composed layer's attention, over that of sending nothing.

        Args:
            runner: The layer, whose block stays as it is.
            layer: Its number.
            sample: Batches to look at; all of the text without.
        """
        error = whole = 0.0
        self.work.say(layer, "looking" if sample is None else "dividing the budget")
        for part in self.parts() if sample is None else sample:
            with torch.no_grad():
                sent = runner.send(self.compressed[part])
            if part.start >= self.held_out:
                wanted, given = (stream[part].to(sent.device) for stream in (self.original, self.compressed))
                missing, size = wanted - given, stream_size(wanted, given)
                error += float(((missing - sent).square() / size).sum())
                whole += float((missing.square() / size).sum())
            self.work.add(ATTENTION)
        return error / max(whole, 1e-300)

    def _stored(self, composed: ComposedLayer, dtype: str | None = None) -> StoredLayer:
        """Return a composed layer as it is stored, or in another dtype."""
        return store_layer(composed, self.plan.source.config.mea["bias"], dtype or self.plan.decisions.stored_dtype)

    def parts(self) -> Iterator[slice]:
        """Yield batches of the text; what is held out comes in batches of its own, which no statistic looks at."""
        yield from batches(self.held_out, self.batch)
        yield from batches(self.original.shape[0], self.batch, self.held_out)

    def head_runner(self) -> Any:
        """Return what makes distributions of the last layer's hidden states."""
        kind = BlockHeadRunner if self.plan.source.at_cache else HeadRunner
        return kind(self.plan.source, self.device, self.products)

    def runner_of(self, layer: int, stored: StoredLayer | None = None) -> Any:
        """Return a layer to run, the original's or as it was stored."""
        kind = BlockRunner if self.plan.source.at_cache else LayerRunner
        return kind(self.plan.source, layer, stored, device=self.device, products=self.products)


def calibration_tokens(plan: Plan, progress: bool, origins: list[int] | None = None) -> torch.Tensor:
    """Return the sequences of calibration and distillation, (N, T), int64, those of the calibration in front.

    They are of the recipe's text, of which distillation gets other sequences where there are enough, or sampled from
    the model itself, which makes no more than calibration asks for and some to hold out.

    Args:
        plan: What to do.
        progress: Show a bar on stderr.
        origins: Gets the index of the recipe's text that each sequence is of; nothing where text is sampled.

    Raises:
        RequestError: There is too little text, or the model cannot be loaded to sample from.
    """
    directory, recipe, decisions = plan.source.reader.directory, plan.recipe, plan.decisions
    count, length = decisions.sequences, decisions.sequence_length
    if recipe.text is not None:
        tokenizer = load_tokenizer(directory)
        documents = read_documents(recipe.text)
        limit = count + healing_sequences(plan)
        texts: list[int] = []
        tokens = token_sequences(
            documents, tokenizer, length, limit=limit, seed=recipe.seed, bos=recipe.bos, origins=texts
        )
        check_ids(tokens, plan.source.config.vocab_size, directory)
        if len(documents.texts) == 1 and len(documents.texts[0].sources) == 1:
            print(
                f"warning: all text is {documents.texts[0].name}, and what it is unlike can lose much more than it "
                "shows; several kinds of text, or none so that it is sampled from the model, keep more of the rest",
                file=sys.stderr,
            )
        # What lies at the front of a text is no fair sample of it; a limit of time may leave some out later.
        if len(tokens) > count or recipe.time_limit is not None:
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(recipe.seed))
            tokens, texts = tokens[order], [texts[index] for index in order]
        if origins is not None:
            origins += texts
        return tokens
    extra = _extra_sequences(count, length) if decisions.healing_steps else 0

    def sample() -> torch.Tensor:
        model, own = load_model(directory, device=recipe.device), None
        with suppress(RequestError):
            own = load_tokenizer(directory)
        tokens = sample_sequences(model, own, count, length, recipe.seed, bos=recipe.bos, progress=progress)
        if not extra:
            return tokens
        # By another seed, so that calibration has the same text without them.
        others = sample_sequences(model, own, extra, length, recipe.seed + 1, bos=recipe.bos, progress=progress)
        return torch.cat((tokens, others))

    what = {
        "model": fingerprint(plan.source.reader, plan.source.raw_config),
        "shape": [count, extra, length],
        "seed": recipe.seed,
        "bos": recipe.bos,
        "device": resolve_device(recipe.device).type,
        "versions": versions(),
    }
    return kept_samples(what, sample)


def choosing_sequences(plan: Plan, tokens: torch.Tensor) -> int:
    """Return how many of the calibration sequences (N, T), at the front, no statistic and no step may look at.

    Raises:
        RequestError: There are too few sequences to hold one out.
    """
    held_out = measured_sequences(plan, tokens) if plan.profile is not None else 0
    if not plan.decisions.refinement_steps:
        return held_out
    if len(tokens) < 2:
        raise RequestError(
            "refinement holds a calibration sequence out and there is only one; give `sequences` 2 or more, a "
            "longer `text`, a smaller `sequence_length`, or `refine` 0"
        )
    return max(1, held_out, min(_HELD_OUT, max(1, _HELD_OUT_TOKENS // tokens.shape[1]), len(tokens) // 4))


def measured_sequences(plan: Plan, tokens: torch.Tensor) -> int:
    """Return how many of the calibration sequences (N, T), at the front, costs are measured on.

    Raises:
        RequestError: There are too few sequences to hold one out.
    """
    if len(tokens) < 2:
        raise RequestError(
            "a budget is measured on a calibration sequence that nothing is fitted to, and there is only one; give "
            "`sequences` 2 or more, a longer `text`, a smaller `sequence_length`, or `budget` uniform"
        )
    return measured_count(plan, len(tokens))


def measured_tokens(plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """Return what costs are measured on, the beginnings of calibration sequences: of (N, T) (M, T').

    Raises:
        RequestError: There are too few sequences to hold one out.
    """
    return tokens[: measured_sequences(plan, tokens), : measured_window(plan)]


def healing_sequences(plan: Plan) -> int:
    """Return the sequences beside the calibration's that distillation asks for: each seen once, and some held out."""
    decisions = plan.decisions
    if not decisions.healing_steps:
        return 0
    seen = decisions.healing_steps * healing_batch(decisions.sequence_length)
    return seen + _extra_sequences(decisions.sequences + seen, decisions.sequence_length)


def held_out_sequences(total: int, length: int) -> int:
    """Return how many of all sequences distillation holds out to choose by."""
    return max(1, min(_HELD_OUT, _HELD_OUT_TOKENS // length, total // 9))


def _extra_sequences(count: int, length: int) -> int:
    """Return how many sequences are to be had beside others, so that as many can be held out."""
    return max(1, min(_HELD_OUT, _HELD_OUT_TOKENS // length, count // 8))


def stored_tokens(plan: Plan, workspace: Workspace, progress: bool) -> torch.Tensor:
    """Return what `calibration_tokens` does, kept in the workspace so that a resumed run has the same."""
    directory = workspace.work / "calibration"
    if not workspace.result_of("calibration", "tokens"):
        origins: list[int] = []
        tokens = calibration_tokens(plan, progress, origins)
        entries = [_entry("tokens", tokens.numpy())]
        if origins:
            entries.insert(0, _entry(_ORIGINS, np.array(origins)))
        write_checkpoint(directory, entries)
        workspace.commit("calibration", "tokens", list(tokens.shape))
    return CheckpointReader(directory).read("tokens")


def shared_tokens(plan: Plan, workspace: Workspace, progress: bool) -> torch.Tensor:
    """Return what `stored_tokens` does in the first of several processes, and hand it to the others."""
    return from_first_process(stored_tokens(plan, workspace, progress) if is_first_process() else None)


def shared_origins(plan: Plan, workspace: Workspace) -> torch.Tensor | None:
    """Return which of the recipe's texts each of `shared_tokens` is of, (N,), int64; None where that is not known."""

    def stored() -> torch.Tensor | None:
        reader = CheckpointReader(workspace.work / "calibration")
        return reader.read(_ORIGINS) if _ORIGINS in reader.tensors else None

    return from_first_process(stored() if is_first_process() else None)


def _storable(source: Checkpoint, name: str) -> str | None:
    """Return why a weight of the attention blocks, given its name below them, cannot be stored anew; None if it can."""
    if source.quantised:
        return f"{name} is stored in fp8 and stays as it is"
    blocks = [layer for layer in range(source.config.num_hidden_layers) if source.geometry(layer) is not None]
    if all(source.reader.has(source.attention_tensor(layer, name)) for layer in blocks):
        return None
    # Transformers renames it as it loads it, or layers share it.
    return f"{name} is not stored for each layer under that name, and stays as it is"


def check_finite(composed: ComposedLayer, layer: int) -> None:
    """Raise `RequestError` if a head that a fit has made is not finite."""
    for side in (composed.key, composed.value):
        if not np.isfinite(side.reconstruct()).all():
            raise RequestError(
                f"layer {layer} cannot be composed from this text: a head came out as NaN; give other `text`, or leave "
                "the layer out with `layers`"
            )


def _entry(name: str, array: Array) -> NewTensor:
    return NewTensor(name, dtype_name(array.dtype), array.shape, lambda: array)
