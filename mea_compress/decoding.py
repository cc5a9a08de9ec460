"""Run a causal language model with a KV cache, whatever the installed transformers calls that argument.

Transformers has renamed the cache among arguments and outputs before. Both are found here by their type, once for the
whole package, and `decode_greedily` is what every emitted checkpoint must pass before it appears.
"""

from __future__ import annotations

import inspect
from functools import cache as remember
from typing import TYPE_CHECKING, Any

import torch

from mea_compress.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.utils import ModelOutput


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which a model's forward takes its cache: the parameter annotated with `Cache`.

    Raises:
        TypeError: It has no such parameter.
    """
    return _cache_argument(type(model).forward)


@remember
def _cache_argument(forward: Callable[..., Any]) -> str:
    for name, parameter in inspect.signature(forward).parameters.items():
        annotation = parameter.annotation
        if "Cache" in (annotation if isinstance(annotation, str) else str(annotation)):
            return name
    raise TypeError(f"{forward.__qualname__} takes no cache under this release of transformers")


def cache_of(output: ModelOutput) -> Cache | None:
    """Return the cache among a model's outputs, or None."""
    from transformers.cache_utils import Cache

    return next((value for value in output.values() if isinstance(value, Cache)), None)


def run_cached(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None = None, **options: Any
) -> tuple[torch.Tensor, Cache | None]:
    """Run new tokens after those of a cache.

    Args:
        model: Causal language model.
        ids: (B, T), the new tokens.
        cache: Of the tokens before them, or None where there are none.
        **options: Further arguments of the model.

    Returns:
        Logits (B, T, V), fewer tokens where `options` say so, and the filled cache, None where the model keeps none.
    """
    if cache is not None:
        options[cache_argument(model)] = cache
    output = model(input_ids=ids, use_cache=True, **options)
    return output.logits, cache_of(output)


@torch.no_grad()
def decode_greedily(model: PreTrainedModel, prompt: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the likeliest tokens to a prompt, one at a time with a cache.

    Args:
        model: Causal language model.
        prompt: (B, T).
        steps: Number of tokens to append.

    Returns:
        All tokens (B, T + steps), and the logits that chose the new ones, (B, steps, V).

    Raises:
        VerificationError: The cache does not hold the tokens that were run.
    """
    ids, last_logits, cache = prompt, [], None
    next_ids = prompt
    for _ in range(steps):
        logits, cache = run_cached(model, next_ids, cache)
        cached = 0 if cache is None else int(cache.get_seq_length())
        if cached != ids.shape[1]:
            raise VerificationError(f"after {ids.shape[1]} tokens the cache holds {cached}: decoding would lose tokens")
        last_logits.append(logits[:, -1:])
        next_ids = logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, next_ids), dim=1)
    return ids, torch.cat(last_logits, dim=1)


@torch.no_grad()
def check_decoding(model: PreTrainedModel, prompt: torch.Tensor, steps: int, tolerance: float) -> float:
    """Check that greedy tokens with a cache are those without.

    Args:
        model: Causal language model, in float32 or wider.
        prompt: (B, T).
        steps: Number of tokens to decode.
        tolerance: Largest difference of logits, relative to the largest logit; tokens may differ within it only.

    Returns:
        The largest relative difference of logits.

    Raises:
        VerificationError: They differ.
    """
    ids, cached = decode_greedily(model, prompt, steps)
    uncached = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -steps:]
    largest = uncached.abs().max().clamp(min=1e-30)
    difference = float((cached - uncached).abs().max() / largest)
    # How far the tokens chosen with the cache are from being the likeliest ones without.
    gap = float((uncached.amax(-1, keepdim=True) - uncached.gather(-1, ids[:, -steps:, None])).max() / largest)
    if not max(difference, gap) <= tolerance:  # also true for NaN
        raise VerificationError(
            f"decoding with a cache differs from the whole sequence by {max(difference, gap):.2e} of the largest logit"
        )
    return difference


__all__ = ["cache_argument", "cache_of", "check_decoding", "decode_greedily", "run_cached"]
