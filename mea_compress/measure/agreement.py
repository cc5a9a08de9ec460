"""How long greedy decoding stays with the original: tokens until the first that differs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mea_compress.decoding import run_cached
from mea_compress.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 64
PROMPTS = 32
_BATCH = 16


@dataclass(frozen=True)
class Agreement:
    """Greedy tokens of a model that are the reference's, before the first that is not, over prompts.

    Attributes:
        tokens: Decoded after each prompt; no count is larger.
        prompts: Number of prompts.
        prompt_tokens: Tokens of each.
        mean: Of the counts.
        median: Of the counts.
        never_differs: Share of prompts after which all tokens are the reference's.
    """

    tokens: int
    prompts: int
    prompt_tokens: int
    mean: float
    median: float
    never_differs: float


def choose_prompts(ids: torch.Tensor, mask: torch.Tensor, tokens: int, context: int | None) -> torch.Tensor:
    """Return the beginnings of sequences, at most 32 evenly spread over those that are long enough.

    Args:
        ids: (N, T), int64.
        mask: (N, T), bool, False where ids are padding on the right.
        tokens: Tokens that are to be decoded after them.
        context: Positions of the model, None where there is no limit.

    Returns:
        (B, P), int64: P is at most half of the longest sequence and 64, and less where the context asks for it.

    Raises:
        RequestError: The context has no room for a prompt and the tokens.
    """
    room = PROMPT_TOKENS if context is None else context - tokens
    if room < 1:
        raise RequestError(
            f"`agreement` {tokens} leaves no room for a prompt in the model's context of {context}: give fewer"
        )
    lengths = mask.sum(1)
    width = min(PROMPT_TOKENS, room, max(1, int(lengths.max()) // 2))
    rows = ids[lengths >= width, :width]
    chosen = torch.linspace(0, len(rows) - 1, min(PROMPTS, len(rows)), dtype=torch.float64).round().long()
    return rows[chosen]


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, prompts: torch.Tensor, tokens: int, batch_size: int | None = None
) -> torch.Tensor:
    """Return the greedy tokens after prompts, decoded with a cache; end tokens are tokens like others.

    Args:
        model: Causal language model.
        prompts: (B, P), int64.
        tokens: Tokens to decode.
        batch_size: Prompts at once, 16 without it.

    Returns:
        (B, tokens), int64, on the CPU.
    """
    parts = [_decode(model, rows, tokens, None) for rows in prompts.split(batch_size or _BATCH)]
    return torch.cat(parts)


@torch.no_grad()
def measure_agreement(
    model: PreTrainedModel, prompts: torch.Tensor, expected: torch.Tensor, batch_size: int | None = None
) -> Agreement:
    """Measure for how many greedy tokens a model stays with what a reference decoded.

    The model is fed the reference's tokens: up to the first difference these are its own, and what comes after it does
    not count. In a low precision batches of another size round otherwise, so take that which made `expected`.

    Args:
        model: Causal language model of the reference's vocabulary.
        prompts: (B, P), int64.
        expected: (B, N), int64, of `continue_greedily` with the reference.
        batch_size: Prompts at once, 16 without it.
    """
    size = batch_size or _BATCH
    counts: list[int] = []
    for rows, tokens in zip(prompts.split(size), expected.split(size), strict=True):
        same = _decode(model, rows, tokens.shape[1], tokens) == tokens
        counts += same.long().cumprod(1).sum(1).tolist()
    return Agreement(
        tokens=expected.shape[1],
        prompts=len(counts),
        prompt_tokens=prompts.shape[1],
        mean=statistics.fmean(counts),
        median=float(statistics.median(counts)),
        never_differs=sum(count == expected.shape[1] for count in counts) / len(counts),
    )


def _decode(model: PreTrainedModel, rows: torch.Tensor, tokens: int, expected: torch.Tensor | None) -> torch.Tensor:
    """Return the likeliest tokens (B, tokens) after rows (B, P) and `expected`, or after themselves where it is None.

    Once every row has left `expected` the rest is −1.
    """
    device = next(model.parameters()).device
    found = torch.full((len(rows), tokens), -1)
    fed, cache = rows, None
    for step in range(tokens):
        logits, cache = run_cached(model, fed.to(device), cache, logits_to_keep=1)
        if cache is None:
            raise RequestError(f"the model ({model.config.model_type}) keeps no KV cache: give a model with attention")
        found[:, step] = logits[:, -1].argmax(-1).cpu()
        if expected is not None and not bool((found[:, : step + 1] == expected[:, : step + 1]).all(1).any()):
            break
        fed = (found if expected is None else expected)[:, step : step + 1]
    return found


__all__ = ["PROMPTS", "PROMPT_TOKENS", "Agreement", "choose_prompts", "continue_greedily", "measure_agreement"]
