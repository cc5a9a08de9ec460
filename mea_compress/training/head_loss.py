"""The distillation loss of two heads' logits, a sequence at a time, with the gradient of the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

_SLICE_BYTES = 32 << 20
"""Of float32 logits that are made at once on a CPU: what is larger gets fresh memory at every use."""


@dataclass(frozen=True)
class Row:
    """What the loss of N positions of a sequence is made of.

    Attributes:
        own: The student's hidden states, (N, D).
        target: The teacher's, (N, D').
        head: The student's.
        expected: The teacher's.
        of_kl: What the KL of every position counts, (N,).
        following: The token that comes next, (N,), int64.
        of_text: What its cross-entropy counts, (N,); None where it does not.
        temperature: Divides the logits of both for the KL.
    """

    own: torch.Tensor
    target: torch.Tensor
    head: nn.Linear
    expected: nn.Linear
    of_kl: torch.Tensor
    following: torch.Tensor
    of_text: torch.Tensor | None
    temperature: float

    def slices(self) -> Iterator[Row]:
        """Yield the positions a slice at a time on a CPU, and all of them elsewhere."""
        count = len(self.own)
        size = count if self.own.device.type != "cpu" else max(1, _SLICE_BYTES // (4 * len(self.head.weight)))
        for first in range(0, count, size):
            part = slice(first, first + size)
            of_text = None if self.of_text is None else self.of_text[part]
            yield replace(
                self,
                own=self.own[part],
                target=self.target[part],
                of_kl=self.of_kl[part],
                following=self.following[part],
                of_text=of_text,
            )


class HeadLoss(torch.autograd.Function):
    """The loss of two heads' logits; the gradient of the hidden states is made with them and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        target: torch.Tensor,
        head: nn.Linear,
        expected: nn.Linear,
        ids: torch.Tensor,
        counts: torch.Tensor | None,
        of_kl: torch.Tensor,
        of_text: torch.Tensor | None,
        temperature: float,
        loss_of: Callable[[Row], tuple[torch.Tensor, torch.Tensor]],
    ) -> Any:
        """Return the loss of hidden states (B, T, D) of the student and of the teacher.

        Args:
            ctx: Of autograd.
            hidden: The student's, (B, T, D).
            target: The teacher's, (B, T, D').
            head: The student's.
            expected: The teacher's.
            ids: (B, T), int64.
            counts: Zero where nothing of a position counts, (B, T); None where all do.
            of_kl: What the KL of every position counts, (B, T).
            of_text: What its cross-entropy counts, (B, T); None where it does not.
            temperature: Divides the logits of both for the KL.
            loss_of: Makes the loss of a sequence's positions, and its gradient of their hidden states, (N, D).
        """
        gradient = torch.zeros_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        next_ids = ids.roll(-1, 1)  # the last prediction has none, and no weight
        for row in range(len(ids)):
            at: Any = slice(None) if counts is None else counts[row].nonzero()[:, 0]
            of_next = None if of_text is None else of_text[row, at]
            parts = (hidden[row, at], target[row, at], head, expected, of_kl[row, at], next_ids[row, at], of_next)
            loss, of_hidden = loss_of(Row(*parts, temperature))
            total += loss
            gradient[row, at] = of_hidden.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """Return the gradient of the hidden states, and none of anything else."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], *[None] * 9


def whole_row(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss over the whole vocabulary, and its gradient of the student's hidden states, (N, D)."""
    parts = [_whole_slice(part) for part in row.slices()]
    if not parts:  # nothing of the sequence counts
        return row.of_kl.new_zeros(()), row.own[:0]
    losses, gradients = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.cat(gradients)


def _whole_slice(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    head, expected, temperature = row.head, row.expected, row.temperature
    logits = nn.functional.linear(row.own.to(head.weight.dtype), head.weight, head.bias)
    expected_logits = nn.functional.linear(row.target.to(expected.weight.dtype), expected.weight, expected.bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_zeros((), dtype=wide)
    of_logits: torch.Tensor | float = 0.0
    if row.of_text is not None:
        following = row.following[:, None]
        q = logits.softmax(-1, dtype=wide)
        loss += (row.of_text * (_log_sum(logits, q) - logits.gather(1, following)[:, 0].to(wide))).sum()
        q.scatter_add_(1, following, torch.full_like(following, -1, dtype=wide))
        of_logits = q.mul_(row.of_text[:, None])
    if temperature != 1:
        logits, expected_logits = logits / temperature, expected_logits / temperature
    q, p = logits.softmax(-1, dtype=wide), expected_logits.softmax(-1, dtype=wide)
    difference = expected_logits.to(wide, copy=True).sub_(logits)
    # KL = sum of p (a - b) - log-sum of a + log-sum of b.
    divergence = torch.linalg.vecdot(p, difference) - _log_sum(expected_logits, p) + _log_sum(logits, q)
    loss += (row.of_kl * divergence).sum()
    whole = q.sub_(p).mul_(row.of_kl[:, None] / temperature) + of_logits
    return loss, whole.to(head.weight.dtype) @ head.weight


def _log_sum(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return log Σ exp of logits (T, V) whose softmax is known: (T,)."""
    largest = probabilities.amax(-1)
    return logits.amax(-1).to(largest.dtype) - largest.log()


__all__ = ["HeadLoss", "Row", "whole_row"]
