"""Least squares of q_proj on the scores of the original's attention (METHOD §9).

Composed keys are not those that q_proj was made for. It is fitted again, head by head, so that every query gives the
scores that the original's gives. Errors of one query's scores count by their variance, times what the output of its
head makes of them (`SensitivityAccumulator.accumulate_key_sensitivity`), relative to the size of the token's stream, as
in the regression of o_proj. The variance is half under the original's attention and half under one that is even: by the
first alone a token that the original ignores might get any score, and be attended to. A head has d · D unknowns, too
many to be solved for at once: conjugate gradients start from the old weight, and where they stop, which takes the place
of a penalty, is what does best on sequences that the weight was not fitted to.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from mea_compress.layers.runner import CapturedAttention, batches
from mea_compress.modeling.attention_mea import rotate_heads
from mea_compress.planning.sizes import SCORE_BYTES
from mea_compress.processes import add_up

_FOLDS = 2
_STEPS = 8
"""Steps of conjugate gradients at most."""
_EVEN = 0.5
"""Share of the weight of scores that all tokens that a query sees have alike."""


@dataclass
class OriginalScores:
    """What the original's attention makes scores of, in the sequences at the front of those with statistics.

    Attributes:
        wanted: Sequences.
        at: Places of the queries in every sequence, (S,).
        hidden: 0 where a query sees a token, -inf elsewhere, (S, T).
        queries: Of each sequence, rotated, (Hq, S, d).
        keys: Of each sequence, rotated, (H, T, d).
        importance: Of errors of each query's scores, (Hq, S), of each sequence.
    """

    wanted: int
    at: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    queries: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    importance: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def wants_more(self) -> bool:
        """Whether there are fewer sequences than wanted."""
        return len(self) < self.wanted

    def add(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        importance: torch.Tensor,
        at: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """Add one sequence: queries (H, G, S, d), keys (H, T, d), importance (H, G, S); at and hidden are all one's."""
        self.at, self.hidden = at, hidden
        self.queries.append(queries.flatten(0, 1).cpu())
        self.keys.append(keys.cpu())
        self.importance.append(importance.flatten(0, 1).cpu())


class ScoreRegression:
    """Accumulate what q_proj of a composed layer reads and what its queries meet, and fit its weight.

    Args:
        original: Of the same sequences, in the same order.
        attention: Of the composed layer, without a norm of queries.
        products: What its keys are computed in.
        shared: Whether other processes have other sequences.
    """

    def __init__(self, original: OriginalScores, attention: Any, products: torch.dtype, shared: bool) -> None:
        self.original, self.attention, self.products, self.shared = original, attention, products, shared
        self.inputs: list[torch.Tensor] = []  # (S, D), or D + 1 with a bias
        self.folds: list[int] = []
        self.keys: list[torch.Tensor] = []  # (H, T, d)
        self.sizes: list[torch.Tensor] = []  # (S,)
        self.rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # (1, S, rotary_dim)

    @torch.no_grad()
    def add(self, captured: CapturedAttention, size: torch.Tensor, turns: torch.Tensor) -> None:
        """Add one batch.

        Args:
            captured: Inputs of the composed layer's attention, (B, T, D).
            size: Mean square of each token's stream, (B, T, 1).
            turns: The sequences' numbers among all, (B,): they go to the folds in turn.
        """
        attention, at, x = self.attention, self.original.at, captured.inputs
        cos, sin = captured.position_embeddings
        with torch.autocast(x.device.type, self.products, enabled=self.products != x.dtype):
            keys, _ = attention.expand(*attention.project(x, cos, sin), (cos, sin))  # (B, H or fewer, T, d)
        keys = keys.float().repeat_interleave(attention.heads // keys.shape[1], dim=1)
        own = x[:, at].float()
        if attention.q_proj.bias is not None:
            own = torch.cat((own, own.new_ones(*own.shape[:2], 1)), dim=-1)
        self.inputs += own.cpu()
        self.folds += (turns % _FOLDS).tolist()
        self.keys += keys.cpu()
        self.sizes += size.to(at.device)[:, at, 0].cpu()
        self.rotation = cos[:1, at].float(), sin[:1, at].float()

    def solve(self, weight: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """Fit the weight.

        Args:
            weight: The old one, (Hq, d, D), or D + 1 with the bias as last column; float64.
            heads: The original's query head that each of them stands for, Hq.

        Returns:
            The new one, of the same shape; where nothing does better, the old one.
        """
        device = self.attention.q_proj.weight.device
        # Sequences of one fold stand together, so that either fold is a slice.
        order = sorted(range(len(self.inputs)), key=self.folds.__getitem__)
        first = self.folds.count(0) * len(self.original.at)
        inputs = torch.cat([self.inputs[index] for index in order]).to(device)  # (N, D)
        assert self.rotation is not None
        cos, sin = (table[0].to(device).repeat(len(order), 1) for table in self.rotation)  # (N, rotary_dim)
        fitted, size = weight.clone(), 4 * weight.shape[1] ** 2 * len(inputs)
        group = self.attention.query_heads // self.attention.heads
        for key in range(self.attention.heads):
            for own in batches(group, max(1, SCORE_BYTES // max(1, size))):
                together = range(key * group, (key + 1) * group)[own]
                normal = self._normal(key, [heads[head] for head in together], order, device)
                for head, moments, cross in zip(together, *normal, strict=True):
                    problem = _LeastSquares(inputs, moments, cross, cos, sin, self.shared)
                    problem.residual = cross - problem.scored(weight[head].to(device, torch.float32))
                    change = _best_change(problem, [problem.part(slice(first)), problem.part(slice(first, None))])
                    if change is not None:
                        fitted[head] += change.to(fitted)
        return fitted

    @torch.no_grad()
    def _normal(
        self, key: int, sources: list[int], order: list[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M and b of every query of some heads, whose error is qᵀ M q - 2 bᵀ q, and a constant, behind RoPE.

        They are (G, N, d, d) and (G, N, d).

        Args:
            key: The composed layer's key head that they read.
            sources: The original's query heads that they stand for, G.
            order: Of the sequences.
            device: To compute on.
        """
        original, attention = self.original, self.attention
        source, dim = sources[0] // (attention.query_heads // attention.heads), attention.head_dim
        hidden, queries = original.hidden.to(device), len(original.at)
        even = hidden.softmax(-1)  # (S, T)
        moments = torch.empty(len(sources), len(order) * queries, dim, dim, device=device)
        crosses = torch.empty(len(sources), len(order) * queries, dim, device=device)
        for place, index in enumerate(order):
            own = slice(place * queries, (place + 1) * queries)
            scores = original.queries[index][sources].to(device) @ original.keys[index][source].to(device).T
            weights = torch.lerp((scores * attention.scaling + hidden).softmax(-1), even, _EVEN)  # (G, S, T)
            keys = self.keys[index][key].to(device)
            keys = keys - keys.mean(0)  # what all have in common changes nothing, and would be lost beside its square
            mean, expected = weights @ keys, weights * scores  # (G, S, d), (G, S, T)
            share = (original.importance[index][sources] / self.sizes[index]).to(device)  # (G, S)
            # Of products of channels a matrix product makes the moments of all queries.
            both = (keys[:, :, None] * keys[:, None]).flatten(1)  # (T, d²)
            moment = (weights @ both).unflatten(-1, (dim, dim)) - mean[..., None] * mean[..., None, :]
            cross = expected @ keys - expected.sum(-1, keepdim=True) * mean
            moments[:, own] = moment * share[..., None, None]
            crosses[:, own] = cross * share[..., None]
        return moments, crosses


@dataclass
class _LeastSquares:
    """Σ qᵀ M q - 2 cᵀ q over queries q = R Δ x, for a change Δ (d, D) of a head's weight.

    Attributes:
        inputs: X, (N, D).
        moments: M, (N, d, d).
        residual: c, (N, d).
        cos: Of RoPE, R, at each of them, (N, rotary_dim).
        sin: The same.
        shared: Whether other processes have other queries.
    """

    inputs: torch.Tensor
    moments: torch.Tensor
    residual: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    shared: bool

    def part(self, own: slice) -> "_LeastSquares":
        """Return the problem of some of the queries."""
        inputs, moments, residual, cos, sin = (
            numbers[own] for numbers in (self.inputs, self.moments, self.residual, self.cos, self.sin)
        )
        return _LeastSquares(inputs, moments, residual, cos, sin, self.shared)

    def target(self) -> torch.Tensor:
        """Return half of the negative gradient at no change, (d, D)."""
        return self._sum(self.residual)

    def apply(self, change: torch.Tensor) -> torch.Tensor:
        """Return half of the gradient that a change (d, D) adds."""
        return self._sum(self.scored(change))

    def scored(self, weight: torch.Tensor) -> torch.Tensor:
        """Return M q of a weight (d, D), (N, d)."""
        queries = self._rotated(self.inputs @ weight.T, self.sin)
        return torch.bmm(self.moments, queries[..., None])[..., 0]

    def _sum(self, rows: torch.Tensor) -> torch.Tensor:
        total = self._rotated(rows, -self.sin).T @ self.inputs
        return add_up(total) if self.shared else total

    def _rotated(self, rows: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate_heads(rows[None, :, None], self.cos[None], sin[None])[0, :, 0]


def _best_change(whole: _LeastSquares, parts: list[_LeastSquares]) -> torch.Tensor | None:
    """Return the change after as many steps as do best on the part that they are not fitted to; None for no change."""
    errors = torch.zeros(_STEPS, dtype=torch.float64)
    for fitted, own in (parts, parts[::-1]):
        target, last = own.target(), 0.0
        for step, change in enumerate(conjugate_gradients(fitted.apply, fitted.target(), _STEPS)):
            last = float((change * (own.apply(change) - 2 * target)).sum(dtype=torch.float64))
            errors[step] += last
        errors[step + 1 :] += last
    best = int(errors.argmin())
    if not errors[best] < 0:
        return None
    return next(islice(conjugate_gradients(whole.apply, whole.target(), best + 1), best, None), None)


def conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, steps: int
) -> Iterator[torch.Tensor]:
    """Yield approximate solutions of A x = b, each nearer than the one before, for as many steps as say something.

    Args:
        apply: Multiplies by A, symmetric and positive semidefinite.
        target: b, of any shape.
        steps: As many at most; there is one at least.
    """
    found = torch.zeros_like(target)
    residual = direction = target
    size = float(residual.square().sum(dtype=torch.float64))
    for step in range(steps):
        moved = apply(direction)
        curvature = float((direction * moved).sum(dtype=torch.float64))
        if not (size > 0 and curvature > 0):
            if not step:
                yield found
            return
        length = size / curvature
        found = found + length * direction
        residual = residual - length * moved
        new = float(residual.square().sum(dtype=torch.float64))
        direction, size = residual + new / size * direction, new
        yield found


__all__ = ["OriginalScores", "ScoreRegression", "conjugate_gradients"]
