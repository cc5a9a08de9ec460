"""A compressed checkpoint written as a stock one: compositions folded into q_proj and o_proj, exactly.

With E the map from components to heads, query head i of group g becomes q̃_i = s · E_gᵀ q_i and its columns of o_proj
W̃_i = W_i E_g. s keeps the softmax scale: √(new head_dim / old head_dim), times the square of the factor that the
source's RoPE puts on cos and sin. Rows of k_proj are put in the order of RoPE's halves; values stay as they are. See
`mea_compress.export.form` for what can be exported.
"""

import gc
import hashlib
import importlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from mea_compress.architectures import Source, open_source
from mea_compress.checkpoint import (
    CheckpointReader,
    Entry,
    NewTensor,
    TensorInfo,
    array_dtype,
    read_array,
)
from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.checkpoint.workspace import already_published, check_free, check_space, open_workspace
from mea_compress.checkpoint.writer import DEFAULT_SHARD_BYTES
from mea_compress.compression import SPARE_BYTES, versions
from mea_compress.decoding import cache_argument, check_decoding, run_cached
from mea_compress.emit.code import CODE_FILES
from mea_compress.emit.verification import TOLERANCE as DECODING_TOLERANCE
from mea_compress.emit.verification import cache_bytes, relative_difference
from mea_compress.emit.weights import write_shards
from mea_compress.errors import RequestError, VerificationError
from mea_compress.export.form import Growth, StockForm, growth, rope_parameters, rotary, stock_form
from mea_compress.heads.composed import Array, FactoredHeads, join_heads, split_heads
from mea_compress.layers.read import read_composed, read_projection
from mea_compress.modeling import register
from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.modeling.section_mea import rotary_pairs, side_form
from mea_compress.plan.planning import WHOLE_MODEL_BYTES, layer_window
from mea_compress.report.tables import export_card, write_json

REPORT = "export.json"
# Largest difference allowed, relative to the largest number, between what is exported and what it was made from, both
# computed in float32: folding rounds products that were computed, and so not rounded, before.
TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 1e-2, "BF16": 8e-2}
_TOKENS, _REACH = 24, 512


@dataclass(frozen=True)
class ExportResult:
    """What `export` made.

    Attributes:
        out: The exported checkpoint.
        form: Its attention.
        growth: Its weights and cache against the model before compression.
        verification: What was measured.
        model_type: Of the exported checkpoint.
    """

    out: Path
    form: StockForm
    growth: Growth
    verification: dict[str, Any]
    model_type: str

    def to_json(self) -> dict[str, Any]:
        """`export --json`, also written to export.json."""
        return {
            "model_type": self.model_type,
            "key_value_heads": self.form.groups,
            "head_dim": self.form.head_dim,
            **self.growth.to_json(),
            "verification": self.verification,
        }


def export(
    checkpoint: Path, out: Path, format: str = "stock", progress: bool = True, resume: bool = False
) -> ExportResult:
    """Writes a compressed checkpoint in a format that engines serve without code of this package.

    OUT appears complete or not at all: it is built beside its place, reloaded with the stock classes, checked against
    the compressed checkpoint, and renamed last. One layer is in memory at a time.

    Args:
        checkpoint: A checkpoint of this package.
        out: New directory.
        format: ``stock``, the base family's own, or ``llama``, which every engine knows best.
        progress: Show progress bars on stderr.
        resume: Take up an interrupted run.

    Raises:
        RequestError: The checkpoint cannot be written in that format exactly, or the disk does not allow it.
        VerificationError: What was written computes something else.
    """
    checkpoint, out = Path(checkpoint), Path(out).absolute()
    source = open_source(checkpoint)
    if not source.native:
        raise RequestError(f"{checkpoint} is a {source.family.model_type} checkpoint already; compress it first")
    form = stock_form(source, source.config.mea["layers"], format)
    itemsize = DTYPE_BITS[source.dtype] // 8
    windows = [layer_window(source, layer) for layer in range(source.config.num_hidden_layers)]
    cost = growth(source, form, itemsize, windows)
    model_type = source.family.model_type if format == "stock" else format
    if resume and already_published(out):
        return ExportResult(out, form, cost, json.loads((out / REPORT).read_text())["verification"], model_type)
    check_free(out, checkpoint)
    entries = _entries(source, form, format)
    others = [source.reader.directory / name for name in source.reader.other_files()]
    check_space(out, sum(entry.nbytes for entry in entries) + sum(f.stat().st_size for f in others) + SPARE_BYTES)
    with open_workspace(out, _fingerprint(source, format), resume) as workspace:
        write_shards(entries, DEFAULT_SHARD_BYTES, workspace, progress)
        write_json(workspace.path / "config.json", _config(source, form, format))
        _copy_other_files(source, workspace.path)
        result = ExportResult(out, form, cost, verify_export(source, workspace.path, progress), model_type)
        write_json(workspace.path / REPORT, result.to_json() | {"versions": versions()})
        _write_card(source, result, workspace.path)
        workspace.publish(out)
    return result


def _fingerprint(source: Source, target: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for info in source.reader.tensors.values():
        stat = info.file.stat()
        digest.update(f"{info.name} {info.dtype} {info.shape} {info.offset} {stat.st_size} {stat.st_mtime_ns}".encode())
    digest.update(repr(source.raw_config).encode())
    return {"the checkpoint": digest.hexdigest(), "the format": target, "a library version": versions()}


def _config(source: Source, form: StockForm, target: str) -> dict[str, Any]:
    """config.json of the base family, with nothing of this package in it."""
    config = {key: value for key, value in source.raw_config.items() if key not in ("auto_map", "mea")}
    family = source.family
    config["model_type"], config["architectures"] = family.model_type, [f"{family.prefix}ForCausalLM"]
    config["num_key_value_heads"], config["head_dim"] = form.groups, form.head_dim
    if not form.own_rope:
        rope = rope_parameters(source, form)
        for key in ("partial_rotary_factor", "original_max_position_embeddings"):
            config.pop(key, None)
        # Libraries older than transformers 5 read the two other names of the same settings.
        config["rope_parameters"], config["rope_theta"] = rope, rope["rope_theta"]
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if target == "llama" and family.model_type != "llama":
        for key in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
            config.pop(key, None)
        config["model_type"], config["architectures"] = "llama", ["LlamaForCausalLM"]
        config["attention_bias"], config["mlp_bias"] = bool(source.config.mea["bias"]["query"]), False
    return config


def _entries(source: Source, form: StockForm, target: str) -> list[Entry]:
    """All tensors of the export in the order of the source."""
    new: dict[str, Entry | None] = {}
    for layer in range(source.config.num_hidden_layers):
        made = _layer_entries(source, form, layer)
        new |= _fused(source, layer, made) if source.family.fused and target == "stock" else made
    entries: list[Entry] = []
    for info in source.reader.tensors.values():
        entry = new.get(info.name, info)
        if target == "llama" and info.name.endswith("mlp.gate_up_proj.weight"):
            entries += _halves(info)
        elif entry is not None:
            entries.append(entry)
        if target == "llama" and info.name.endswith("self_attn.q_proj.bias"):
            name = info.name.replace("q_proj", "o_proj")
            if not source.reader.has(name):  # Llama has biases everywhere or nowhere
                entries.append(_zeros(name, info.dtype, source.config.hidden_size))
    return entries


def _fused(source: Source, layer: int, made: dict[str, Entry | None]) -> dict[str, Entry | None]:
    """The same with queries, keys and values stacked in the one projection that the family has."""
    prefix = source.family.attention(layer)
    names = [f"{prefix}{side}_proj.weight" for side in "qkv"]
    parts = [made.pop(name, None) or source.reader.info(name) for name in names]
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]

    def produce() -> Array:
        return np.concatenate([part.produce() if isinstance(part, NewTensor) else read_array(part) for part in parts])

    stacked = NewTensor(f"{prefix}{source.family.fused}.weight", parts[0].dtype, (rows, columns), produce)
    return made | {names[0]: stacked, names[1]: None, names[2]: None}


def _halves(info: TensorInfo) -> list[Entry]:
    """The gate and up projections that a family stacks."""
    rows, half = info.shape[0] // 2, info.nbytes // 2
    shape = (rows, *info.shape[1:])
    return [
        replace(info, name=info.name.replace("gate_up", part), shape=shape, offset=info.offset + i * half, nbytes=half)
        for i, part in enumerate(("gate", "up"))
    ]


def _zeros(name: str, dtype: str, size: int) -> NewTensor:
    return NewTensor(name, dtype, (size,), lambda: np.zeros(size, array_dtype(dtype)))


def _layer_entries(source: Source, form: StockForm, layer: int) -> dict[str, Entry | None]:
    """What takes the place of a layer's tensors, by name; None where nothing does."""
    spec, prefix = source.config.mea["layers"][layer], source.family.attention(layer)
    rows = {"q_proj": source.config.num_attention_heads * form.head_dim, "k_proj": form.groups * form.head_dim}

    def make(name: str, shape: tuple[int, ...], produce: Callable[[], Array]) -> NewTensor:
        dtype = source.reader.info(prefix + name).dtype
        return NewTensor(prefix + name, dtype, shape, lambda: _rounded(produce(), dtype, prefix + name))

    made: dict[str, Entry | None] = {
        prefix + f"{side}_composition.weight": None
        for side in ("key", "value")
        if source.reader.has(prefix + f"{side}_composition.weight")
    }
    producers = {"q_proj": absorbed_queries, "k_proj": ordered_keys}
    for name in producers if not side_form(spec, "key").plain or not form.own_rope else ():

        def weight(name: str = name) -> Array:
            return producers[name](source, form, layer)[:, :-1]

        def bias(name: str = name) -> Array:
            return producers[name](source, form, layer)[:, -1]

        shape = (rows[name], source.config.hidden_size)
        made[prefix + name + ".weight"] = make(f"{name}.weight", shape, weight)
        if source.reader.has(f"{prefix}{name}.bias"):
            made[prefix + name + ".bias"] = make(f"{name}.bias", shape[:1], bias)
    if not side_form(spec, "value").plain or form.head_dim != source.head_dim:
        made[prefix + "o_proj.weight"] = make(
            "o_proj.weight", (source.config.hidden_size, rows["q_proj"]), lambda: absorbed_output(source, form, layer)
        )
    return made


def _rounded(array: Array, dtype: str, name: str) -> Array:
    with np.errstate(over="ignore"):
        found = array.astype(array_dtype(dtype))
    if not np.isfinite(found).all():
        raise RequestError(f"{name} has numbers too large for {dtype}; compress with --dtype bfloat16 and export that")
    return found


def absorbed_queries(source: Source, form: StockForm, layer: int) -> Array:
    """q_proj with the key composition in it: (Hq · head_dim of the form, D + 1), float64."""
    composed = read_composed(source, layer, "key")
    blocks = _blocks(composed, form, _key_rows(composed, form, source.rotary_dim))  # (H, d, width)
    scale = 1.0
    if not form.own_rope:
        _, factor = rotary(source)
        scale = factor**2 * math.sqrt(form.head_dim / source.head_dim)
    query = read_projection(source, layer, "query")
    query = query.reshape(len(blocks), -1, source.head_dim, query.shape[1])  # (H, group, d, D + 1)
    return scale * (blocks.mT[:, None] @ query).reshape(-1, query.shape[-1])


def ordered_keys(source: Source, form: StockForm, layer: int) -> Array:
    """k_proj with its rows in the order of the form: (groups · head_dim of the form, D + 1), float64."""
    composed = read_composed(source, layer, "key")
    return composed.projection[_key_rows(composed, form, source.rotary_dim)]


def absorbed_output(source: Source, form: StockForm, layer: int) -> Array:
    """o_proj with the value composition in it: (D, Hq · head_dim of the form), float64."""
    blocks = _blocks(read_composed(source, layer, "value"), form)
    weight = source.reader.read_array(f"{source.family.attention(layer)}o_proj.weight").astype(np.float64)
    weight = weight.reshape(len(weight), len(blocks), -1, source.head_dim)  # (D, H, group, d)
    return (weight @ blocks).reshape(len(weight), -1)


def _blocks(composed: FactoredHeads, form: StockForm, order: list[int] | None = None) -> Array:
    """Every head from the components of its group, put in an order, (H, d, head_dim of the form)."""
    expansion = composed.expansion()  # (H * d, groups * width)
    if order is not None:
        expansion = expansion[:, order]
    groups, channels = form.groups, len(expansion) // form.groups
    parts = expansion.reshape(groups, channels, groups, -1).swapaxes(1, 2)  # (n, n, H/n * d, width)
    own = np.eye(groups, dtype=bool)
    if parts[~own].any():
        raise RequestError(
            "heads are composed across the groups that config.json says; set groups to 1 in its mea section, or "
            "compress again with --kv-groups and --rotary-budget uniform"
        )
    return split_heads(join_heads(parts[own]), composed.head_dim)


def _key_rows(composed: FactoredHeads, form: StockForm, rotary_dim: int) -> list[int]:
    """Rows of k_proj in the form's order: for each group, the first channels of its lanes by pair, then the second."""
    lanes: list[tuple[int, int, int, int]] = []  # group, pair, first row, second row
    if composed.form.per_pair:
        assert composed.rotary_components is not None
        total = sum(composed.rotary_components)
        for pair, count in enumerate(composed.rotary_components):
            for i in range(count):
                lanes.append((i * form.groups // count, pair, len(lanes), total + len(lanes)))
    else:
        first, second = rotary_pairs(composed.head_dim, rotary_dim)
        components = len(composed.projection) // composed.head_dim
        for c in range(components):
            start = c * composed.head_dim
            for pair, (a, b) in enumerate(zip(first, second, strict=True)):
                lanes.append((c * form.groups // components, pair, start + a, start + b))
    rows = []
    for group in range(form.groups):
        own = sorted(lane[1:] for lane in lanes if lane[0] == group)
        rows += [lane[1] for lane in own] + [lane[2] for lane in own]
    return rows


def _copy_other_files(source: Source, target: Path) -> None:
    """Tokenizer, chat template, generation config and the rest, but for the code and the card."""
    for relative in source.reader.other_files():
        if relative.name in CODE_FILES or str(relative) in ("README.md", REPORT):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.reader.directory / relative, target / relative)


def _write_card(source: Source, result: ExportResult, target: Path) -> None:
    directory = source.reader.directory
    record = directory / "compression.json"
    name = json.loads(record.read_text())["source"] if record.is_file() else directory.resolve().name
    card = directory / "README.md"
    original = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    text = export_card(name, result.to_json(), versions(), original)
    (target / "README.md").write_text(text, encoding="utf-8")


def verify_export(source: Source, directory: Path, progress: bool = True) -> dict[str, Any]:
    """Reloads an export with the stock classes and holds it against the checkpoint that it was made from.

    Every layer's attention is run on the same input in both, in float32; a model that is small enough is also loaded
    as a whole and its logits compared. Cache bytes are those of the tensors in a live cache.

    Args:
        source: The compressed checkpoint.
        directory: Its export.
        progress: Show a progress bar on stderr.

    Raises:
        VerificationError: They differ by more than rounding, or the cache is larger.
    """
    register()
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    reader = CheckpointReader(directory)
    measured, worst = 0, 0.0
    layers = range(source.config.num_hidden_layers)
    for layer in tqdm(layers, desc="verifying layers", unit="layer", disable=not progress):
        difference, layer_bytes = _check_layer(source, config, reader, layer)
        measured += layer_bytes
        worst = max(worst, difference)
    result: dict[str, Any] = {"attention_difference": worst, "kv_bytes_per_token": measured}
    dtype = source.dtype
    if sum(info.nbytes for info in reader.tensors.values()) <= WHOLE_MODEL_BYTES:
        logits, result["kv_bytes_per_token"], result["decoding_difference"] = _check_model(source, directory)
        result["logit_difference"] = logits
        if dtype in ("F32", "F64"):
            worst = max(worst, logits)
    if not worst <= TOLERANCE[dtype]:  # also true for NaN
        raise VerificationError(f"the export differs from {source.reader.directory} by {worst:.2e}")
    return result


def _check_layer(source: Source, config: Any, reader: CheckpointReader, layer: int) -> tuple[float, int]:
    """Largest relative difference of one layer's attention, decoded with a cache, and its cache bytes per token."""
    prefix = source.family.prefix if config.model_type == source.family.model_type else "Llama"
    code = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    emitted = importlib.import_module(
        f"transformers.models.{source.family.model_type}.modeling_{source.family.model_type}"
    )
    hidden_size, weights = config.hidden_size, source.family.attention(layer)
    config._attn_implementation = source.model_config._attn_implementation = "eager"
    stock = getattr(code, f"{prefix}Attention")(config, layer).eval()
    mine = MeaAttention(source.model_config, layer).eval()
    object.__setattr__(mine, "rotary", None)  # turns keys that are cached before RoPE; none are here
    for module, tensors in ((stock, reader), (mine, source.reader)):
        state = {name: tensors.read(weights + name).float() for name, _ in module.named_parameters()}
        module.load_state_dict(state, strict=False)
        module.layer_idx = 0
    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(1, _TOKENS, hidden_size, generator=generator)
    reach = max(_TOKENS, min(_REACH, config.max_position_embeddings))
    positions = torch.randperm(reach, generator=generator)[:_TOKENS].sort().values[None]
    positions[:, 0] = 0
    mask = torch.full((_TOKENS, _TOKENS), torch.finfo(torch.float32).min).triu(1)[None, None]
    cache = DynamicCache()
    with torch.no_grad():
        cos, sin = getattr(code, f"{prefix}RotaryEmbedding")(config)(hidden, positions)
        found = []
        for new in (slice(0, _TOKENS // 2), slice(_TOKENS // 2, _TOKENS - 1), slice(_TOKENS - 1, _TOKENS)):
            held = {cache_argument(stock): cache}
            found.append(stock(hidden[:, new], (cos[:, new], sin[:, new]), mask[..., new, : new.stop], **held)[0])
        turns = getattr(emitted, f"{source.family.prefix}RotaryEmbedding")(source.model_config)(hidden, positions)
        expected = mine(hidden, turns, mask, position_ids=positions)[0]
    itemsize = DTYPE_BITS[source.dtype] // 8
    return relative_difference(torch.cat(found, 1), expected), cache_bytes(cache) // 4 * itemsize // _TOKENS


def _check_model(source: Source, directory: Path) -> tuple[float, int, float]:
    """Largest relative difference of logits in float32, cache bytes per token of the export, and that of decoding."""
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, source.config.max_position_embeddings)
    ids = torch.randint(0, source.config.vocab_size, (2, length), generator=generator)
    found, measured, decoding = [], 0, 0.0
    for place in (directory, source.reader.directory):
        options = {"local_files_only": True, "experts_implementation": "eager"}
        model: Any = AutoModelForCausalLM.from_pretrained(place, **options).eval()
        with torch.no_grad():
            if place == directory:
                filled = DynamicCache()  # without the configuration, so that no token slides out of a window
                run_cached(model, ids, filled)
                measured = cache_bytes(filled) // ids.numel()
            if model.dtype in (torch.float16, torch.bfloat16):
                model = model.float()
            found.append(model(ids, use_cache=False).logits)
            if place == directory:
                decoding = check_decoding(model, ids[:, : length - length // 3], length // 3, DECODING_TOLERANCE)
        del model
    gc.collect()
    return relative_difference(*found), measured, decoding


__all__ = ["ExportResult", "VerificationError", "export", "verify_export"]
