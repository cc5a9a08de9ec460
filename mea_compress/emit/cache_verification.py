"""Check an emitted checkpoint whose attention blocks stay as they are: what its cache holds and what comes back of it.

Encoders and decoders are compared with the matrices that they stand for, in float64; a small model as a whole with its
stock class over keys and values that those matrices were applied to. Every kind of layer decodes with a cache as it
does without.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from mea_compress.architectures import Checkpoint
from mea_compress.architectures.geometry import stock_configuration
from mea_compress.checkpoint import as_tensor
from mea_compress.checkpoint.dtypes import DTYPE_BITS
from mea_compress.decoding import check_decoding, run_cached
from mea_compress.emit.comparison import DECODED_TOKENS, TOKENS, TOLERANCE, relative_difference
from mea_compress.errors import VerificationError
from mea_compress.heads.composed import Array, FactoredHeads
from mea_compress.layers.blocks import BlockRunner
from mea_compress.layers.read import read_coded
from mea_compress.layers.store import StoredLayer
from mea_compress.loading import placeholder_tokens
from mea_compress.modeling import register, stock_class
from mea_compress.modeling.encoded_mea import cache_parameter, compose_block


def check_cached(emitted: Checkpoint, whole_model: bool, progress: bool) -> dict[str, Any]:
    """Check every layer, and the whole model where that is asked for.

    Returns:
        As `mea_compress.emit.verification.verify`.

    Raises:
        VerificationError: Decoding with a cache differs.
    """
    measured, largest, itemsize = 0, 0.0, DTYPE_BITS[emitted.dtype] // 8
    layers = [layer for layer in range(emitted.config.num_hidden_layers) if emitted.geometry(layer) is not None]
    for layer in tqdm(layers, desc="verifying layers", unit="layer", disable=not progress):
        difference, width = _check_layer(emitted, layer)
        measured, largest = measured + width * itemsize, max(largest, difference)
    compared = "keys and values of every layer"
    if whole_model:
        difference, measured, decoded = _check_model(emitted)
        largest, compared = max(largest, difference), "logits of the whole model"
    else:
        decoded = decode_blocks(emitted)
    return {
        "compared": compared,
        "largest_difference": largest,
        "kv_bytes_per_token": measured,
        "decoding_difference": decoded,
    }


def decode_blocks(emitted: Checkpoint) -> float:
    """Decode with every kind of layer of a checkpoint, its block alone; return the largest relative difference."""
    kinds: dict[str, int] = {}
    types = getattr(emitted.config, "layer_types", None)
    for layer, spec in enumerate(emitted.config.mea["layers"]):
        if spec is not None:
            plain = {name: value for name, value in spec.items() if name != "block"}
            kinds.setdefault(json.dumps([plain, types and types[layer]], sort_keys=True), layer)
    return max(_decode_block(emitted, layer) for layer in kinds.values())


def _check_layer(emitted: Checkpoint, layer: int) -> tuple[float, int]:
    """Return how far rebuilt heads are from what the matrices make, and the numbers a token that are cached."""
    stored = _stored(emitted, layer)
    block: Any = nn.Module()
    compose_block(block, stored.section)
    for name, array in stored.tensors.items():
        block.get_parameter(name).data = as_tensor(array).float()
    geometry = emitted.geometry(layer)
    assert geometry is not None
    generator = torch.Generator().manual_seed(layer)
    keys, values = (
        torch.randn(1, geometry.heads, TOKENS, geometry.dim(side), generator=generator) for side in ("key", "value")
    )
    with torch.no_grad():
        cached = block.encode(keys, values)
        rebuilt = block.rebuild(*cached)
    differences = []
    for side, heads, result in zip(("key", "value"), (keys, values), rebuilt, strict=True):
        matrix = _projected(read_coded(emitted, layer, side))
        flat = heads.transpose(1, 2).flatten(2).double() @ torch.from_numpy(matrix).T
        differences.append(relative_difference(result.transpose(1, 2).flatten(2), flat.float()))
    return max(differences), sum(side.shape[-1] for side in cached)


def _projected(side: FactoredHeads) -> Array:
    """Return decoder times encoder, (H * d, H * d), float64."""
    return side.expansion() @ side.projection[:, :-1]


def _stored(emitted: Checkpoint, layer: int) -> StoredLayer:
    """Return a layer's encoders and decoders as they were written."""
    prefix = emitted.stored_name(emitted.attention(layer))
    names = [name for name in emitted.reader.tensors if name.startswith(prefix) and "_composition." in name]
    tensors = {name.removeprefix(prefix): emitted.reader.read_array(name) for name in names}
    return StoredLayer(emitted.config.mea["layers"][layer], tensors)


def _check_model(emitted: Checkpoint) -> tuple[float, int, float]:
    """Return the relative difference of logits, the cache bytes per token, and that of decoding."""
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    register()
    directory, options = str(emitted.reader.directory), {"local_files_only": True, "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    config = stock_configuration(emitted.model_config)
    language = config.get_text_config()
    length = min(TOKENS, getattr(language, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(0, language.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    placeholders = torch.tensor(placeholder_tokens(config), dtype=torch.long)
    text = next(token for token in range(language.vocab_size) if token not in placeholders)
    ids[torch.isin(ids, placeholders)] = text
    kind: Any = stock_class(type(config))
    stock: Any = kind.from_pretrained(directory, config=config, dtype=torch.float32, **options)
    maps = {
        layer: [torch.from_numpy(_projected(read_coded(emitted, layer, side))).float() for side in ("key", "value")]
        for layer in range(emitted.config.num_hidden_layers)
        if emitted.geometry(layer) is not None
    }
    for layer, matrices in maps.items():
        stock.get_submodule(emitted.attention(layer).removesuffix(".")).register_forward_pre_hook(
            _projecting(matrices), with_kwargs=True
        )
    with torch.no_grad():
        filled = DynamicCache(config=config)
        run_cached(model, ids[:, :2], filled)
        measured = sum(_cached_numbers(filled.layers[layer]) for layer in maps) * model.dtype.itemsize
        if model.dtype in (torch.float16, torch.bfloat16):
            model = model.float()
        expected = stock.eval()(ids, use_cache=False).logits
        difference = relative_difference(model(ids, use_cache=False).logits, expected)
    steps = min(DECODED_TOKENS, length // 2)
    decoded = check_decoding(model, ids[:, : length - steps], steps, TOLERANCE)
    return difference, measured, decoded


def _cached_numbers(layer: Any) -> int:
    """Return the numbers a token in a layer of a cache, from its tensors (B, N, T, width)."""
    return sum(side.shape[1] * side.shape[3] for side in (layer.keys, layer.values))


def _projecting(matrices: list[torch.Tensor]) -> Any:
    """Return a hook that hands a block a cache which gives its heads back as matrices (H * d, H * d) make them."""

    class Projecting:
        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
            return [
                (side.transpose(1, 2).flatten(2) @ matrix.T).unflatten(-1, (side.shape[1], -1)).transpose(1, 2)
                for side, matrix in zip((keys, values), matrices, strict=True)
            ]

        def get_seq_length(self, *_: Any) -> int:
            return 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind: Any = type(module)
        return args, {**kwargs, cache_parameter(kind): Projecting()}

    return hook


def _decode_block(emitted: Checkpoint, layer: int) -> float:
    """Return how far a layer's attention with a cache is from that without, relative to its largest output."""
    from transformers.cache_utils import DynamicCache

    runner = BlockRunner(emitted, layer, _stored(emitted, layer))
    config = runner.model.config
    length = min(TOKENS, getattr(emitted.config, "max_position_embeddings", None) or TOKENS)
    prompt = max(1, length - DECODED_TOKENS)
    hidden = torch.randn(1, length, emitted.config.hidden_size, generator=torch.Generator().manual_seed(layer))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        expected = runner.send(hidden)
        outputs = [runner.send_next(hidden[:, :prompt], cache, 0)]
        outputs += [runner.send_next(hidden[:, t : t + 1], cache, t) for t in range(prompt, length)]
    difference = relative_difference(torch.cat(outputs, dim=1), expected)
    if not difference <= TOLERANCE:  # also true for NaN
        raise VerificationError(
            f"layer {layer} attends differently with a cache, by {difference:.2e} of its largest output"
        )
    return difference


__all__ = ["check_cached", "decode_blocks"]
