"""What several benchmarks share: the machine and library versions of a row, and a checkpoint of random weights."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()  # of loading weights, between the rows


def machine(device: str | torch.device) -> str:
    """Return the GPU, if the device is one, and the processor, in words."""
    processor = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return processor if torch.device(device).type == "cpu" else f"{torch.cuda.get_device_name(device)}, {processor}"


def versions() -> dict[str, str]:
    """Return the versions of what computes, as far as it is installed."""
    known = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton", "accelerate", "numpy"):
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        known["cuda"] = torch.version.cuda
    return known


def write_random_llama(directory: Path, dtype: torch.dtype, seed: int = 0, **sizes: Any) -> None:
    """Write a Llama checkpoint of random weights.

    Args:
        directory: Where to; it need not exist.
        dtype: Of what is stored.
        seed: Of the weights.
        **sizes: Of `LlamaConfig`.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
