"""Tiny checkpoints of every family, from transformers' own classes with random weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# One line for each family and each trait of it: adding a family is adding a line.
CASES = {
    "llama": (LlamaConfig, {"head_dim": 4}),
    "llama-rope-bias-wide-tied": (
        LlamaConfig,
        {"head_dim": 8, "rope_parameters": LLAMA3_ROPE, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": (MistralConfig, {"head_dim": 8, "sliding_window": 5}),
    "mistral-full": (MistralConfig, {"head_dim": 8, "sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-sliding": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "phi3": (Phi3Config, {"hidden_size": 64}),
    "phi3-partial": (Phi3Config, {"hidden_size": 64, "partial_rotary_factor": 0.5}),
}


def scatter(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random numbers on every parameter, biases and norms among them, so that nothing is tested at its start value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((spread * noise).to(parameter.dtype))
    return model.eval()


def stock_model(case: str, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A model of transformers' own class."""
    kind, traits = CASES[case]
    config = kind(**{**SIZES, **traits, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scatter(AutoModelForCausalLM.from_config(config).to(dtype))


def save(model: torch.nn.Module, directory: Path, **options) -> Path:
    """Saves a model without the progress bar's noise."""
    model.save_pretrained(directory, **options)
    return directory


def stock_checkpoint(directory: Path, case: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A checkpoint of transformers' own class."""
    return save(stock_model(case, dtype, **changes), directory)


def store_another_head(directory: Path) -> Path:
    """Store an lm_head beside the embedding that config.json says it is tied to."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    head = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)).to(embedding.dtype)
    save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes by relative name."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
