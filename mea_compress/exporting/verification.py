"""Reload an export with the stock classes and compare it with the compressed checkpoint it was made from."""

import gc
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache

from mea_compress.architectures import Checkpoint
from mea_compress.checkpoint import CheckpointReader
from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.decoding import cache_argument, check_decoding, run_cached
from mea_compress.emit.verification import TOLERANCE as DECODING_TOLERANCE
from mea_compress.emit.verification import relative_difference
from mea_compress.errors import VerificationError
from mea_compress.exporting.fold import HeadBasis, folded
from mea_compress.exporting.form import StockForm
from mea_compress.heads.composed import Array
from mea_compress.measure.cache import cache_bytes
from mea_compress.modeling import register
from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.planning.decisions import WHOLE_MODEL_BYTES

# Largest difference allowed, relative to the largest number, between an export and what it was made from, both computed
# in float32: folding rounds products that were computed, and so not rounded, before.
TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 1e-2, "BF16": 8e-2}
_TOKENS = 24
# The tokens of a layer's check have positions up to this, in steps, so that slow rotary pairs rotate too.
_LARGEST_POSITION = 512


def verify_export(
    source: Checkpoint,
    form: StockForm,
    directory: Path,
    progress: bool = True,
    bases: Sequence[HeadBasis | None] = (),
) -> dict[str, float]:
    """Reload an export with the stock classes and compare it with the checkpoint that it was made from.

    Every layer's attention is run on the same input in both, in float32; a model that is small enough is also loaded
    as a whole and its logits compared. Cache bytes are those of the tensors in a live cache.

    The difference has two parts: that of the function, which folding leaves as it is, and that of rounding folded
    weights to the checkpoint's type. Where this is narrower than float32, the first is measured by itself too.

    Args:
        source: The compressed checkpoint.
        form: Of the export.
        directory: Its export.
        progress: Show a progress bar on stderr.
        bases: Of every layer's exported heads, where they were changed.

    Returns:
        ``attention_difference`` (relative, of weights as they are stored), ``attention_difference_float32`` (of weights
        before they are rounded to what is stored), ``kv_bytes_per_token`` (measured) and, of a small model,
        ``decoding_difference`` and ``logit_difference`` (relative).

    Raises:
        VerificationError: They differ by more than rounding.
    """
    register()
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    reader = CheckpointReader(directory)
    measured, largest, unrounded = 0, 0.0, 0.0
    layers = range(source.config.num_hidden_layers)
    for layer in tqdm(layers, desc="verifying layers", unit="layer", disable=not progress):
        config.num_key_value_heads = form.heads(layer)
        difference, layer_bytes = _check_layer(source, config, reader, layer)
        measured += layer_bytes
        largest = max(largest, difference)
        if DTYPE_BITS[source.dtype] < 32:
            unstored = folded(source, form, layer, bases[layer] if bases else None)
            difference, _ = _check_layer(source, config, reader, layer, unstored)
            unrounded = max(unrounded, difference)
    result: dict[str, float] = {"attention_difference": largest, "kv_bytes_per_token": measured}
    if DTYPE_BITS[source.dtype] < 32:
        result["attention_difference_float32"] = unrounded
    # No stock class holds layers of different numbers of heads as a whole.
    if not form.layer_groups and sum(info.nbytes for info in reader.tensors.values()) <= WHOLE_MODEL_BYTES:
        logits, result["kv_bytes_per_token"], result["decoding_difference"] = _check_model(source, directory)
        result["logit_difference"] = logits
        if source.dtype in ("F32", "F64"):
            largest = max(largest, logits)
    if not (largest <= TOLERANCE[source.dtype] and unrounded <= TOLERANCE["F32"]):  # also true for NaN
        raise VerificationError(f"the export differs from {source.reader.directory} by {largest:.2e}")
    return result


def _check_layer(
    source: Checkpoint,
    config: PreTrainedConfig,
    reader: CheckpointReader,
    layer: int,
    unrounded: Mapping[str, Array] | None = None,
) -> tuple[float, int]:
    """Return the largest relative difference of one layer's attention, and the export's cache bytes per token.

    The export decodes the tokens in three steps with a cache; the compressed layer reads them at once without one.
    Weights in `unrounded` take the place of those that the export has stored.
    """
    family = source.family
    exported_code, exported_prefix = _code(config.model_type), "Llama"
    if config.model_type == family.model_type:
        exported_prefix = family.prefix
    config._attn_implementation = source.model_config._attn_implementation = "eager"
    exported = getattr(exported_code, f"{exported_prefix}Attention")(config, layer).eval()
    compressed = MeaAttention(source.model_config, layer).eval()
    object.__setattr__(compressed, "rotary", None)  # rotates keys that are cached before RoPE; none are here
    for module, tensors in ((exported, reader), (compressed, source.reader)):
        names = [name for name, _ in module.named_parameters()]
        state = {name: tensors.read(family.attention(layer) + name).float() for name in names}
        if module is exported and unrounded is not None:
            state |= {name: torch.from_numpy(rows.copy()).float() for name, rows in unrounded.items()}
        module.load_state_dict(state, strict=False)
        module.layer_idx = 0
    hidden, positions = _layer_input(config, seed=layer)
    mask = torch.full((_TOKENS, _TOKENS), torch.finfo(torch.float32).min).triu(1)[None, None]
    cache = DynamicCache()
    with torch.no_grad():
        cos, sin = getattr(exported_code, f"{exported_prefix}RotaryEmbedding")(config)(hidden, positions)
        outputs = []
        for new in (slice(0, _TOKENS // 2), slice(_TOKENS // 2, _TOKENS - 1), slice(_TOKENS - 1, _TOKENS)):
            filled = {cache_argument(exported): cache}
            outputs.append(
                exported(hidden[:, new], (cos[:, new], sin[:, new]), mask[..., new, : new.stop], **filled)[0]
            )
        rotary = getattr(_code(family.model_type), f"{family.prefix}RotaryEmbedding")(source.model_config)
        expected = compressed(hidden, rotary(hidden, positions), mask, position_ids=positions)[0]
    itemsize = DTYPE_BITS[source.dtype] // 8
    return relative_difference(torch.cat(outputs, 1), expected), cache_bytes(cache) // 4 * itemsize // _TOKENS


def _code(model_type: str) -> Any:
    """Return transformers' module of a family's model classes."""
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def _layer_input(config: PreTrainedConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random hidden states (1, T, D) float32, and ascending positions (1, T) with gaps, from 0 on."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, _TOKENS, config.hidden_size, generator=generator)
    largest = max(_TOKENS, min(_LARGEST_POSITION, config.max_position_embeddings))
    positions = torch.randperm(largest, generator=generator)[:_TOKENS].sort().values[None]
    positions[:, 0] = 0
    return hidden, positions


def _check_model(source: Checkpoint, directory: Path) -> tuple[float, int, float]:
    """Return the largest relative difference of float32 logits, the export's cache bytes per token, and of decoding."""
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, source.config.max_position_embeddings)
    ids = torch.randint(0, source.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        model = _load(directory)
        filled = DynamicCache()  # without the configuration, so that no token slides out of a window
        run_cached(model, ids, filled)
        measured = cache_bytes(filled) // ids.numel()
        model = _in_float32(model)
        logits = model(ids, use_cache=False).logits
        decoding = check_decoding(model, ids[:, : length - length // 3], length // 3, DECODING_TOLERANCE)
        del model
        expected = _in_float32(_load(source.reader.directory))(ids, use_cache=False).logits
    gc.collect()
    return relative_difference(logits, expected), measured, decoding


def _load(directory: Path) -> Any:
    """Return a model in its stored dtype, with the implementation of experts that runs in every dtype."""
    options = {"local_files_only": True, "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def _in_float32(model: Any) -> Any:
    return model.float() if model.dtype in (torch.float16, torch.bfloat16) else model
