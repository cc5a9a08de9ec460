"""What compositions are told of a layer's inputs."""

from dataclasses import dataclass, replace
from typing import Any

from mea_compress.heads.composed import Array


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of one layer's attention over calibration text, float64; `calibration` takes them.

    Attributes:
        tokens: Number of tokens seen.
        moment: E[x xᵀ] of the layer's normed input with a constant 1 appended, (D + 1, D + 1).
        attended: E[x̃ x̃ᵀ] of the input averaged by attention, x̃ = sum over t of A[s, t] x_t, (D + 1, D + 1), mean over
            query heads.
        key_covariance: Inner products of key heads pair by pair, as attention notices errors of them, (P, H, H),
            complex128; see `StatisticsAccumulator.notice`.
        key_cost: What an error of each rotary pair of each head costs, beside others of its size there, (H, P).
    """

    tokens: int
    moment: Array
    attended: Array
    key_covariance: Array
    key_cost: Array

    def of_heads(self, heads: Any) -> "LayerStatistics":
        """The statistics of some key/value heads (their numbers, in any order)."""
        return replace(
            self,
            key_covariance=self.key_covariance[:, heads][:, :, heads],
            key_cost=self.key_cost[heads],
        )
