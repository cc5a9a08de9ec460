"""Text that a model has written, kept on this machine, so that no model has to write the same twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save

from mea_compress.checkpoint.files import replacing, write_bytes
from mea_compress.errors import RequestError
from mea_compress.text.sequences import sequence_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "MEA_COMPRESS_CACHE"
"""Environment variable that names the directory of kept samples; empty, none are kept."""
_TENSOR = "ids"


def kept_samples(what: Mapping[str, Any], sample: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what was sampled before for the same reasons, or sample it and keep it.

    A file that is damaged is made again; where nothing can be written, nothing is kept.

    Args:
        what: All that the sample depends on, as JSON holds it: model, tokenizer, counts, seed, versions.
        sample: Makes it, ids (N, T), int64.
    """
    directory = _directory()
    if directory is None:
        return sample()
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    file = directory / f"{digest}.safetensors"
    with suppress(Exception):  # it is not there, or is not what was written
        return load(file.read_bytes())[_TENSOR].long()
    ids = sample()
    with suppress(OSError, RequestError):
        directory.mkdir(parents=True, exist_ok=True)
        data = save({_TENSOR: ids.to(torch.int32)})
        with replacing(file, len(data)) as descriptor:
            write_bytes(descriptor, data, 0, file, len(data))
    return ids


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that a sample takes from a tokenizer: its tokens, special ones, and chat template."""
    tokens = sorted(tokenizer.get_vocab().items())
    parts = [tokens, tokenizer.all_special_ids, tokenizer.chat_template, sequence_prefix(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _directory() -> Path | None:
    """Return where samples are kept, None where they are not."""
    if PLACE in os.environ:
        named = os.environ[PLACE]
        return Path(named) if named else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if home.startswith("~") else Path(home) / "mea-compress" / "sampled"


__all__ = ["PLACE", "kept_samples", "tokenizer_digest"]
