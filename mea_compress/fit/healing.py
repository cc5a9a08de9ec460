"""Brief healing, the last step of a fit: the composed layers are distilled from the original, end to end (METHOD §11).

Teacher and student are in memory together and share every tensor but the attention of the layers that were composed.
What the student learns is stored where the layers are, in directories of its own, before any file of the checkpoint is
written.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mea_compress.checkpoint import CheckpointReader, NewTensor, as_array, as_tensor, torch_dtype, write_checkpoint
from mea_compress.checkpoint.system import trim_heap
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.emit.weights import layer_directory
from mea_compress.errors import RequestError
from mea_compress.fit.block_student import make_block_student
from mea_compress.fit.layers import held_out_sequences, shared_origins, shared_tokens
from mea_compress.fit.progress import least_healing_units, unit_seconds
from mea_compress.fit.refinement import trainable_parameters
from mea_compress.layers.read import read_projection
from mea_compress.layers.runner import fast_products, reading_dtype
from mea_compress.loading import load_model, resolve_device, seeded
from mea_compress.measure.metrics import NOTHING, Comparison
from mea_compress.planning.decisions import HEALING_EPOCHS, kept_healing_steps
from mea_compress.planning.sizes import healing_batch
from mea_compress.planning.types import Plan
from mea_compress.processes import from_first_process, is_first_process, process_count
from mea_compress.text.reading import text_names
from mea_compress.training.distillation import distil, may_keep, measure
from mea_compress.training.settings import DistillationSettings
from mea_compress.training.step_bar import step_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATE = "healing"  # directory in the workspace that keeps how far it has come
_SIDES = {"q_proj.weight": "query", "k_proj.weight": "key", "v_proj.weight": "value"}


def heal_layers(plan: Plan, workspace: Workspace, progress: bool, deadline: float | None = None) -> None:
    """Distil the composed layers from the original, and store what they have become; nothing ends worse than it began.

    What was done is committed to the workspace as the result ``healing``: KL before and after on sequences that are
    held out, its curve, what text was used.

    Args:
        plan: What to do; every layer has been fitted.
        workspace: Where the layers are.
        progress: Show a bar on stderr.
        deadline: See `deadline_of`; there are no more steps than fit.

    Raises:
        RequestError: Steps were asked for, and the text has one sequence.
    """
    if workspace.result_of("healing", "healing"):
        return
    tokens = shared_tokens(plan, workspace, progress)
    if len(tokens) < 2:
        if plan.decisions.healing_asked_for:
            raise RequestError(
                "distillation holds a sequence out and there is only one; give a longer `text`, a smaller "
                "`sequence_length`, or `heal` 0"
            )
        return
    if not from_first_process(_has_time(plan, workspace, len(tokens), deadline)):
        if is_first_process():
            print(f"no time is left of {plan.recipe.time_limit:g} minutes to heal in", file=sys.stderr)
        return
    try:
        _heal(plan, workspace, tokens, progress, deadline)
    except torch.OutOfMemoryError:
        if process_count() > 1:  # the others would wait for this one
            raise
        print(
            f"the checkpoint stays unhealed, for {resolve_device(plan.recipe.device)} has no room for original and "
            "compressed model together: try `mea-compress heal` with --gradient-checkpointing on it afterwards",
            file=sys.stderr,
        )


def _has_time(plan: Plan, workspace: Workspace, sequences: int, deadline: float | None) -> bool:
    """Return whether so much time is left that healing can change anything: a trial, and measuring what it did.

    What an interrupted run has begun is brought to its end.
    """
    if deadline is None or (workspace.work / _STATE).exists():
        return True
    trial = DistillationSettings(plan.decisions.healing_steps, 1, deadline=deadline).trial_steps
    held_out = held_out_sequences(sequences, plan.decisions.sequence_length)
    left = deadline - time.monotonic()
    return left > 0 and left > unit_seconds(plan) * least_healing_units(plan, trial, held_out)


def _heal(plan: Plan, workspace: Workspace, tokens: torch.Tensor, progress: bool, deadline: float | None) -> None:
    """Do what `heal_layers` says with the sequences that there are, (N, T)."""
    length = plan.decisions.sequence_length
    held_out = held_out_sequences(len(tokens), length)
    training, held_out_ids = _training(plan, tokens[:-held_out]), tokens[-held_out:]
    batch = min(healing_batch(length), len(training))
    batch = max(1, batch // process_count()) * process_count()
    steps = plan.decisions.healing_steps
    if not plan.decisions.healing_asked_for:
        steps = min(steps, ceil(HEALING_EPOCHS * len(training) / batch))

    device = resolve_device(plan.recipe.device)
    stored = torch_dtype(plan.source.dtype)
    products = fast_products(stored, device)
    wide = torch.float64 if stored == torch.float64 else torch.float32
    teacher = load_model(plan.source.reader.directory, reading_dtype(stored, device), device)
    make = make_block_student if plan.source.at_cache else make_student
    student, trained = make(plan, workspace, teacher, wide)
    settings = DistillationSettings(steps, batch, products=products, seed=plan.recipe.seed, deadline=deadline)
    texts = _by_text(plan, held_out_ids, shared_origins(plan, workspace))
    kept_states = {name: may_keep(teacher, ids, products) for name, ids in texts.items()}
    told = {"before": _measured(student, teacher, texts, products, kept_states)}
    before = sum(told["before"].values(), NOTHING)
    kept_in = workspace.work / _STATE
    with step_bar(None if deadline is not None else settings.all_steps, progress) as bar:
        distillation = distil(student, teacher, training, held_out_ids, settings, bar.tick, kept_in, known=bar.known)
    kept = torch_dtype(plan.decisions.stored_dtype)
    with torch.no_grad():
        for weights in trained.values():
            for weight in weights.values():
                weight.copy_(weight.to(kept))
    told["after"] = _measured(student, teacher, texts, products, kept_states)
    after = sum(told["after"].values(), NOTHING)
    better = after.kl < before.kl
    if not better:
        told["after"] = told["before"]
    if better and is_first_process():
        for layer, weights in trained.items():
            _store(plan, workspace, layer, weights)
    workspace.commit(
        "healing",
        "healing",
        {
            "kept": "healed" if better else "unhealed",
            "kl_before": before.kl / before.tokens,
            "kl_after": (after if better else before).kl / before.tokens,
            "steps": distillation.steps,
            "tokens": distillation.tokens,
            "relative_rate": distillation.rate,
            "trial_rate": distillation.trial_rate,
            "trained": ", ".join(sorted({name for weights in trained.values() for name in weights})),
            "text": "of the recipe" if plan.recipe.text else "sampled from the original",
            "sequences": len(training),
            "held_out_tokens": before.tokens,
            **({} if len(texts) == 1 else {"texts": [_row(name, told) for name in texts]}),
            "curve": [list(point) for point in distillation.curve],
            "losses": list(distillation.losses),
        },
    )
    del student, teacher, trained
    trim_heap()


def _by_text(plan: Plan, ids: torch.Tensor, origins: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the held-out sequences (M, T), the last of all that `origins` (N,) tells of, by the text they are of."""
    if origins is None or plan.recipe.text is None:
        return {"": ids}
    names = text_names(plan.recipe.text)
    own = [names[index] for index in origins[-len(ids) :].tolist()]
    return {name: ids[[index for index, text in enumerate(own) if text == name]] for name in sorted(set(own))}


def _measured(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Mapping[str, torch.Tensor],
    products: torch.dtype,
    kept: Mapping[str, dict[int, torch.Tensor] | None],
) -> dict[str, Comparison]:
    """Return `measure` of the sequences of every text, each with what it keeps of the teacher."""
    return {name: measure(student, teacher, ids, products, kept=kept[name]) for name, ids in texts.items()}


def _row(name: str, told: Mapping[str, Mapping[str, Comparison]]) -> dict[str, Any]:
    kl = {f"kl_{moment}": found[name].kl / found[name].tokens for moment, found in told.items()}
    return {"text": name, **kl, "tokens": told["before"][name].tokens}


def _training(plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """Return the sequences to train on: others than the calibration's, and these too where there are not enough."""
    calibrated = plan.decisions.sequences if plan.decisions.needs_calibration else 0
    others = tokens[calibrated:]
    steps, batch = plan.decisions.healing_steps, healing_batch(plan.decisions.sequence_length)
    enough, wanted = kept_healing_steps(plan.recipe, steps) * batch, steps * batch
    return others if len(others) >= enough else torch.cat((others, tokens[:calibrated]))[:wanted]


def make_student(
    plan: Plan, workspace: Workspace, teacher: PreTrainedModel, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[int, dict[str, nn.Parameter]]]:
    """Return the compressed model, which shares with the original whatever was not composed.

    Args:
        plan: What was done.
        workspace: Where the fitted layers are.
        teacher: The original; its weights get no gradients.
        dtype: Of the weights that are trained.

    Returns:
        The student, in evaluation mode; and for each composed layer its trained weights by their names below
        ``self_attn.``.
    """
    from mea_compress.modeling import modeling_mea
    from mea_compress.modeling.attention_mea import MeaAttention

    source = plan.source
    readers = {
        layer.layer: CheckpointReader(layer_directory(workspace, layer.layer))
        for layer in plan.layers
        if layer.compressed
    }
    layers = [
        workspace.result_of("layers", str(layer)) if layer in readers else section
        for layer, section in enumerate(source.config.mea["layers"])
    ]
    config = copy.deepcopy(source.model_config)
    config.mea = {**config.mea, "layers": layers}
    config._attn_implementation = "sdpa"
    teacher.requires_grad_(False)
    with torch.device("meta"):
        student: Any = getattr(modeling_mea, f"Mea{source.family.prefix}ForCausalLM")(config)
    original: Any = teacher
    student.model.rotary_emb = copy.deepcopy(original.model.rotary_emb)
    with seeded(plan.recipe.seed, torch.device("cpu")):  # weights are drawn, which are replaced
        for index, layer in enumerate(student.model.layers):
            layer.self_attn = MeaAttention(config, index)  # with its tables, which no checkpoint has
            object.__setattr__(layer.self_attn, "rotary", student.model.rotary_emb)
            layer.self_attn.to(teacher.device)
    shared = dict(original.named_parameters(remove_duplicate=False))
    for name, parameter in list(student.named_parameters(remove_duplicate=False)):
        module, _, own = name.rpartition(".")
        weight = _attention_weight(plan, name, readers, shared)
        if weight is None:
            parameter = shared[name]
        else:
            parameter.data = weight.to(teacher.device, dtype)
        setattr(student.get_submodule(module), own, parameter)
    student.requires_grad_(False)
    trained = {index: trainable_parameters(student.model.layers[index].self_attn) for index in readers}
    for parameter in student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(teacher.dtype)
    return student.eval(), trained


def _attention_weight(
    plan: Plan, name: str, readers: Mapping[int, CheckpointReader], shared: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """Return a weight of the student's attention that is not the original's own tensor, None for all others."""
    prefix, stem, own = name.partition("self_attn.")
    if not stem:
        return None
    layer = int(prefix.removesuffix(".").rpartition(".")[2])
    if layer in readers:
        if own in readers[layer].tensors:
            return readers[layer].read(own)
        if name in shared:  # trained, so a copy
            return shared[name].detach().clone()
    elif name in shared:
        return None
    return as_tensor(read_projection(plan.source, layer, _SIDES[own])[:, :-1])  # of a fused projection


def _store(plan: Plan, workspace: Workspace, layer: int, weights: Mapping[str, nn.Parameter]) -> None:
    """Store a healed layer: what was trained, and what was stored of it beside that."""
    reader = CheckpointReader(layer_directory(workspace, layer))
    entries = [
        NewTensor(name, info.dtype, info.shape, partial(reader.read_array, name))
        for name, info in reader.tensors.items()
        if name not in weights
    ]
    dtype = plan.decisions.stored_dtype
    for name, weight in weights.items():
        array = as_array(weight.detach().to("cpu", torch_dtype(dtype)).contiguous())
        entries.append(NewTensor(name, dtype, array.shape, partial(np.asarray, array)))
    entries.sort(key=lambda entry: entry.name)
    write_checkpoint(workspace.work / f"healed-{layer:05d}", entries)


__all__ = ["heal_layers", "make_student"]
