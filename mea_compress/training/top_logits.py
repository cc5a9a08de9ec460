"""The distillation loss by a teacher's largest logits, with no more of the vocabulary in memory than a slice.

KL(teacher ‖ student) of the K likeliest tokens of the teacher, and of all others together as one: Σ p log(p / q) over
K + 1 outcomes, which is never more than over the whole vocabulary. The student's probabilities are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mea_compress.training.head_loss import Row

SLICE = 1 << 13
"""Tokens of the vocabulary whose logits are in memory."""


def top_divergence(log_p: torch.Tensor, log_q: torch.Tensor, count: int) -> torch.Tensor:
    """Return the KL of the likeliest tokens and of the rest, (…), nats, by plain autograd.

    Args:
        log_p: Log-probabilities of the teacher, (…, V).
        log_q: Log-probabilities of the student, (…, V).
        count: Tokens that are told apart, less than V.
    """
    top, ids = log_p.topk(count, -1)
    rest = (1 - top.exp().sum(-1)).clamp_min(0)
    of_rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return (top.exp() * (top - log_q.gather(-1, ids))).sum(-1) + torch.xlogy(rest, rest) - rest * of_rest


@dataclass(frozen=True)
class _Student:
    """What a loss needs of the logits b of N positions, of which K ids each are told apart.

    Attributes:
        logits: (N, K), those of the ids.
        log_sum: (N,), log Σ exp b over the vocabulary.
        log_rest: (N,), the same over all but the ids.
        mean: (N, D), the rows of the head, averaged by exp b over all but the ids.
    """

    logits: torch.Tensor
    log_sum: torch.Tensor
    log_rest: torch.Tensor
    mean: torch.Tensor


def top_row(row: Row, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss by the teacher's largest logits, and its gradient of the student's hidden states, (N, D).

    Args:
        row: Positions of a sequence.
        count: Tokens that are told apart.
    """
    head, temperature, weights = row.head, row.temperature, row.of_kl[:, None]
    top_ids, log_p, rest = _largest(row.target, row.expected, temperature, count)
    student = _student(row.own, head, temperature, top_ids)
    p, log_q = log_p.exp(), student.logits - student.log_sum[:, None]
    log_rest = student.log_rest - student.log_sum
    divergence = (p * (log_p - log_q)).sum(-1) + torch.xlogy(rest, rest) - rest * log_rest
    loss = (row.of_kl * divergence).sum()
    whole = _rows(head, top_ids, weights * (log_q.exp() - p))
    whole += weights * (log_rest.exp() - rest)[:, None] * student.mean
    whole /= temperature
    if row.of_text is not None:
        if temperature != 1:
            student = _student(row.own, head, 1.0, top_ids)
            log_q = student.logits - student.log_sum[:, None]
        text_weights = row.of_text[:, None]
        of_next = (row.own.to(head.weight.dtype) * head.weight[row.following]).sum(-1).to(whole.dtype)
        if head.bias is not None:
            of_next += head.bias[row.following]
        loss = loss + (row.of_text * (student.log_sum - of_next)).sum()
        whole += _rows(head, top_ids, text_weights * log_q.exp())
        whole += text_weights * (student.log_rest - student.log_sum).exp()[:, None] * student.mean
        whole -= _rows(head, row.following[:, None], text_weights)
    return loss, whole


def _slices(own: torch.Tensor, head: nn.Linear, temperature: float) -> Any:
    """Yield the logits (N, S) of a slice of the vocabulary at a time, float32 at least, and where it begins."""
    own = own.to(head.weight.dtype)
    for first in range(0, len(head.weight), SLICE):
        bias = None if head.bias is None else head.bias[first : first + SLICE]
        logits = nn.functional.linear(own, head.weight[first : first + SLICE], bias)
        yield logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, first


def _largest(
    own: torch.Tensor, head: nn.Linear, temperature: float, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens (N, K), their log-probabilities (N, K), and the probability of all others (N,)."""
    top: torch.Tensor | None = None
    for logits, first in _slices(own, head, temperature):
        found, ids = logits.topk(min(count, logits.shape[1]), -1)
        ids = ids + first
        of_slice = logits.logsumexp(-1)
        if top is None:
            top, top_ids, log_sum = found, ids, of_slice
            continue
        log_sum = torch.logaddexp(log_sum, of_slice)
        both = torch.cat((top, found), -1)
        top, order = both.topk(min(count, both.shape[1]), -1)
        top_ids = torch.cat((top_ids, ids), -1).gather(-1, order)
    assert top is not None
    log_p = top - log_sum[:, None]
    return top_ids, log_p, (1 - log_p.exp().sum(-1)).clamp_min(0)


def _student(own: torch.Tensor, head: nn.Linear, temperature: float, ids: torch.Tensor) -> _Student:
    """Return what the loss needs of a student's hidden states (N, D), in one pass over the vocabulary."""
    logits: torch.Tensor | None = None
    for part, first in _slices(own, head, temperature):
        if logits is None:
            logits = part.new_zeros(ids.shape)
            largest = part.new_full((len(part), 1), -torch.inf)
            total, mean = part.new_zeros(len(part), 1), part.new_zeros(len(part), head.weight.shape[1])
        rows, columns = ((ids >= first) & (ids < first + part.shape[1])).nonzero(as_tuple=True)
        places = ids[rows, columns] - first
        logits[rows, columns] = part[rows, places]
        part[rows, places] = -torch.inf
        before, largest = largest, torch.maximum(largest, part.amax(-1, keepdim=True))
        shift = torch.where(largest.isinf(), 0.0, largest)  # nothing but ids so far
        part.sub_(shift).exp_()
        grown = (before - shift).exp()
        total = total * grown + part.sum(-1, keepdim=True)
        mean = mean * grown + (part.to(head.weight.dtype) @ head.weight[first : first + part.shape[1]])
    assert logits is not None
    log_rest = largest + total.log()
    log_sum = torch.cat((logits, log_rest), -1).logsumexp(-1)
    return _Student(logits, log_sum, log_rest[:, 0], mean / total)


def _rows(head: nn.Linear, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return Σ weight · row of the head over ids (N, K): (N, D)."""
    weight = head.weight.detach()
    summed = nn.functional.embedding_bag(
        ids.contiguous(), weight, per_sample_weights=weights.to(weight.dtype).contiguous(), mode="sum"
    )
    return summed.to(torch.promote_types(weight.dtype, torch.float32))


__all__ = ["SLICE", "top_divergence", "top_row"]
