"""The main job: plan, compose layer by layer, write, verify, publish."""

import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mea_compress import modeling
from mea_compress.architectures import Source, open_source
from mea_compress.architectures.source import FLOATS
from mea_compress.checkpoint import CheckpointReader, Entry, NewTensor, TensorInfo, plan_shards, write_checkpoint
from mea_compress.checkpoint.reader import dtype_name, read_tensor, torch_dtype
from mea_compress.checkpoint.writer import shard_finished, write_index, write_shard
from mea_compress.errors import RequestError
from mea_compress.fitting import Fitter, calibration_tokens, compose, needs_text
from mea_compress.heads import SIDES, StoredLayer, projection_info, store_layer
from mea_compress.memory import release
from mea_compress.plan import Plan, plan_source, realised_plan
from mea_compress.recipe import Recipe, to_yaml
from mea_compress.report import model_card, write_json
from mea_compress.verification import VerificationError, verify
from mea_compress.workspace import Workspace, already_published, check_free, check_space, open_workspace

CODE_FILES = ("configuration_mea.py", "decode_mea.py", "modeling_mea.py")
# Room for the files that are not weights, beside them and the layers' own files.
SPARE_BYTES = 64 << 20
# What this program says of a checkpoint; it would not be true of one that is made from it.
_OWN_DOCUMENTS = ("compression.json", "recipe.yaml", "healing.json", "training.json", "export.json")


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` made.

    Attributes:
        out: The emitted checkpoint.
        plan: What was done to every layer.
        fidelity: What was measured of it; see `compression.json`.
    """

    out: Path
    plan: Plan
    fidelity: dict[str, Any]


def compress(source: Path, out: Path, recipe: Recipe, resume: bool = False, progress: bool = True) -> CompressionResult:
    """Compresses the KV cache of a checkpoint.

    OUT appears complete or not at all: it is built beside its place, reloaded, checked against the composed model,
    and renamed last. Tensors that do not change are copied as bytes. SRC is only read.

    Args:
        source: Checkpoint directory.
        out: New directory.
        recipe: What to do.
        resume: Take up an interrupted run.
        progress: Show progress bars on stderr.

    Raises:
        RequestError: The request, the source or the disk does not allow it; nothing is left behind.
    """
    source, out = Path(source), Path(out).absolute()
    opened = open_source(source)
    plan = plan_source(opened, recipe)
    if resume and (already_published(out) or (out / "compression.json").is_file()):
        return _published(opened, out, recipe, plan)
    check_free(out, source)
    check_space(out, plan.disk_bytes + sum(file.stat().st_size for file in _other_files(opened)) + SPARE_BYTES)
    with open_workspace(out, _fingerprint(opened, recipe), resume) as workspace:
        _compose_layers(opened, plan, recipe, workspace, progress)
        plan = realised_plan(opened, recipe, plan, _sections(plan, workspace))
        _write_weights(opened, plan, recipe, workspace, progress)
        _check_stored(opened, plan, workspace)
        config = _write_config(opened, plan, recipe, workspace)
        _copy_other_files(opened, workspace.path)
        fidelity = {
            "layers": workspace.manifest.get("fidelity", {}),
            "verification": verify(workspace.path, plan.bytes_after, progress),
        }
        _write_documents(opened, plan, recipe, config, fidelity, workspace.path)
        workspace.publish(out)
    return CompressionResult(out, plan, fidelity)


def _published(source: Source, out: Path, recipe: Recipe, plan: Plan) -> CompressionResult:
    """What an earlier run has finished, for a run that is resumed after it."""
    try:
        same = (out / "recipe.yaml").read_text(encoding="utf-8") == to_yaml(recipe)
        fidelity = json.loads((out / "compression.json").read_text(encoding="utf-8"))["fidelity"]
        layers = json.loads((out / "config.json").read_text(encoding="utf-8"))["mea"]["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same or len(layers) != len(plan.layers):
        raise RequestError(f"{out} is finished and was made by another recipe; choose another output directory")
    sections = {one.layer: layers[one.layer] for one in plan.layers if one.compressed}
    return CompressionResult(out, realised_plan(source, recipe, plan, sections), fidelity)


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    names = ("mea-compress", "torch", "transformers", "safetensors", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _fingerprint(source: Source, recipe: Recipe) -> dict[str, Any]:
    digest = hashlib.sha256()
    for info in source.reader.tensors.values():
        digest.update(f"{info.name} {info.dtype} {info.shape} {info.file.name} {info.offset}\n".encode())
    files = [*source.reader.files, *_other_files(source)]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest.update(repr((sorted(stats), source.raw_config)).encode())
    text = recipe.text
    calibration = [str(text), text.stat().st_size, text.stat().st_mtime_ns] if text and text.is_file() else None
    return {
        "the source": digest.hexdigest(),
        "the recipe": to_yaml(recipe),
        "the calibration text": calibration,
        "a library version": versions(),
    }


def _compose_layers(source: Source, plan: Plan, recipe: Recipe, workspace: Workspace, progress: bool) -> None:
    """Fits every chosen layer and stores its tensors in a directory of its own."""
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
        stored = None
        if layer.layer in unfinished:
            composed, fidelity = fitter.fit(layer) if fitter else compose(source, layer, None, recipe)
            stored = store_layer(composed, source.config.mea["bias"], dtype)
            write_checkpoint(
                _layer_directory(workspace, layer.layer),
                [_entry(name, tensor) for name, tensor in stored.tensors.items()],
            )
            workspace.record("fidelity", str(layer.layer), fidelity)
            workspace.record("layers", str(layer.layer), stored.section)
            del composed
            release()
        elif fitter and layer.compressed:
            reader = CheckpointReader(_layer_directory(workspace, layer.layer))
            section = workspace.finished("layers", str(layer.layer))
            stored = StoredLayer(section, {name: reader.read(name) for name in reader.tensors})
        if fitter and layer.layer < unfinished[-1]:
            fitter.advance(layer.layer, stored)


def _sections(plan: Plan, workspace: Workspace) -> dict[int, dict[str, Any]]:
    """Entries of the ``mea`` section of the layers that were composed."""
    return {one.layer: workspace.finished("layers", str(one.layer)) for one in plan.layers if one.compressed}


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


def _layer_directory(workspace: Workspace, layer: int) -> Path:
    return workspace.work / f"layer-{layer:05d}"


def _write_weights(source: Source, plan: Plan, recipe: Recipe, workspace: Workspace, progress: bool) -> None:
    """All shards: new attention tensors in the place of the old ones, everything else copied as bytes."""
    gone, new = _attention_tensors(source, plan, workspace)
    entries: list[Entry] = []
    for info in source.reader.tensors.values():
        for entry in new.get(info.name, [] if info.name in gone else [info]):
            entries.append(entry if recipe.dtype is None else _cast(entry, recipe.dtype))
    write_shards(entries, recipe.shard_bytes, workspace, progress)


def _check_stored(source: Source, plan: Plan, workspace: Workspace) -> None:
    """Attention tensors of the checkpoint are, bit for bit, those that were fitted.

    Raises:
        VerificationError: One is not.
    """
    written = CheckpointReader(workspace.path)
    for layer in plan.layers:
        if not layer.compressed:
            continue
        fitted = CheckpointReader(_layer_directory(workspace, layer.layer))
        for name in fitted.tensors:
            if not torch.equal(written.read(source.family.attention(layer.layer) + name), fitted.read(name)):
                raise VerificationError(f"layer {layer.layer}: {name} was not written as it was fitted")


def write_shards(entries: Sequence[Entry], shard_bytes: int, workspace: Workspace, progress: bool) -> None:
    """Writes all weights of the checkpoint, with a bar; files that an interrupted run has finished stay as they are.

    Args:
        entries: The tensors, in order.
        shard_bytes: Largest sum of tensor bytes in one file.
        workspace: Where to, and what is finished.
        progress: Show a progress bar on stderr.
    """
    shards = plan_shards(entries, shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    with tqdm(desc="writing weights", total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for shard in shards:
            if shard_finished(workspace.path, shard) and workspace.finished("shards", shard.name):
                bar.update(shard.nbytes)
                continue
            write_shard(workspace.path, shard, bar.update)
            workspace.record("shards", shard.name, True)
    write_index(workspace.path, shards)


def _attention_tensors(
    source: Source, plan: Plan, workspace: Workspace
) -> tuple[set[str], dict[str, list[TensorInfo]]]:
    """Names of the tensors that give way, and what comes in the place of the first of each layer."""
    family = source.family
    old: dict[str, list[str]] = {}  # names below each layer's attention
    for name in source.reader.tensors:
        before, stem, own = name.partition("self_attn.")
        if stem:
            old.setdefault(before + stem, []).append(own)
    gone: set[str] = set()
    new: dict[str, list[TensorInfo]] = {}
    for layer in plan.layers:
        prefix, made, dropped = family.attention(layer.layer), {}, set()
        if family.fused and not source.native:
            made = {f"{side[0]}_proj.weight": projection_info(source, layer.layer, side) for side in SIDES}
            dropped = {f"{family.fused}.weight"}
        if layer.compressed:
            made |= CheckpointReader(_layer_directory(workspace, layer.layer)).tensors
            stems = ("k_proj.", "v_proj.", "key_composition.", "value_composition.")
            dropped |= {own for own in old[prefix] if own.startswith(stems) or own in made}
        if made:
            first = next(own for own in old[prefix] if own in dropped)
            new[prefix + first] = [replace(info, name=prefix + own) for own, info in made.items()]
            gone |= {prefix + own for own in dropped}
    return gone, new


def _cast(info: TensorInfo, dtype: str) -> TensorInfo | NewTensor:
    wanted: torch.dtype = getattr(torch, dtype)
    if info.dtype not in FLOATS or info.dtype == dtype_name(wanted):
        return info

    def produce() -> torch.Tensor:
        tensor = read_tensor(info)
        cast = tensor.to(wanted)
        if not torch.equal(cast.isfinite(), tensor.isfinite()):
            raise RequestError(f"{info.file}: tensor {info.name} has numbers too large for {dtype}; choose bfloat16")
        return cast

    return NewTensor(info.name, dtype_name(wanted), info.shape, produce)


def _write_config(source: Source, plan: Plan, recipe: Recipe, workspace: Workspace) -> dict[str, Any]:
    """config.json of the emitted checkpoint, and the code that loads it where this package is not installed."""
    family = source.family
    layers = []
    for layer, spec in zip(plan.layers, source.config.mea["layers"], strict=True):
        layers.append(workspace.finished("layers", str(layer.layer)) if layer.compressed else spec)
    config = dict(source.raw_config)
    config["model_type"] = family.emitted_type
    config["architectures"] = [f"Mea{family.prefix}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"configuration_mea.Mea{family.prefix}Config",
        "AutoModel": f"modeling_mea.Mea{family.prefix}Model",
        "AutoModelForCausalLM": f"modeling_mea.Mea{family.prefix}ForCausalLM",
    }
    config["num_key_value_heads"] = source.config.num_key_value_heads
    # What the weights are stored in is what they are loaded and cached in.
    config.pop("torch_dtype", None)
    config["dtype"] = recipe.dtype or str(torch_dtype(source.dtype)).removeprefix("torch.")
    config["mea"] = {**source.config.mea, "layers": layers}
    write_json(workspace.path / "config.json", config)
    for name in CODE_FILES:
        shutil.copyfile(Path(modeling.__file__).with_name(name), workspace.path / name)
    return config


def _copy_other_files(source: Source, target: Path) -> None:
    """Tokenizer, chat template, generation config, licence and whatever else is not weights; the card is kept aside."""
    for file in _other_files(source):
        relative = file.relative_to(source.reader.directory)
        if relative.name in CODE_FILES or str(relative) in _OWN_DOCUMENTS:
            continue
        name = Path("README.original.md") if str(relative) == "README.md" else relative
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def _other_files(source: Source) -> list[Path]:
    return [source.reader.directory / relative for relative in source.reader.other_files()]


def _write_documents(
    source: Source, plan: Plan, recipe: Recipe, config: dict[str, Any], fidelity: dict[str, Any], target: Path
) -> None:
    recipe_yaml = to_yaml(recipe)
    (target / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    name = str(source.raw_config.get("_name_or_path") or source.reader.directory.resolve().name)
    write_json(
        target / "compression.json",
        {
            "source": name,
            "model_type": config["model_type"],
            "plan": plan.to_json(),
            "fidelity": fidelity,
            "recipe": recipe.model_dump(mode="json", exclude_none=True, exclude={"source", "out"}),
            "versions": versions(),
        },
    )
    card = source.reader.directory / "README.md"
    original = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    summary = fidelity["verification"]
    (target / "README.md").write_text(
        model_card(name, plan.to_json(), summary, recipe_yaml, versions(), original), encoding="utf-8"
    )


__all__ = ["CompressionResult", "compress"]
