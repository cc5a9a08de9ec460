"""Joint low rank over all heads: a latent from which every head is rebuilt linearly.

`latent` has one latent a side: the whitened SVD of Palu (2407.21118), SVD-LLM (2403.07378) and CARE (2603.17946), with
errors weighed by what the layer does with them. `joint` has one for both sides. Values are read through the latent by
o_proj; keys must be rebuilt before RoPE.
"""

import math

import numpy as np

from mea_compress.compositions.moments import key_weights, largest_entries, moment, through, value_root
from mea_compress.compositions.request import Request
from mea_compress.heads.composed import Array, Composed, join_heads, split_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads


def low_rank(rows: Array, second: Array | None, rank: int) -> tuple[Array, Array]:
    """The best rank for E‖(R - U P) x‖²: U (n, rank) and P (rank, D + 1), P's rows as large as an average row of R."""
    vectors = np.linalg.eigh(through(rows, second) @ rows.T).eigenvectors
    basis = vectors[:, ::-1][:, :rank]
    basis = basis * np.sign(largest_entries(basis))
    projection = basis.T @ rows
    average = max(math.sqrt(np.square(rows).sum() / len(rows)), 1e-300)
    scale = average / np.maximum(np.sqrt(np.square(projection).sum(1)), 1e-12 * average)
    return basis / scale, projection * scale[:, None]


def _channel_weights(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """What an error of each channel of each key head costs, (H, d)."""
    weights = key_weights(heads, statistics, fit)
    channels = np.ones(heads.key.shape[:2])
    for channel in heads.pairs:
        channels[:, channel] = weights
    if heads.key_norm is not None and fit == "aligned":
        gamma = np.abs(heads.key_norm)
        channels = channels * np.maximum(gamma, 1e-6 * gamma.max())
    return channels


class Latent:
    """A joint latent, for keys (before RoPE) and values."""

    name = "latent"

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed keys; queries stay as they are."""
        fit = request.fit
        count, head_dim = heads.key.shape[:2]
        channels = _channel_weights(heads, statistics, fit)
        rows = join_heads(heads.key * channels[..., None])
        expansion, projection = low_rank(rows, moment(statistics, fit, "key"), request.width(head_dim))
        return Composed(self.name, count, head_dim, projection, expansion / channels.reshape(-1, 1)), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed values; o_proj stays as it is."""
        fit = request.fit
        count, head_dim = heads.value.shape[:2]
        square, inverse = value_root(heads, fit)
        rows = join_heads(square @ heads.value)
        expansion, projection = low_rank(rows, moment(statistics, fit, "value"), request.width(head_dim))
        expansion = join_heads(inverse @ split_heads(expansion, head_dim))
        return Composed(self.name, count, head_dim, projection, expansion), heads


class Joint:
    """One latent for keys (before RoPE) and values: each side caches a part of it and both read it whole.

    The rank that keys and values share is spent once, as in multi-head latent attention (2405.04434) without its
    separate rotary part: at the same cached bytes each side sees twice the rank that a latent of its own would have.
    """

    name = "joint"

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed keys; queries stay as they are."""
        latent, expansion, _ = _share_latent(heads, statistics, request)
        own = latent[: request.width(heads.key.shape[1])]
        return Composed(
            self.name, expansion.shape[0], expansion.shape[1], own, join_heads(expansion), latent=latent
        ), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed values; o_proj stays as it is."""
        latent, _, expansion = _share_latent(heads, statistics, request)
        own = latent[len(latent) - request.width(heads.value.shape[1]) :]
        return Composed(
            self.name, expansion.shape[0], expansion.shape[1], own, join_heads(expansion), latent=latent
        ), heads


def _share_latent(
    heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
) -> tuple[Array, Array, Array]:
    """The latent's rows (rank, D + 1), and what keys and values read from it, each (H, d, rank).

    Keys and values are stacked, weighed and made equal in size; then keys count `emphasis` times as much, for an error
    of a key changes what is attended to.
    """
    head_dim = heads.key.shape[1]
    channels = _channel_weights(heads, statistics, request.fit)
    square, inverse = value_root(heads, request.fit)
    second = moment(statistics, request.fit, "key")
    keys = join_heads(heads.key * channels[..., None])
    values = join_heads(square @ heads.value)
    attended = moment(statistics, request.fit, "value")
    energy = [(through(rows, seen) * rows).sum() for rows, seen in ((keys, second), (values, attended))]
    scale = request.emphasis * (math.sqrt(energy[1] / energy[0]) if min(energy) > 0 else 1.0)
    rank = request.width(head_dim) + round(request.other * head_dim)
    expansion, latent = low_rank(np.concatenate((keys * scale, values)), second, rank)
    for_keys = split_heads(expansion[: len(keys)] / scale, head_dim) / channels[..., None]
    for_values = inverse @ split_heads(expansion[len(keys) :], head_dim)
    return latent, for_keys, for_values
