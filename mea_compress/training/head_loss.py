"""The distillation loss of two heads' logits, a sequence at a time, with the gradient of the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

_POSITIONS = 256
"""Whose logits are made at once on a CPU: fewer read a large vocabulary's head too often, more take fresh memory."""
_BLOCK_BYTES = 4 << 20
"""Of them, what goes through softmax and gradient at once: as much as caches hold (`benchmarks/NOTES.md`)."""


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

    def slices(self, size: int) -> Iterator[tuple[slice, Row]]:
        """Yield where each slice of so many positions is and what it holds; all of them are one but on a CPU."""
        count = len(self.own)
        size = max(1, min(size, count) if self.own.device.type == "cpu" else count)
        for first in range(0, count, size):
            part = slice(first, first + size)
            held = {name: getattr(self, name)[part] for name in ("own", "target", "of_kl", "following")}
            yield part, replace(self, **held, of_text=None if self.of_text is None else self.of_text[part])


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
    parts = [_whole_slice(part) for _, part in row.slices(_POSITIONS)]
    if not parts:  # nothing of the sequence counts
        return row.of_kl.new_zeros(()), row.own[:0]
    losses, gradients = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.cat(gradients)


def _whole_slice(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    head, expected = row.head, row.expected
    logits = nn.functional.linear(row.own.to(head.weight.dtype), head.weight, head.bias)
    expected_logits = nn.functional.linear(row.target.to(expected.weight.dtype), expected.weight, expected.bias)
    losses = []
    for at, part in row.slices(_BLOCK_BYTES // (4 * len(head.weight))):
        loss, of_logits = _of_logits(logits[at], expected_logits[at], part)
        logits[at] = of_logits  # they are done with
        losses.append(loss)
    return torch.stack(losses).sum(), logits @ head.weight


def _of_logits(logits: torch.Tensor, expected_logits: torch.Tensor, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a block's logits (N, V), and its gradient of the student's, float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_zeros((), dtype=wide)
    of_text: torch.Tensor | None = None
    if row.of_text is not None:
        following = row.following[:, None]
        q = logits.softmax(-1, dtype=wide)
        loss += (row.of_text * (_log_sum(logits, q) - logits.gather(1, following)[:, 0].to(wide))).sum()
        q.scatter_add_(1, following, torch.full_like(following, -1, dtype=wide))
        of_text = q.mul_(row.of_text[:, None])
    if row.temperature != 1:
        logits, expected_logits = logits / row.temperature, expected_logits / row.temperature
    q, p = logits.softmax(-1, dtype=wide), expected_logits.softmax(-1, dtype=wide)
    # KL = sum of p (a - b) - log-sum of a + log-sum of b.
    divergence = _log_sum(logits, q) - _log_sum(expected_logits, p)
    divergence += torch.linalg.vecdot(p, expected_logits.to(wide).sub_(logits))  # in place where it is wide
    loss += (row.of_kl * divergence).sum()
    of_logits = q.sub_(p).mul_(row.of_kl[:, None] / row.temperature)
    return loss, of_logits if of_text is None else of_logits.add_(of_text)


def _log_sum(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return log Σ exp of logits (T, V) whose softmax is known: (T,)."""
    largest = probabilities.amax(-1)
    return logits.amax(-1).to(largest.dtype) - largest.log()


__all__ = ["HeadLoss", "Row", "whole_row"]
