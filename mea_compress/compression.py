"""The main job: plan, compose layer by layer, write, verify, publish."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mea_compress.architectures import open_checkpoint
from mea_compress.checkpoint.dtypes import TORCH_NAMES
from mea_compress.checkpoint.files import refusals, write_json
from mea_compress.checkpoint.fp8 import keep_in_full
from mea_compress.checkpoint.hub import local_directory
from mea_compress.checkpoint.system import raise_trim_threshold
from mea_compress.checkpoint.workspace import (
    FollowedWorkspace,
    Workspace,
    already_published,
    check_free,
    check_space,
    open_workspace,
)
from mea_compress.emit.directory import auto_map, copy_other_files, fingerprint, other_bytes, versions, write_config
from mea_compress.emit.tokenizer import keep_tokenizer
from mea_compress.emit.weights import check_written, write_weights, writing_concurrently
from mea_compress.errors import RequestError, VerificationError
from mea_compress.layers.read import check_finite
from mea_compress.planning.budget import predicted_cost
from mea_compress.planning.decisions import deadline_of
from mea_compress.planning.plans import equal_widths, inspect_checkpoint, plan_after_fit, plan_budget, plan_source
from mea_compress.planning.types import Plan
from mea_compress.processes import from_first_process, is_first_process, join_processes, process_count
from mea_compress.recipe import Recipe, budget_file, compression_settings, make_recipe, to_yaml
from mea_compress.report.cards import model_card
from mea_compress.report.plots import draw_healing, has_matplotlib
from mea_compress.report.showing import Shown
from mea_compress.report.tables import before_after, fidelity_report
from mea_compress.text.reading import text_state

# Room for the files that are not weights, beside them and the layers' own files.
SPARE_BYTES = 64 << 20
# Our own reports: stale in a derived checkpoint, so not copied.
_OWN_DOCUMENTS = ("compression.json", "recipe.yaml", "healing.json", "healing.png", "training.json", "export.json")


@dataclass(frozen=True, repr=False)
class CompressionResult(Shown):
    """What `compress` did.

    Attributes:
        out: The emitted checkpoint.
        plan: What was done to every layer.
        fidelity: What was measured of it; see `compression.json`.
    """

    out: Path
    plan: Plan
    fidelity: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plan and fidelity as plain data."""
        return {"plan": self.plan.to_json(), "fidelity": self.fidelity}

    def report(self) -> str:
        """Return what people read."""
        parts = [before_after(self.plan.to_json())]
        if self.plan.decisions.choice:
            parts.append(f"Composition: {self.plan.decisions.choice}")
        if self.fidelity:
            parts.append(fidelity_report(self.fidelity))
        return "\n\n".join([*parts, f"Written to {self.out}"])


def compress(
    source: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> CompressionResult:
    """Compress the KV cache of a checkpoint.

    OUT appears complete or not at all: it is written in a sibling directory, checked against what was composed, and
    renamed last. Tensors that do not change are copied as bytes. SRC is only read. Started by ``torchrun`` or
    ``accelerate launch``, several processes share the calibration sequences, and the first one writes.

    Args:
        source: Checkpoint directory, or a hub id, ``OWNER/NAME[@REVISION]``.
        out: New directory.
        recipe: A `Recipe`, a built-in recipe's name or a YAML file; None for the defaults.
        resume: Take up an interrupted run.
        progress: Show progress bars on stderr.
        **settings: Fields of `Recipe` that win over it, such as ``kv_ratio=0.5``.

    Raises:
        RequestError: The request, the source or the disk does not allow it; nothing is left behind.

    Example:
        >>> result = compress("SRC", "HALF", kv_ratio=0.5, fit="weights", progress=False)
        >>> result.plan.bytes_after, result.out.name
        (256, 'HALF')
    """
    source, out = local_directory(source), Path(out).absolute()
    plan = plan_source(open_checkpoint(source), make_recipe(recipe, settings))
    if plan.decisions.healing_steps:
        from mea_compress.loading import training_device

        training_device(plan.recipe.device)  # which is refused before there is anything to lose
    if process_count() > 1:
        _join(plan)
        progress = progress and is_first_process()
    finished = is_first_process() and resume and (already_published(out) or (out / "compression.json").is_file())
    if from_first_process(finished):
        return _load_finished_result(plan, out)
    if not is_first_process():
        return _take_part(plan, out)
    check_free(out, source)
    check_space(out, plan.costs.disk_bytes + other_bytes(plan.source.reader) + SPARE_BYTES)
    with open_workspace(out, _fingerprint(plan), resume) as workspace:
        deadline = deadline_of(plan.recipe)
        raise_trim_threshold()
        if plan.decisions.needs_calibration and not plan.source.at_cache:  # whose config.json is nothing before the fit
            _write_beside_weights(plan, workspace)  # a tokenizer that cannot be kept is refused before the long work
        plan = _allocated(plan, workspace, progress, deadline)
        from_first_process((_decided(plan), workspace.manifest))
        plan = _fit_and_write(plan, workspace, progress, deadline)
        config = _write_beside_weights(plan, workspace)
        check_written(plan, workspace)
        fidelity = {
            "layers": workspace.manifest.get("fidelity", {}),
            **_budget_fidelity(plan, workspace),
            **workspace.manifest.get("healing", {}),
            **{name: workspace.manifest[name] for name in ("time_limit",) if name in workspace.manifest},
            "verification": _verified(plan, workspace.path, progress),
        }
        _write_documents(plan, config, fidelity, workspace.path)
        workspace.publish(out)
    from_first_process((_decided(plan), fidelity))
    return CompressionResult(out, plan, fidelity)


def _join(plan: Plan) -> None:
    """Join the other processes that share the work.

    Raises:
        RequestError: There is nothing that they could share.
    """
    if plan.source.at_cache:
        raise RequestError(
            f"several processes share the fit of projections, and those of {plan.source.family.model_type} stay as "
            "they are: start one process"
        )
    if not plan.decisions.needs_calibration and not plan.decisions.healing_steps:
        raise RequestError("several processes share the calibration, and there is none: start one process")
    from mea_compress.loading import resolve_device

    join_processes(resolve_device(plan.recipe.device))


def _take_part(plan: Plan, out: Path) -> CompressionResult:
    """Do what falls to any process but the first, which writes and hands the result to the others."""
    from mea_compress.fit.layers import fit_layers

    decided, manifest = from_first_process(None)
    plan = replace(plan, **decided)
    workspace, deadline = FollowedWorkspace(out, manifest), deadline_of(plan.recipe)
    raise_trim_threshold()
    if plan.decisions.needs_calibration:
        fit_layers(plan, workspace, False, deadline=deadline)
    if plan.decisions.healing_steps:
        from mea_compress.fit.healing import heal_layers

        heal_layers(plan, workspace, False, deadline)
    decided, fidelity = from_first_process(None)
    return CompressionResult(out, replace(plan, **decided), fidelity)


def _decided(plan: Plan) -> dict[str, Any]:
    """Return what of a plan measurements change, by field name."""
    return {name: getattr(plan, name) for name in ("layers", "decisions", "costs", "profile", "predicted_kl")}


def _load_finished_result(plan: Plan, out: Path) -> CompressionResult:
    """Return what an earlier run has finished, for a run that is resumed after it."""
    try:
        made_by = Recipe.model_validate(yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8")))
        same = compression_settings(made_by) == compression_settings(plan.recipe)
        fidelity = json.loads((out / "compression.json").read_text(encoding="utf-8"))["fidelity"]
        layers = json.loads((out / "config.json").read_text(encoding="utf-8"))["mea"]["layers"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        same = False
    if not same or len(layers) != len(plan.layers):
        raise RequestError(f"{out} is finished and was made by another recipe; choose another output directory")
    sections = {layer.layer: layers[layer.layer] for layer in plan.layers if layer.compressed}
    return CompressionResult(out, plan_after_fit(plan, sections), fidelity)


def _fingerprint(plan: Plan) -> dict[str, Any]:
    """Return what must be the same for an interrupted run to be taken up again, by what to call it."""
    text, budget = plan.recipe.text, budget_file(plan.recipe)
    return {
        "the source": fingerprint(plan.source.reader, plan.source.raw_config),
        "the recipe": compression_settings(plan.recipe),
        "the calibration text": text_state(text) if text else None,
        "the budget": None if budget is None else budget.read_text(encoding="utf-8"),
        "a library version": versions(),
        "what a profile is measured on": _measured_on(plan),
    }


def _measured_on(plan: Plan) -> list[int] | None:
    """Return `measured_on` where a budget is measured, else None."""
    if not plan.decisions.measures_budget:
        return None
    from mea_compress.fit.progress import measured_on

    return measured_on(plan)


def _allocated(plan: Plan, workspace: Workspace, progress: bool, deadline: float | None) -> Plan:
    """Return the plan with the widths and the rotary components that measurements choose before the fit.

    With a deadline, it measures and fits no more than there is time for.
    """
    calibrated = plan.decisions.needs_calibration
    equal = equal_widths(plan) if plan.decisions.measures_budget else plan
    if plan.decisions.measures_budget and deadline is not None:
        from mea_compress.fit.time_limit import within_limit

        plan = within_limit(plan, equal, workspace, deadline, progress)
    if plan.decisions.measures_budget:
        from mea_compress.fit.profile import profile_in
        from mea_compress.fit.trial import better_plan

        measured = plan_budget(plan, profile_in(plan, workspace, progress))
        assert measured.profile is not None
        predicted = predicted_cost(plan, measured.profile)
        equal = replace(equal, profile=measured.profile, predicted_kl=predicted)
        plans = {"measured": measured, "uniform": equal}
        plan = better_plan(plans, workspace, progress, believe_profile=deadline is not None)
    if plan.decisions.shares_rotary_allocation:
        from mea_compress.fit.allocation import share_rotary_components

        plan = share_rotary_components(plan, workspace, progress)
    if calibrated and deadline is not None:
        from mea_compress.fit.time_limit import with_less_text

        plan = with_less_text(plan, workspace, deadline, progress)
    return plan


def _fit_and_write(plan: Plan, workspace: Workspace, progress: bool, deadline: float | None) -> Plan:
    """Fit the layers and write all weights; return the plan with what the fit chose."""
    if plan.decisions.has_static_shapes:
        with writing_concurrently(plan, workspace, progress) as stored:
            from mea_compress.fit.layers import fit_layers, reserve_one_blas_thread  # while files are being copied

            with reserve_one_blas_thread():
                fit_layers(plan, workspace, False, stored)
            import mea_compress.emit.verification  # noqa: F401 - loaded while files are still being written
        return plan
    from mea_compress.fit.layers import fit_layers

    fit_layers(plan, workspace, progress, deadline=deadline)
    if plan.decisions.healing_steps:
        from mea_compress.fit.healing import heal_layers

        heal_layers(plan, workspace, progress, deadline)
    plan = plan_after_fit(plan, _sections(plan, workspace))
    write_weights(plan, workspace, progress)
    return plan


def _sections(plan: Plan, workspace: Workspace) -> dict[int, dict[str, Any]]:
    """Return the entries of the ``mea`` section of the layers that were composed."""
    return {layer.layer: workspace.result_of("layers", str(layer.layer)) for layer in plan.layers if layer.compressed}


def _verified(plan: Plan, directory: Path, progress: bool) -> dict[str, Any]:
    """Check the written checkpoint, and return what was compared and what came of it.

    Raises:
        RequestError: It fails because the source holds NaN or infinite numbers.
        VerificationError: It fails.
    """
    try:
        return _compared(plan, directory, progress)
    except VerificationError:
        check_finite(plan.source)
        raise


def _compared(plan: Plan, directory: Path, progress: bool) -> dict[str, Any]:
    """Compare the written checkpoint with what it should be.

    What a large checkpoint holds that was fitted from weights alone is compared bit for bit with what was fitted, its
    shapes with what its configuration says, and the heads' errors were taken from what is stored. Every checkpoint
    decodes with a cache as it does without, whatever release of transformers is installed.
    """
    from mea_compress.emit.verification import decode_layers, verify

    if plan.decisions.needs_calibration or plan.decisions.verifies_whole_model:
        whole = plan.decisions.verifies_whole_model
        return verify(directory, plan.bytes_after, whole_model=whole, progress=progress)
    measured = inspect_checkpoint(directory).bytes_per_token
    if measured != plan.bytes_after:
        raise VerificationError(f"the cache holds {measured} bytes per token where the plan says {plan.bytes_after}")
    return {
        "compared": "tensors of every layer, bit for bit",
        "kv_bytes_per_token": measured,
        "decoding_difference": decode_layers(open_checkpoint(directory)),
    }


def _budget_fidelity(plan: Plan, workspace: Workspace) -> dict[str, Any]:
    """Return what the profile predicted of the whole, and what was measured of it on the same text after the fit."""
    if plan.profile is None:
        return {}
    told = {"predicted_kl": plan.predicted_kl, "measured_kl": workspace.result_of("budget", "kl")}
    tried = workspace.result_of("budget", "trial")
    if tried is not None:
        told["chosen"] = min(tried, key=lambda name: tried[name])
        told |= {f"{name}_trial_kl": kl for name, kl in tried.items()}
    return {"budget": {**told, "tokens": plan.profile.tokens}}


def _write_beside_weights(plan: Plan, workspace: Workspace) -> dict[str, Any]:
    """Write config.json, as far as layers have been fitted, and what the source has beside weights; return the first.

    Raises:
        RequestError: The tokenizer cannot be kept.
    """
    config = _write_config(plan, workspace)
    # The card is kept aside: the checkpoint gets one of its own.
    copy_other_files(plan.source.reader, workspace.path, _OWN_DOCUMENTS, {"README.md": "README.original.md"})
    keep_tokenizer(plan.source.reader.directory, workspace.path)
    return config


def _write_config(plan: Plan, workspace: Workspace) -> dict[str, Any]:
    """Write config.json of the emitted checkpoint, and the code that loads it where this package is not installed."""
    source, family = plan.source, plan.source.family
    sections = _sections(plan, workspace)
    layers = [sections.get(layer) or section for layer, section in enumerate(source.config.mea["layers"])]
    config = dict(source.raw_config)
    config["model_type"] = family.emitted_type
    config["architectures"] = [family.classes[-1]]
    config["auto_map"] = auto_map(family)
    if not source.at_cache:
        config["num_key_value_heads"] = source.config.num_key_value_heads
    # What the weights are stored in is what they are loaded and cached in.
    config.pop("torch_dtype", None)
    config["dtype"] = TORCH_NAMES[plan.decisions.stored_dtype]
    if plan.recipe.dtype is not None:  # parts of a model for more than text say what they are stored in themselves
        for name, part in config.items():
            if name.endswith("_config") and isinstance(part, dict) and {"dtype", "torch_dtype"} & part.keys():
                kept = {key: value for key, value in part.items() if key != "torch_dtype"}
                config[name] = kept | {"dtype": config["dtype"]}
    if source.quantised and not source.at_cache:
        blocks = [source.attention(layer).removesuffix(".") for layer in range(len(layers))]
        config["quantization_config"] = keep_in_full(config, source.reader, blocks)
    config["mea"] = {**source.config.mea, "layers": layers}
    write_config(workspace.path, config)
    return config


def _write_documents(plan: Plan, config: dict[str, Any], fidelity: dict[str, Any], target: Path) -> None:
    source, recipe = plan.source, plan.recipe
    recipe_yaml = to_yaml(recipe)
    (target / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    name = source.name
    write_json(
        target / "compression.json",
        {
            "source": name,
            "model_type": config["model_type"],
            "plan": plan.to_json(),
            "fidelity": fidelity,
            **({} if plan.profile is None else {"profile": plan.profile.to_json()}),
            "recipe": recipe.model_dump(mode="json", exclude_none=True, exclude={"source", "out"}),
            "versions": versions(),
        },
    )
    card = source.reader.directory / "README.md"
    original = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    measured = {name: fidelity[name] for name in ("healing",) if name in fidelity}
    told = (name, plan.to_json(), measured | fidelity["verification"], recipe_yaml, versions(), original)
    text = model_card(*told, auto_class=(*reversed(source.family.multimodal_classes), "AutoModelForCausalLM")[0])
    (target / "README.md").write_text(text, encoding="utf-8")
    if "healing" in fidelity and has_matplotlib():
        with refusals(target / "healing.png"):
            draw_healing(fidelity["healing"], target / "healing.png")


__all__ = ["CompressionResult", "compress"]
