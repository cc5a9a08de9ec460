"""A file that llama.cpp runs, from an export in Llama's format: names, order of channels, explicit frequencies.

llama.cpp rotates neighbouring channels where transformers rotates channels half a head apart, so rows of q_proj and
k_proj are put in its order. Frequencies that are not its base's powers stand in the tensor ``rope_freqs.weight``, as
1 over a frequency with the base 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mea_compress.checkpoint import CheckpointReader, Entry
from mea_compress.errors import RequestError
from mea_compress.exporting.gguf_tokenizer import add_tokenizer, tokenizer_fields
from mea_compress.heads.composed import Array

WEIGHTS = ("stored", "f32", "f16", "bf16", "q8_0")
"""Types of matrices in the file; vectors are float32."""
FILE = "model.gguf"

_STORED = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FACTORS = "rope_freqs.weight"
_MODEL = {
    "rope_freqs": "rope_freqs",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def require_gguf() -> None:
    """Raise `RequestError` where the package that writes such files is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise RequestError(
            "`format` gguf needs the package gguf; pip install 'mea-compress[gguf]', or choose another format"
        ) from None


def check_gguf(directory: Path, config: dict[str, Any]) -> None:
    """Check, before any work, that llama.cpp has a tokenizer and a scaling of RoPE like a checkpoint's.

    Args:
        directory: The checkpoint, for its tokenizer.
        config: config.json of its export in Llama's format.

    Raises:
        RequestError: It has not.
    """
    _frequencies(config)
    tokenizer_fields(directory, config["vocab_size"])


def gguf_bytes(tensors: Iterable[Entry], weights: str, dtype: str) -> int:
    """Return the bytes that tensors take in a file.

    Args:
        tensors: Of an export in Llama's format.
        weights: One of `WEIGHTS`.
        dtype: The safetensors name of the export's own type.
    """
    matrices = _matrix_type(weights, dtype)
    return sum(_stored_bytes(tensor.shape, matrices) for tensor in tensors)


def write_gguf(
    directory: Path, file: Path, name: str, weights: str = "stored", layer_heads: Sequence[int] = ()
) -> None:
    """Write a Llama checkpoint as GGUF, one tensor in memory at a time.

    Args:
        directory: The checkpoint, as `export` writes it in Llama's format.
        file: New file.
        name: Of the model, as the file says it.
        weights: One of `WEIGHTS`; ``stored`` is the checkpoint's own type.
        layer_heads: Key/value heads of every layer where they differ from what the checkpoint's config.json says.

    Raises:
        RequestError: llama.cpp has no tokenizer or no scaling of RoPE like the checkpoint's.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    reader = CheckpointReader(directory)
    matrices = _matrix_type(weights, reader.info("model.norm.weight").dtype)
    kind = matrices.name
    # The same model, but that llama.cpp asks for the heads of each layer by itself (DeciLM's format).
    writer = gguf.GGUFWriter(file, "deci" if layer_heads else "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    heads = list(layer_heads) or [config["num_key_value_heads"]] * config["num_hidden_layers"]
    factors = _add_sizes(writer, config, heads)
    add_tokenizer(writer, tokenizer_fields(directory, config["vocab_size"]))

    shapes = {} if factors is None else {_FACTORS: factors.shape}
    shapes |= {tensor: info.shape for tensor, info in reader.tensors.items()}
    for tensor, shape in shapes.items():
        kept, size = _stored_type(shape, matrices), _stored_bytes(shape, matrices)
        writer.add_tensor_info(_name(tensor), shape, np.dtype(np.float32), size, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, shape in shapes.items():
        rows: Any = factors if tensor == _FACTORS else reader.read_array(tensor).astype(np.float32)
        if ".q_proj." in tensor:
            rows = _neighbours(rows, config["num_attention_heads"])
        if ".k_proj." in tensor:
            rows = _neighbours(rows, heads[int(tensor.split(".")[2])])
        writer.write_tensor_data(gguf.quants.quantize(rows, _stored_type(shape, matrices)))
    writer.close()


def _matrix_type(weights: str, dtype: str) -> Any:
    """Return gguf's type of matrices, given that of the checkpoint."""
    import gguf

    return gguf.GGMLQuantizationType[(_STORED[dtype] if weights == "stored" else weights).upper()]


def _stored_type(shape: tuple[int, ...], matrices: Any) -> Any:
    """Return gguf's type of a tensor: float32 for vectors, and for rows that are no whole blocks."""
    import gguf

    whole_blocks = matrices is not gguf.GGMLQuantizationType.Q8_0 or shape[-1] % 32 == 0
    return matrices if len(shape) > 1 and whole_blocks else gguf.GGMLQuantizationType.F32


def _stored_bytes(shape: tuple[int, ...], matrices: Any) -> int:
    """Return the bytes of a tensor in the file."""
    import gguf

    return math.prod(gguf.quants.quant_shape_to_byte_shape(shape, _stored_type(shape, matrices)))


def _add_sizes(writer: Any, config: dict[str, Any], heads: Sequence[int]) -> Array | None:
    """Write what llama.cpp asks of the shape, and return the factors of frequencies where there are some."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(heads[0] if len(set(heads)) == 1 else list(heads))
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    base, factors = _frequencies(config)
    writer.add_rope_freq_base(base)
    return factors


def _frequencies(config: dict[str, Any]) -> tuple[float, Array | None]:
    """Return the base of the rotary frequencies, and the numbers that they are divided by, (head_dim / 2,)."""
    rope = config["rope_parameters"]
    if rope["rope_type"] == "default":
        return rope["rope_theta"], None
    if rope["rope_type"] == "longrope" and rope["short_factor"] == rope["long_factor"] and rope["rope_theta"] == 1:
        return 1.0, np.array(rope["short_factor"], dtype=np.float32)
    if rope["rope_type"] not in ("linear", "llama3"):
        raise RequestError(
            f"RoPE of the type {rope['rope_type']} is not written as GGUF; export with --format llama and convert that "
            "with llama.cpp's own script"
        )
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    frequencies = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq.double().numpy()
    return 1.0, (1 / frequencies).astype(np.float32)


def _neighbours(rows: Array, heads: int) -> Array:
    """Return rows of a projection, or its bias, with the two channels of every rotary pair beside each other."""
    shape = rows.shape
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape))


def _name(tensor: str) -> str:
    """Return llama.cpp's name of a tensor."""
    stem, kind = tensor.rsplit(".", 1)
    if stem in _MODEL:
        return f"{_MODEL[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


__all__ = ["FILE", "WEIGHTS", "check_gguf", "gguf_bytes", "require_gguf", "write_gguf"]
