"""Write a compressed checkpoint as a standard one: entries, configuration, card.

See `mea_compress.exporting.form` for what can be exported, and `mea_compress.exporting.fold` for the folded weights.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mea_compress.architectures import Checkpoint, open_checkpoint
from mea_compress.checkpoint import (
    Entry,
    NewTensor,
    TensorInfo,
    array_dtype,
    read_array,
)
from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.checkpoint.files import write_json
from mea_compress.checkpoint.hub import local_directory
from mea_compress.checkpoint.layout import DEFAULT_SHARD_BYTES
from mea_compress.checkpoint.workspace import already_published, check_free, check_space, open_workspace
from mea_compress.compression import SPARE_BYTES
from mea_compress.emit.directory import copy_other_files, fingerprint, other_bytes, versions, write_config
from mea_compress.emit.tokenizer import keep_tokenizer
from mea_compress.emit.weights import write_shards
from mea_compress.errors import RequestError
from mea_compress.exporting.engines import check_engine, engine_warning
from mea_compress.exporting.fold import HeadBasis, changed_projections
from mea_compress.exporting.form import ExportCost, StockForm, export_cost, rope_settings, stock_form
from mea_compress.exporting.gguf_file import FILE, WEIGHTS, check_gguf, gguf_bytes, require_gguf, write_gguf
from mea_compress.exporting.verification import verify_export
from mea_compress.heads.composed import Array
from mea_compress.planning.sizes import layer_window
from mea_compress.report.cards import export_card
from mea_compress.report.showing import Shown
from mea_compress.report.tables import key_value_table, stock_outlook
from mea_compress.text.reading import TextChoice

REPORT = "export.json"
_FREQUENCIES = ".rotary_emb.inv_freq"  # which early Llama conversions stored, and which are others in an export
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
)


@dataclass(frozen=True, repr=False)
class ExportResult(Shown):
    """An export and what was measured of it.

    Attributes:
        out: The exported checkpoint.
        form: Its attention.
        cost: Its weights and cache against the model before compression.
        verification: Differences and cache bytes, see `verify_export`.
        model_type: Of the exported checkpoint.
        format: ``stock``, ``llama`` or ``gguf``.
        balanced: Whether cached keys and values are in the basis of `mea_compress.exporting.balance`.
        weights: Type of matrices in GGUF, ``stored`` in other formats.
    """

    out: Path
    form: StockForm
    cost: ExportCost
    verification: dict[str, float]
    model_type: str
    format: str
    balanced: bool = False
    weights: str = "stored"

    def to_json(self) -> dict[str, Any]:
        """Return the content of `export --json` and export.json."""
        return {
            "format": self.format,
            "model_type": self.model_type,
            "key_value_heads": list(self.form.layer_groups) or self.form.groups,
            "head_dim": self.form.head_dim,
            **self.cost.to_json(),
            "balanced": self.balanced,
            "weights": self.weights,
            "warning": engine_warning(self.form, self.format),
            "verification": self.verification,
        }

    def report(self) -> str:
        """Return what people read."""
        data = self.to_json()
        parts = [key_value_table(self.verification), stock_outlook(data), f"Written to {self.out}"]
        return "\n\n".join(parts)


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str = "stock",
    engine: str | None = None,
    weights: str = "stored",
    balance: bool = False,
    text: TextChoice | None = None,
    resume: bool = False,
    progress: bool = True,
) -> ExportResult:
    """Write a compressed checkpoint in a format that engines serve without code of this package.

    OUT appears complete or not at all: it is built in a sibling directory, reloaded with the stock classes, checked
    against the compressed checkpoint, and renamed last. One layer is in memory at a time.

    Args:
        checkpoint: A checkpoint of this package, its directory or hub id.
        out: New directory.
        format: ``stock``, the base family's, ``llama``, which every engine knows best, or ``gguf``, a directory with
            the file ``model.gguf`` for llama.cpp.
        engine: What is to serve it, one of `ENGINES`; checked for what it would get wrong.
        weights: Type of matrices in GGUF, one of `WEIGHTS`.
        balance: Put cached keys and values into a basis in which a quantised cache loses less; what is computed in
            full precision stays the same. See `mea_compress.exporting.balance`.
        text: What balancing looks at, as `read_documents` takes it; None samples text from the checkpoint.
        resume: Take up an interrupted run.
        progress: Show progress bars on stderr.

    Raises:
        RequestError: The checkpoint cannot be written in that format exactly, the engine would not run it, or the disk
            does not allow it.
        VerificationError: The export computes something else.

    Example:
        >>> exported = export("HALF", "STOCK", progress=False)
        >>> exported.model_type, exported.form.groups
        ('llama', 1)
    """
    checkpoint, out = local_directory(checkpoint), Path(out).absolute()
    source = open_checkpoint(checkpoint)
    if not source.native:
        raise RequestError(f"{checkpoint} is a {source.family.model_type} checkpoint already; compress it first")
    if source.at_cache:
        raise RequestError(
            f"{checkpoint} composes at the cache of {source.family.model_type}'s own attention, which no stock "
            "checkpoint does; serve it with transformers"
        )
    if source.quantised:
        raise RequestError(
            f"{checkpoint} stores weights in fp8, which no export does; export what an original in bfloat16 became"
        )
    form = stock_form(source, source.config.mea["layers"], format)
    model_type = source.family.model_type if format == "stock" else "llama"
    if engine is not None:
        check_engine(engine, form, model_type, format)
    if format == "gguf":
        require_gguf()
        check_gguf(checkpoint, _config(source, form, format))
    elif weights != "stored":
        raise RequestError("`weights` are chosen for GGUF alone; leave them out or export with --format gguf")
    if text is not None and not balance:
        raise RequestError("`text` is what balancing looks at; leave it out or ask for `balance` too")
    if weights not in WEIGHTS:
        raise RequestError(f"there are no `weights` {weights!r}; choose one of {', '.join(WEIGHTS)}")
    windows = [layer_window(source, layer) for layer in range(source.config.num_hidden_layers)]
    cost = export_cost(source, form, DTYPE_BITS[source.dtype] // 8, windows)
    if resume and (already_published(out) or (out / REPORT).is_file()):
        asked = {"format": format, "weights": weights, "balance": balance}
        return ExportResult(out, form, cost, _finished(out, asked), model_type, format, balance, weights)
    check_free(out, checkpoint)
    bases: Sequence[HeadBasis | None] = [None] * len(windows)
    request = f"{format} {weights}"
    if balance:
        from mea_compress.exporting.balance import balanced_bases, balancing_tokens

        tokens = balancing_tokens(source, text, progress)
        bases = balanced_bases(source, form, tokens, progress)
        request += f" balanced on {hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}"
    entries = _entries(source, form, format, bases)
    needed = sum(entry.nbytes for entry in entries)
    if format == "gguf":  # the checkpoint that the file is made from lies beside it for a moment
        needed += gguf_bytes(entries, weights, source.dtype)
    check_space(out, needed + other_bytes(source.reader) + SPARE_BYTES)
    with open_workspace(out, _fingerprint(source, request), resume) as workspace:
        write_shards(entries, DEFAULT_SHARD_BYTES, workspace, progress)
        write_config(workspace.path, _config(source, form, format))
        copy_other_files(source.reader, workspace.path, ("README.md", REPORT))
        keep_tokenizer(checkpoint, workspace.path)
        measured = verify_export(source, form, workspace.path, progress, bases)
        result = ExportResult(out, form, cost, measured, model_type, format, balance, weights)
        if format == "gguf":
            _replace_by_gguf(workspace.path, _source_name(source), weights, form)
        write_json(workspace.path / REPORT, result.to_json() | {"versions": versions()})
        _write_card(source, result, workspace.path)
        workspace.publish(out)
    return result


def _replace_by_gguf(directory: Path, name: str, weights: str, form: StockForm) -> None:
    """Write the file for llama.cpp, and take away the checkpoint that it was made from, its tokenizer included."""
    write_gguf(directory, directory / FILE, name, weights, form.layer_groups)
    for file in directory.iterdir():
        if file.suffix in (".safetensors", ".json", ".model", ".jinja"):
            file.unlink()


def _finished(out: Path, asked: dict[str, Any]) -> dict[str, float]:
    """Return what an earlier run has measured of the export that it finished.

    Raises:
        RequestError: It was another one.
    """
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        made = {name: report.get("balanced" if name == "balance" else name) for name in asked}
        if made == asked:
            return report["verification"]
    except (OSError, ValueError, KeyError, AttributeError):
        made = {}
    differ = ", ".join(f"`{name}`" for name in asked if made.get(name) != asked[name])
    raise RequestError(f"{out} is finished and was exported with another {differ}; give another directory")


def _fingerprint(source: Checkpoint, target: str) -> dict[str, Any]:
    return {
        "the checkpoint": fingerprint(source.reader, source.raw_config),
        "the format": target,
        "a library version": versions(),
    }


def _config(source: Checkpoint, form: StockForm, target: str) -> dict[str, Any]:
    """Return config.json of the base family, with nothing of this package in it."""
    config = {key: value for key, value in source.raw_config.items() if key not in ("auto_map", "mea")}
    family = source.family
    config["model_type"], config["architectures"] = family.model_type, [f"{family.prefix}ForCausalLM"]
    config["num_key_value_heads"], config["head_dim"] = form.groups, form.head_dim
    if not form.keeps_rope:
        for key in ("partial_rotary_factor", "original_max_position_embeddings"):
            config.pop(key, None)
    config |= rope_settings(source, form)
    if target != "stock":
        for name in _SIZES:  # Llama's class has other defaults than the family's, and a file has none
            config.setdefault(name, getattr(source.config, name))
    if target != "stock" and family.model_type != "llama":
        for key in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
            config.pop(key, None)
        config["model_type"], config["architectures"] = "llama", ["LlamaForCausalLM"]
        config["attention_bias"], config["mlp_bias"] = bool(source.config.mea["bias"]["query"]), False
    return config


def _entries(source: Checkpoint, form: StockForm, target: str, bases: Sequence[HeadBasis | None]) -> list[Entry]:
    """Return all tensors of the export in the order of the source."""
    replaced: dict[str, Entry | None] = {}
    for layer in range(source.config.num_hidden_layers):
        tensors = _layer_entries(source, form, layer, bases[layer])
        fuses = source.family.fused and target == "stock"
        replaced |= _fused_projections(source, layer, tensors) if fuses else tensors
    entries: list[Entry] = []
    for info in source.reader.tensors.values():
        if info.name.endswith(_FREQUENCIES):
            continue
        entry = replaced.get(info.name, info)
        if target != "stock" and info.name.endswith("mlp.gate_up_proj.weight"):
            entries += _gate_and_up(info)
        elif entry is not None:
            entries.append(entry)
        if target != "stock" and info.name.endswith("self_attn.q_proj.bias"):
            name = info.name.replace("q_proj", "o_proj")
            if not source.reader.has(name):  # Llama has biases everywhere or nowhere
                entries.append(_zeros(name, info.dtype, source.config.hidden_size))
    return entries


def _layer_entries(source: Checkpoint, form: StockForm, layer: int, basis: HeadBasis | None) -> dict[str, Entry | None]:
    """Return what takes the place of a layer's tensors, by name; None where nothing does."""
    prefix = source.family.attention(layer)
    hidden_size, width = source.config.hidden_size, source.config.num_attention_heads * form.head_dim
    tensors: dict[str, Entry | None] = {
        prefix + f"{side}_composition.weight": None
        for side in ("key", "value")
        if source.reader.has(prefix + f"{side}_composition.weight")
    }

    def replace_tensor(name: str, shape: tuple[int, ...], produce: Callable[[], Array]) -> None:
        dtype, full_name = source.reader.info(prefix + name).dtype, prefix + name
        tensors[full_name] = NewTensor(full_name, dtype, shape, lambda: _rounded(produce(), dtype, full_name))

    def replace_projection(name: str, rows: int, produce: Callable[[], Array]) -> None:
        """Replace a weight and its bias, which is the last column of what `produce` returns."""
        replace_tensor(f"{name}.weight", (rows, hidden_size), lambda: produce()[:, :-1])
        if source.reader.has(f"{prefix}{name}.bias"):
            replace_tensor(f"{name}.bias", (rows,), lambda: produce()[:, -1])

    rows = {"q_proj": width, "k_proj": form.heads(layer) * form.head_dim, "v_proj": form.heads(layer) * form.head_dim}
    for name, produce in changed_projections(source, form, layer, basis).items():
        if name == "o_proj":
            replace_tensor("o_proj.weight", (hidden_size, width), produce)
        else:
            replace_projection(name, rows[name], produce)
    return tensors


def _fused_projections(source: Checkpoint, layer: int, tensors: dict[str, Entry | None]) -> dict[str, Entry | None]:
    """Return a layer's tensors with queries, keys and values stacked in the one projection that the family has."""
    prefix = source.family.attention(layer)
    names = [f"{prefix}{side}_proj.weight" for side in "qkv"]
    projections = [tensors.get(name) or source.reader.info(name) for name in names]
    rows, columns = sum(entry.shape[0] for entry in projections), projections[0].shape[1]

    def produce() -> Array:
        return np.concatenate(
            [entry.produce() if isinstance(entry, NewTensor) else read_array(entry) for entry in projections]
        )

    stacked = NewTensor(f"{prefix}{source.family.fused}.weight", projections[0].dtype, (rows, columns), produce)
    return tensors | {names[0]: stacked, names[1]: None, names[2]: None}


def _gate_and_up(info: TensorInfo) -> list[Entry]:
    """Return the gate and up projections that a family stacks."""
    rows, half = info.shape[0] // 2, info.nbytes // 2
    shape = (rows, *info.shape[1:])
    return [
        replace(info, name=info.name.replace("gate_up", name), shape=shape, offset=info.offset + i * half, nbytes=half)
        for i, name in enumerate(("gate", "up"))
    ]


def _zeros(name: str, dtype: str, size: int) -> NewTensor:
    return NewTensor(name, dtype, (size,), lambda: np.zeros(size, array_dtype(dtype)))


def _rounded(array: Array, dtype: str, name: str) -> Array:
    """Return the array in a stored dtype, or raise if a number does not fit into it."""
    with np.errstate(over="ignore"):
        rounded = array.astype(array_dtype(dtype))
    if not np.isfinite(rounded).all():
        raise RequestError(f"{name} has numbers too large for {dtype}; compress with --dtype bfloat16 and export that")
    return rounded


def _write_card(source: Checkpoint, result: ExportResult, target: Path) -> None:
    name, card = _source_name(source), source.reader.directory / "README.md"
    original = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    text = export_card(name, result.to_json(), versions(), original)
    (target / "README.md").write_text(text, encoding="utf-8")


def _source_name(source: Checkpoint) -> str:
    """Return the name of the model before compression."""
    record = source.reader.directory / "compression.json"
    return json.loads(record.read_text())["source"] if record.is_file() else source.name
