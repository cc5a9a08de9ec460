"""Reload an emitted checkpoint, compare it with plain attention over its composed heads, and decode with it."""

import copy
import gc
import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mea_compress.architectures import Source, open_source
from mea_compress.checkpoint import as_tensor
from mea_compress.decoding import check_decoding, run_cached
from mea_compress.errors import VerificationError
from mea_compress.heads.composed import join_heads
from mea_compress.layers.read import read_side
from mea_compress.modeling import register
from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.modeling.section_mea import every_head
from mea_compress.plan.planning import WHOLE_MODEL_BYTES

# Largest difference allowed, relative to the largest number compared, when everything is computed in float32.
TOLERANCE = 1e-4
_TOKENS = 24
# Tokens that are decoded greedily after a prompt, with a cache and without.
_DECODED_TOKENS = 8
# Sizes of the model that a layer's attention is decoded in, where the whole is too large.
_SMALL_HIDDEN, _SMALL_MLP, _SMALL_VOCABULARY = 64, 16, 64


def verify(directory: Path, promised_bytes: int, progress: bool = True) -> dict[str, Any]:
    """Reloads a checkpoint and checks it.

    Every layer's keys and values, as its attention module reads them from what it gives to a cache, must equal those
    of plain attention whose weights are the composed heads multiplied out in float64; a model that is small enough is
    also loaded as a whole and its logits compared. The cache bytes are those of the tensors that are cached. Greedy
    tokens decoded with a cache must be those of whole sequences (see `verify_decoding`).

    Args:
        directory: The emitted checkpoint.
        promised_bytes: Cache bytes per token that the plan promises.
        progress: Show a progress bar on stderr.

    Returns:
        ``largest_difference`` (relative), ``kv_bytes_per_token`` (measured), what was ``compared``, and
        ``decoding_difference`` (relative).

    Raises:
        VerificationError: It does not hold.
    """
    emitted = open_source(directory)
    measured, worst, model = 0, 0.0, None
    layers = range(emitted.config.num_hidden_layers)
    for layer in tqdm(layers, desc="verifying layers", unit="layer", disable=not progress):
        difference, layer_bytes = _check_layer(emitted, layer)
        measured += layer_bytes
        worst = max(worst, difference)
    result: dict[str, Any] = {"compared": "keys and values of every layer", "largest_difference": worst}
    if emitted.weight_bytes <= WHOLE_MODEL_BYTES:
        difference, whole_bytes, model = _check_model(emitted)
        measured = whole_bytes
        worst = max(worst, difference)
        result = {"compared": "logits of the whole model", "largest_difference": worst}
    if not worst <= TOLERANCE:  # also true for NaN
        raise VerificationError(
            f"the reloaded checkpoint differs from the composed model by {worst:.2e} ({result['compared']})"
        )
    if measured != promised_bytes:
        raise VerificationError(f"the cache holds {measured} bytes per token where the plan says {promised_bytes}")
    decoding = decode_layers(emitted) if model is None else _decode(model, seed=0)
    return result | {"kv_bytes_per_token": measured, "decoding_difference": decoding}


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds."""
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim() > 0)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected number; infinite where something is not a number."""
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error


def _check_layer(emitted: Source, layer: int) -> tuple[float, int]:
    """Largest relative difference of a layer's keys and values, and its cache bytes per token."""
    config, prefix = emitted.config, emitted.family.attention(layer)
    with torch.device("meta"):
        attention = MeaAttention(config, layer)
    del attention.q_proj, attention.o_proj  # only keys and values are looked at
    names = [name for name, _ in attention.named_parameters()]
    state = {name: emitted.reader.read(prefix + name).to(torch.float32) for name in names}
    attention.load_state_dict(state, strict=False, assign=True)
    for module in (attention.key_composition, attention.value_composition):
        if module is not None and any(buffer.is_meta for buffer in module.buffers()):
            tables = type(module)(module.sizes, tuple(module.weight.shape))
            for name, buffer in tables.named_buffers():
                setattr(module, name, buffer)

    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(1, _TOKENS, config.hidden_size, generator=generator)
    angles = torch.rand(1, _TOKENS, attention.rotary_dim // 2, generator=generator) * 6
    cos, sin = angles.repeat(1, 1, 2).cos(), angles.repeat(1, 1, 2).sin()

    def rotary(_: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos[:, positions[0]], sin[:, positions[0]]

    with torch.no_grad():
        keys, values = attention.project(hidden, cos, sin)
        found_keys, found_values = attention.expand(keys, values, torch.arange(_TOKENS)[None], None, rotary)
        expected_keys = _plain_keys(emitted, layer, attention, hidden, cos, sin)
        expected_values = _plain_heads(emitted, layer, "value", hidden)
    worst = 0.0
    for found, expected in ((found_keys, expected_keys), (found_values, expected_values)):
        repeat = expected.shape[1] // found.shape[1]  # pooled heads stand for their whole group
        worst = max(worst, relative_difference(found.repeat_interleave(repeat, dim=1), expected))
    itemsize = emitted.reader.info(f"{prefix}k_proj.weight").nbytes // math.prod(
        emitted.reader.info(f"{prefix}k_proj.weight").shape
    )
    return worst, (keys.numel() + values.numel()) * itemsize // _TOKENS


def _plain_heads(emitted: Source, layer: int, side: str, hidden: torch.Tensor) -> torch.Tensor:
    """The composed heads of a side, multiplied out, applied to (1, T, D): (1, H, T, d)."""
    heads = as_tensor(read_side(emitted, layer, side))  # (H, d, D + 1)
    ones = hidden.new_ones(*hidden.shape[:-1], 1)
    return torch.einsum("hdx,btx->bhtd", heads, torch.cat((hidden, ones), -1).double()).float()


def _plain_keys(
    emitted: Source, layer: int, attention: MeaAttention, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    keys = _plain_heads(emitted, layer, "key", hidden)
    if attention.qk_norm:
        keys = attention.k_norm(keys)
    half = cos.shape[-1] // 2
    turned, rest = keys[..., : 2 * half], keys[..., 2 * half :]
    real, imaginary = turned[..., :half], turned[..., half:]
    c, s = cos[:, None, :, :half], sin[:, None, :, :half]
    return torch.cat((real * c - imaginary * s, imaginary * c + real * s, rest), dim=-1)


def decode_layers(emitted: Source) -> float:
    """Decode with every kind of layer of a checkpoint, each in a small model around its own attention.

    The model has one layer and the checkpoint's own heads, compositions, positions and masks; its hidden size is cut
    down and its MLP is random, so that no more than one layer's attention is in memory.

    Returns:
        The largest relative difference of logits with a cache from those without.

    Raises:
        VerificationError: Greedy tokens differ.
    """
    kinds: dict[str, int] = {}
    windows = getattr(emitted.model_config, "layer_types", None)
    for layer, spec in enumerate(emitted.config.mea["layers"]):
        kinds.setdefault(json.dumps([spec, windows and windows[layer]], sort_keys=True), layer)
    return max(_decode(_small_model(emitted, layer), seed=layer) for layer in kinds.values())


def _decode(model: Any, seed: int) -> float:
    """Decode after a random prompt; see `check_decoding`."""
    length = min(_TOKENS, model.config.max_position_embeddings)
    steps = min(_DECODED_TOKENS, length // 2)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, model.config.vocab_size, (2, length - steps), generator=generator)
    return check_decoding(model, prompt, steps, TOLERANCE)


def _small_model(emitted: Source, layer: int) -> Any:
    """One layer's attention, with the first channels of its hidden state, in a model of its family, float32."""
    from mea_compress.modeling import modeling_mea

    config = copy.deepcopy(emitted.model_config)
    hidden = min(config.hidden_size, _SMALL_HIDDEN)
    small = {
        "num_hidden_layers": 1,
        "head_dim": emitted.head_dim,
        "hidden_size": hidden,
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
        if name == "head_dim" or getattr(config, name, None) is not None:
            setattr(config, name, value)
    config.mea = {**config.mea, "layers": [config.mea["layers"][layer]]}
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    prefix = emitted.family.attention(layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer)
        model = getattr(modeling_mea, f"Mea{emitted.family.prefix}ForCausalLM")(config).float().eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            tensor = emitted.reader.read(prefix + name)
            if name.startswith("o_proj."):
                tensor = tensor[:hidden]
            elif name.endswith("_proj.weight"):
                tensor = tensor[:, :hidden]
            parameter.copy_(tensor)
    return model


def _check_model(emitted: Source) -> tuple[float, int, Any]:
    """Largest relative difference of logits, cache bytes per token, and the loaded model in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    register()
    directory = str(emitted.reader.directory)
    options = {"local_files_only": True, "experts_implementation": "eager"}  # the one that runs in every dtype
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        filled = DynamicCache()  # without the configuration, so that no token slides out of a window
        run_cached(model, ids, filled)
        measured = cache_bytes(filled) // ids.numel()
        if model.dtype in (torch.float16, torch.bfloat16):
            model = model.float()
        found = model(ids, use_cache=False).logits
        expected = _composed_model(emitted, model)(ids, use_cache=False).logits
    gc.collect()
    return relative_difference(found, expected), measured, model


def _composed_model(emitted: Source, model: Any) -> Any:
    """The model with every composition multiplied out: plain attention over all heads."""
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
        plain = type(model)(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.model.rotary_emb = model.model.rotary_emb
    plain.tie_weights()
    return plain.eval()


__all__ = ["VerificationError", "cache_bytes", "decode_layers", "relative_difference", "verify"]
