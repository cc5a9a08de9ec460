"""Calibration statistics of one attention layer (second moments), the data every method is fitted to."""

from dataclasses import dataclass, replace
from typing import Any

from mea_compress.heads.composed import Array


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of one layer's attention over calibration text, float64; `calibration` takes them.

    Attributes:
        tokens: Number of tokens seen.
        moment: E[x xᵀ] of the layer's normed input with a constant 1 appended, (D + 1, D + 1).
        attention_weighted_moment: E[x̃ x̃ᵀ] of the input averaged by attention, x̃ = sum over t of A[s, t] x_t,
            (D + 1, D + 1), mean over query heads.
        key_covariance: Inner products of key heads pair by pair, weighted by the sensitivity to their errors,
            (P, H, H), complex128; see `StatisticsAccumulator.accumulate_key_sensitivity`.
        key_sensitivity: Squared output error per unit of key error, for each head and rotary pair (H, P).
    """

    tokens: int
    moment: Array
    attention_weighted_moment: Array
    key_covariance: Array
    key_sensitivity: Array

    def of_heads(self, heads: Any) -> "LayerStatistics":
        """Return the statistics of some key/value heads (their numbers, in any order)."""
        return replace(
            self,
            key_covariance=self.key_covariance[:, heads][:, :, heads],
            key_sensitivity=self.key_sensitivity[heads],
        )
