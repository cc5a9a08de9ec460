"""The bytes that a filled KV cache holds, counted from its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mea_compress.decoding import run_cached
from mea_compress.errors import RequestError
from mea_compress.loading import choose_sequence_length, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHED_TOKENS = 64


def cache_bytes(cache: object) -> int:
    """Return the bytes that a filled cache keeps alive: the storages of all its tensors, each storage once.

    Counters (tensors of fewer than two dimensions) do not count. A view counts as much as the storage behind it.

    Args:
        cache: A cache of transformers or anything that holds tensors in attributes, lists, tuples or dictionaries.
    """
    storages = {}
    for tensor in _tensors(cache, set()):
        if tensor.ndim >= 2:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield every tensor reachable from a value through attributes, lists, tuples and dictionaries, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from _tensors(vars(value), seen)


@torch.no_grad()
def measure_cache_bytes(model: PreTrainedModel, ids: torch.Tensor | None = None) -> float:
    """Measure the bytes of KV cache per token and sequence, from the tensors real caches hold after a forward pass.

    What a hybrid keeps of all tokens together (states of convolutions and linear attention) is of one size however many
    they are, and does not count: a cache of one token has it too.

    Args:
        model: Causal language model with a cache.
        ids: (B, T), int64; None takes ids 0, 1, 2, … of a length the model allows.

    Returns:
        How much larger `cache_bytes` is of T tokens than of one, divided by B·(T - 1).

    Raises:
        RequestError: The model keeps no cache, or none that grows with its tokens.
    """
    if ids is None:
        length = choose_sequence_length(model, None)
        ids = torch.arange(min(length, _CACHED_TOKENS))[None] % vocabulary_size(model)
    if ids.shape[1] == 1:
        ids = ids.repeat(1, 2)
    ids = ids.to(next(model.parameters()).device)
    first, whole = (cache_bytes(run_cached(model, part)[1]) for part in (ids[:, :1], ids))
    if whole == first:
        raise RequestError(
            f"the model ({model.config.model_type}) keeps no KV cache, so there is nothing to measure: "
            "give a model with attention"
        )
    return (whole - first) / (ids.numel() - len(ids))


__all__ = ["cache_bytes", "measure_cache_bytes"]
