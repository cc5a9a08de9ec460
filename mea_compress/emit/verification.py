"""Reload an emitted checkpoint, compare it with explicit attention over the reconstructed heads, and decode with it."""

import copy
import gc
import json
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mea_compress.architectures import Checkpoint, open_checkpoint
from mea_compress.checkpoint import as_tensor
from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.decoding import check_decoding, run_cached
from mea_compress.emit.cache_verification import check_cached, decode_blocks
from mea_compress.emit.comparison import DECODED_TOKENS, TOKENS, TOLERANCE, relative_difference
from mea_compress.errors import VerificationError
from mea_compress.heads.composed import join_heads
from mea_compress.layers.read import read_side
from mea_compress.measure.cache import cache_bytes
from mea_compress.modeling import register
from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.modeling.section_mea import every_head

# Sizes of the model that a layer's attention is decoded in, where the whole is too large.
_SMALL_HIDDEN, _SMALL_MLP, _SMALL_VOCABULARY = 64, 16, 64


def verify(directory: Path, promised_bytes: int, *, whole_model: bool = True, progress: bool = True) -> dict[str, Any]:
    """Reload a checkpoint and check it.

    Every layer's keys and values, as its attention module reads them from what it gives to a cache, must equal those
    of explicit attention whose weights are the reconstructed heads in float64; where the plan says so, the model is
    loaded as a whole and its logits compared. The cache bytes are those of the tensors that are cached. Greedy tokens
    decoded with a cache must be those of whole sequences (see `check_decoding`).

    Args:
        directory: The emitted checkpoint.
        promised_bytes: Cache bytes per token that the plan promises.
        whole_model: Load the model as a whole; otherwise no more than one layer is in memory.
        progress: Show a progress bar on stderr.

    Returns:
        ``largest_difference`` (relative), ``kv_bytes_per_token`` (measured), what was ``compared``, and
        ``decoding_difference`` (relative).

    Raises:
        VerificationError: It does not hold.
    """
    emitted = open_checkpoint(directory)
    if emitted.at_cache:
        result = check_cached(emitted, whole_model, progress)
        _check(result["largest_difference"], result["compared"], result["kv_bytes_per_token"], promised_bytes)
        return result
    measured, largest, model = 0, 0.0, None
    layers = range(emitted.config.num_hidden_layers)
    for layer in tqdm(layers, desc="verifying layers", unit="layer", disable=not progress):
        difference, layer_bytes = _check_layer(emitted, layer)
        measured += layer_bytes
        largest = max(largest, difference)
    compared = "keys and values of every layer"
    if whole_model:
        difference, measured, model = _check_model(emitted)
        largest = max(largest, difference)
        compared = "logits of the whole model"
    _check(largest, compared, measured, promised_bytes)
    return {
        "compared": compared,
        "largest_difference": largest,
        "kv_bytes_per_token": measured,
        "decoding_difference": decode_layers(emitted) if model is None else _decode(model, seed=0),
    }


def _check(largest: float, compared: str, measured: int, promised: int) -> None:
    """Raise unless differences are rounding and the cache is as small as the plan says."""
    if not largest <= TOLERANCE:  # also true for NaN
        raise VerificationError(
            f"the reloaded checkpoint differs from attention over its reconstructed heads by {largest:.2e} ({compared})"
        )
    if measured != promised:
        raise VerificationError(f"the cache holds {measured} bytes per token where the plan says {promised}")


def _check_layer(emitted: Checkpoint, layer: int) -> tuple[float, int]:
    """Return the largest relative difference of a layer's keys and values, and its cache bytes per token."""
    attention = _keys_and_values_of(emitted, layer)
    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(1, TOKENS, emitted.config.hidden_size, generator=generator)
    angles = torch.rand(1, TOKENS, attention.rotary_dim // 2, generator=generator) * 6
    cos, sin = angles.repeat(1, 1, 2).cos(), angles.repeat(1, 1, 2).sin()
    with torch.no_grad():
        cached_keys, cached_values = attention.project(hidden, cos, sin, torch.arange(TOKENS)[None])
        keys, values = attention.expand(cached_keys, cached_values, (cos, sin))
        expected_keys = _explicit_keys(emitted, layer, attention, hidden, cos, sin)
        expected_values = _explicit_heads(emitted, layer, "value", hidden)
    difference = max(_difference_of_heads(keys, expected_keys), _difference_of_heads(values, expected_values))
    itemsize = DTYPE_BITS[emitted.reader.dtype_of(f"{emitted.family.attention(layer)}k_proj.weight")] // 8
    return difference, (cached_keys.numel() + cached_values.numel()) * itemsize // TOKENS


def _keys_and_values_of(emitted: Checkpoint, layer: int) -> MeaAttention:
    """Return a layer's attention in float32, without the projections of queries and output."""
    with torch.device("meta"):
        attention = MeaAttention(emitted.config, layer)
    del attention.q_proj, attention.o_proj
    names = [name for name, _ in attention.named_parameters()]
    prefix = emitted.family.attention(layer)
    state = {name: emitted.reader.read(prefix + name).to(torch.float32) for name in names}
    attention.load_state_dict(state, strict=False, assign=True)
    for module in (attention.key_composition, attention.value_composition):
        if module is not None and any(buffer.is_meta for buffer in module.buffers()):
            tables = type(module)(module.sizes, tuple(module.weight.shape))
            for name, buffer in tables.named_buffers():
                setattr(module, name, buffer)
    return attention


def _difference_of_heads(heads: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference of (B, C, T, d) from (B, H, T, d); pooled heads stand for their whole group."""
    return relative_difference(heads.repeat_interleave(expected.shape[1] // heads.shape[1], dim=1), expected)


def _explicit_heads(emitted: Checkpoint, layer: int, side: str, hidden: torch.Tensor) -> torch.Tensor:
    """Return the reconstructed heads of a side applied to (1, T, D) in float64: (1, H, T, d) float32."""
    heads = as_tensor(read_side(emitted, layer, side))  # (H, d, D + 1)
    ones = hidden.new_ones(*hidden.shape[:-1], 1)
    return torch.einsum("hdx,btx->bhtd", heads, torch.cat((hidden, ones), -1).double()).float()


def _explicit_keys(
    emitted: Checkpoint, layer: int, attention: MeaAttention, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Return the reconstructed keys after their norm and RoPE, (1, H, T, d)."""
    keys = _explicit_heads(emitted, layer, "key", hidden)
    if attention.qk_norm:
        keys = attention.k_norm(keys)
    half = cos.shape[-1] // 2
    real, imaginary, unrotated = keys.split((half, half, keys.shape[-1] - 2 * half), dim=-1)
    c, s = cos[:, None, :, :half], sin[:, None, :, :half]
    return torch.cat((real * c - imaginary * s, imaginary * c + real * s, unrotated), dim=-1)


def decode_layers(emitted: Checkpoint) -> float:
    """Decode with every kind of layer of a checkpoint, each in a small model around its attention.

    The model has one layer with the checkpoint's heads, compositions, positions and masks; its hidden size is cut down
    and its MLP is random, so that no more than one layer's attention is in memory.

    Returns:
        The largest relative difference of logits with a cache from those without.

    Raises:
        VerificationError: Greedy tokens differ.
    """
    if emitted.at_cache:
        return decode_blocks(emitted)
    kinds: dict[str, int] = {}
    windows = getattr(emitted.model_config, "layer_types", None)
    for layer, spec in enumerate(emitted.config.mea["layers"]):
        kinds.setdefault(json.dumps([spec, windows and windows[layer]], sort_keys=True), layer)
    return max(_decode(_small_model(emitted, layer), seed=layer) for layer in kinds.values())


def _decode(model: Any, seed: int) -> float:
    """Decode after a random prompt; see `check_decoding`."""
    length = min(TOKENS, model.config.max_position_embeddings)
    steps = min(DECODED_TOKENS, length // 2)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, model.config.vocab_size, (2, length - steps), generator=generator)
    return check_decoding(model, prompt, steps, TOLERANCE)


def _small_model(emitted: Checkpoint, layer: int) -> Any:
    """Return a float32 model of the family with one layer's attention, on the first channels of its hidden state."""
    from mea_compress.modeling import modeling_mea

    config = _small_config(emitted, layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer)
        model = getattr(modeling_mea, f"Mea{emitted.family.prefix}ForCausalLM")(config).float().eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            tensor = emitted.reader.read(emitted.family.attention(layer) + name)
            if name.startswith("o_proj."):
                tensor = tensor[: config.hidden_size]
            elif name.endswith("_proj.weight"):
                tensor = tensor[:, : config.hidden_size]
            parameter.copy_(tensor)
    return model


def _small_config(emitted: Checkpoint, layer: int) -> Any:
    """Return the checkpoint's configuration cut down to one layer, a small hidden size, MLP and vocabulary."""
    config = copy.deepcopy(emitted.model_config)
    small = {
        "num_hidden_layers": 1,
        "head_dim": emitted.head_dim,
        "hidden_size": min(config.hidden_size, _SMALL_HIDDEN),
        "vocab_size": _SMALL_VOCABULARY,
        "intermediate_size": _SMALL_MLP,
        "moe_intermediate_size": _SMALL_MLP,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mlp_only_layers": [],
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "layer_types": (getattr(config, "layer_types", None) or [None])[layer : layer + 1],
    }
    for name, value in small.items():
        if name == "head_dim" or getattr(config, name, None) is not None:  # what the family has
            setattr(config, name, value)
    config.mea = {**config.mea, "layers": [config.mea["layers"][layer]]}
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    return config


def _check_model(emitted: Checkpoint) -> tuple[float, int, Any]:
    """Return the largest relative difference of logits, the cache bytes per token, and the model in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    register()
    directory = str(emitted.reader.directory)
    options = {"local_files_only": True, "experts_implementation": "eager"}  # the one that runs in every dtype
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        filled = DynamicCache()  # without the configuration, so that no token slides out of a window
        run_cached(model, ids, filled)
        measured = cache_bytes(filled) // ids.numel()
        if model.dtype in (torch.float16, torch.bfloat16):
            model = model.float()
        logits = model(ids, use_cache=False).logits
        expected = _explicit_model(emitted, model)(ids, use_cache=False).logits
    gc.collect()
    return relative_difference(logits, expected), measured, model


def _explicit_model(emitted: Checkpoint, model: Any) -> Any:
    """Return the model with explicit attention over the reconstructed heads: no layer is composed."""
    heads = emitted.config.num_key_value_heads
    config = type(model.config).from_dict(model.config.to_dict())
    config.mea = {**config.mea, "layers": [every_head(heads) for _ in config.mea["layers"]]}
    config._attn_implementation = config._experts_implementation = "eager"
    state = {name: tensor for name, tensor in model.state_dict().items() if "_composition." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = emitted.family.attention(layer)
        for side, name in (("key", "k_proj"), ("value", "v_proj")):
            rows = as_tensor(join_heads(read_side(emitted, layer, side))).to(model.dtype)
            state[f"{prefix}{name}.weight"] = rows[:, :-1]
            if f"{prefix}{name}.bias" in state:
                state[f"{prefix}{name}.bias"] = rows[:, -1]
    with torch.device("meta"):
        explicit = type(model)(config)
    explicit.load_state_dict(state, strict=True, assign=True)
    explicit.model.rotary_emb = model.model.rotary_emb
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        explicit.tie_weights()  # not where config.json says tied and another head is stored, which the loader keeps
    return explicit.eval()
