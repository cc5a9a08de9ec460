"""Joint low rank over all heads: a latent from which every head is rebuilt linearly.

`latent` has one latent a side: the whitened SVD of Palu (2407.21118), SVD-LLM (2403.07378) and CARE (2603.17946), with
errors weighted by what the layer does with them. `joint` has one for both sides. Values are read through the latent by
o_proj; keys must be rebuilt before RoPE.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mea_compress.compositions.base import CompositionOptions, register
from mea_compress.compositions.moments import apply_covariance, key_weights, leading_components, moment, value_root
from mea_compress.heads.composed import Array, FactoredHeads, join_heads, split_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import LOW_RANK, SHARED_LATENT, Form


def low_rank(rows: Array, covariance: Array | None, rank: int) -> tuple[Array, Array]:
    """Return U (n, rank) and P (rank, D + 1) with the least E‖(R - U P) x‖², rows of P as large as those of R."""
    basis = leading_components(apply_covariance(rows, covariance) @ rows.T, rank)
    projection = basis.T @ rows
    average = max(math.sqrt(np.square(rows).sum() / len(rows)), 1e-300)
    scale = average / np.maximum(np.sqrt(np.square(projection).sum(1)), 1e-12 * average)
    return basis / scale, projection * scale[:, None]


def _channel_weights(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """Return the root of each channel's sensitivity for each key head, (H, d)."""
    weights = key_weights(heads, statistics, fit)
    channels = np.ones(heads.key.shape[:2])
    for channel in heads.pairs:
        channels[:, channel] = weights
    if heads.key_norm is not None and fit == "aligned":
        gamma = np.abs(heads.key_norm)
        channels = channels * np.maximum(gamma, 1e-6 * gamma.max())
    return channels


@register
@dataclass(frozen=True)
class Latent:
    """A joint latent, for keys (before RoPE) and values."""

    name: ClassVar[str] = "latent"
    form: ClassVar[Form] = LOW_RANK
    needs_queries: ClassVar[bool] = False

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit keys; queries stay as they are."""
        fit = options.fit
        count, head_dim = heads.key.shape[:2]
        channels = _channel_weights(heads, statistics, fit)
        rows = join_heads(heads.key * channels[..., None])
        expansion, projection = low_rank(rows, moment(statistics, fit, "key"), options.width(head_dim))
        return FactoredHeads(self.form, count, head_dim, projection, expansion / channels.reshape(-1, 1)), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit values; o_proj stays as it is."""
        fit = options.fit
        count, head_dim = heads.value.shape[:2]
        square, inverse = value_root(heads, fit)
        rows = join_heads(square @ heads.value)
        expansion, projection = low_rank(rows, moment(statistics, fit, "value"), options.width(head_dim))
        expansion = join_heads(inverse @ split_heads(expansion, head_dim))
        return FactoredHeads(self.form, count, head_dim, projection, expansion), heads


@register
@dataclass(frozen=True)
class Joint:
    """One latent for keys (before RoPE) and values: each side caches a part of it and both read it whole.

    The rank that keys and values share is spent once, as in multi-head latent attention (2405.04434) without its
    separate rotary part: at the same cached bytes each side sees twice the rank that a latent of its own would have.

    Attributes:
        key_weight: Weight λ of key errors relative to value errors in the joint SVD.
    """

    name: ClassVar[str] = "joint"
    form: ClassVar[Form] = SHARED_LATENT
    needs_queries: ClassVar[bool] = False
    key_weight: float = 3.0

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit keys; queries stay as they are."""
        latent, expansion, _ = _share_latent(heads, statistics, options, self.key_weight)
        return self._factored(latent[: options.width(heads.key.shape[1])], expansion, latent), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions
    ) -> tuple[FactoredHeads, AttentionHeads]:
        """Fit values; o_proj stays as it is."""
        latent, _, expansion = _share_latent(heads, statistics, options, self.key_weight)
        rows = latent[len(latent) - options.width(heads.value.shape[1]) :]
        return self._factored(rows, expansion, latent), heads

    def _factored(self, rows: Array, expansion: Array, latent: Array) -> FactoredHeads:
        count, head_dim = expansion.shape[:2]
        return FactoredHeads(self.form, count, head_dim, rows, join_heads(expansion), latent=latent)


def _share_latent(
    heads: AttentionHeads, statistics: LayerStatistics | None, options: CompositionOptions, key_weight: float
) -> tuple[Array, Array, Array]:
    """Return the latent's rows (rank, D + 1), and what keys and values read from it, each (H, d, rank).

    Keys and values are stacked, weighted and made equal in size; then keys count `key_weight` times as much, for an
    error of a key changes what is attended to.
    """
    head_dim = heads.key.shape[1]
    channels = _channel_weights(heads, statistics, options.fit)
    square, inverse = value_root(heads, options.fit)
    covariance = moment(statistics, options.fit, "key")
    keys = join_heads(heads.key * channels[..., None])
    values = join_heads(square @ heads.value)
    averaged = moment(statistics, options.fit, "value")
    energy = [
        (apply_covariance(rows, inputs) * rows).sum() for rows, inputs in ((keys, covariance), (values, averaged))
    ]
    scale = key_weight * (math.sqrt(energy[1] / energy[0]) if min(energy) > 0 else 1.0)
    rank = options.width(head_dim) + round(options.other * head_dim)
    expansion, latent = low_rank(np.concatenate((keys * scale, values)), covariance, rank)
    for_keys = split_heads(expansion[: len(keys)] / scale, head_dim) / channels[..., None]
    for_values = inverse @ split_heads(expansion[len(keys) :], head_dim)
    return latent, for_keys, for_values
