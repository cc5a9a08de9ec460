"""Text to statistics: what a layer's attention sees, in float64."""

from dataclasses import dataclass
from typing import Any

import torch

from mea_compress.errors import RequestError
from mea_compress.modeling.attention_mea import rotary_pairs, rotate_heads
from mea_compress.streaming import Trace

# Queries per sequence at which attended inputs are gathered: each costs as much as a head as wide as the model.
_ATTENDED_QUERIES = 64


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of one layer's attention over calibration text, float64.

    Attributes:
        tokens: Number of tokens seen.
        moment: E[x xᵀ] of the layer's normed input with a constant 1 appended, (D + 1, D + 1).
        attended: E[x̃ x̃ᵀ] of the input averaged by attention, x̃ = sum over t of A[s, t] x_t, (D + 1, D + 1), mean over
            query heads.
        query_energy: E|q|² of every rotary pair, mean over the query heads of a group, (H, P).
    """

    tokens: int
    moment: torch.Tensor
    attended: torch.Tensor
    query_energy: torch.Tensor


class StatisticsAccumulator:
    """Sums of `LayerStatistics` over batches."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.tokens = 0
        self.queries = 0
        size = attention.q_proj.in_features + 1
        pairs = (attention.head_dim + 1) // 2
        self.moment = torch.zeros(size, size, dtype=torch.float64)
        self.attended = torch.zeros(size, size, dtype=torch.float64)
        self.query_energy = torch.zeros(attention.heads, pairs, dtype=torch.float64)

    @torch.no_grad()
    def add(self, trace: Trace) -> None:
        """Takes in one batch."""
        attention = self.attention
        cos, sin = trace.position_embeddings
        x = trace.inputs  # (B, T, D)
        ones = x.new_ones(*x.shape[:-1], 1)
        wide = torch.cat((x, ones), dim=-1)  # (B, T, D + 1)
        self.moment += _second_moment(wide.flatten(0, 1))
        self.tokens += wide.shape[0] * wide.shape[1]

        queries = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim))  # (B, T, Hq, d)
        if attention.qk_norm:
            queries = attention.q_norm(queries)
        first, second = rotary_pairs(attention.head_dim, attention.rotary_dim)
        energy = queries[..., first].double().square() + queries[..., second].double().square()  # (B, T, Hq, P)
        grouped = energy.unflatten(2, (attention.heads, -1))  # (B, T, H, group, P)
        self.query_energy += grouped.mean(3).sum((0, 1)).cpu()

        length = x.shape[1]
        at = torch.linspace(0, length - 1, min(length, _ATTENDED_QUERIES), device=x.device).round().long()
        queries = rotate_heads(queries, cos, sin)[:, at].transpose(1, 2)  # (B, Hq, S, d)
        positions = torch.arange(length, device=x.device)[None]
        keys, _ = attention.compose(*attention.project(x, cos, sin), positions, None, attention.rotary)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        logits = queries @ keys.transpose(-1, -2) * attention.scaling
        visible = torch.arange(length, device=x.device) <= at[:, None]
        if attention.sliding_window:
            visible &= torch.arange(length, device=x.device) > at[:, None] - attention.sliding_window
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)  # (B, Hq, S, T)
        for head in range(weights.shape[1]):
            self.attended += _second_moment((weights[:, head] @ wide).flatten(0, 1)) / weights.shape[1]
        self.queries += len(at) * len(x)

    def finish(self) -> LayerStatistics:
        """The means.

        Raises:
            RequestError: Something is not finite.
        """
        statistics = LayerStatistics(
            self.tokens,
            self.moment / self.tokens,
            self.attended / self.queries,
            self.query_energy / self.tokens,
        )
        for name in ("moment", "attended", "query_energy"):
            if not torch.isfinite(getattr(statistics, name)).all():
                raise RequestError(
                    "calibration met NaN or infinite activations; use an undamaged checkpoint, other --text, or float32"
                )
        return statistics


def check_tokens(sequences: torch.Tensor, hidden_size: int) -> None:
    """Second moments of D inputs need more than D tokens to mean anything.

    Raises:
        RequestError: There are fewer than 2 D tokens.
    """
    needed = 2 * hidden_size
    if sequences.numel() < needed:
        raise RequestError(
            f"the calibration text gives {sequences.numel()} tokens and this model needs at least {needed}; "
            "give a longer --text or raise --sequences"
        )


def _second_moment(x: torch.Tensor) -> torch.Tensor:
    """Sum over rows of x xᵀ, float64, on the CPU."""
    x = x.double() if x.device.type != "mps" else x.cpu().double()
    return (x.T @ x).cpu()
