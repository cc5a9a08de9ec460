"""Calibration at the cache: statistics of final queries, keys and values, whatever the family's attention is made of.

Keys and values are seen as the attention block hands them to its cache, queries as its attention function gets them,
and what the block makes of the attention's output (o_proj, gates, norms) by gradients of random projections. The
"input" that component projections are fitted for is the heads themselves, so that every method serves as it is: its
component projection is the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mea_compress.architectures.families import LayerGeometry
from mea_compress.fit.calibration import SensitivityAccumulator, check_finite
from mea_compress.heads.alignment import sqrt_and_inverse_sqrt
from mea_compress.heads.composed import Array
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads
from mea_compress.layers.blocks import BlockRunner, ObservedAttention
from mea_compress.planning.sizes import SAMPLED_QUERIES


@dataclass(frozen=True)
class CacheStatistics:
    """Statistics of a layer that is composed at its cache.

    Attributes:
        key: Of the keys; its inputs are the H · d channels of all heads.
        value: Of the values, alike.
        output_root: Root of what the block makes of each value head's errors, (H, d, d), float64.
    """

    key: LayerStatistics
    value: LayerStatistics
    output_root: Array


class CacheAccumulator(SensitivityAccumulator):
    """Accumulate the sums of `CacheStatistics` over batches.

    Args:
        geometry: Of the layer.
        runner: The layer, for what its block makes of the attention's output.
        aligned: Look at queries and attention too; otherwise at keys and values alone.
    """

    def __init__(self, geometry: LayerGeometry, runner: BlockRunner, aligned: bool) -> None:
        super().__init__(geometry.heads, geometry.pairs, torch.float32)
        self.geometry, self.runner, self.aligned = geometry, runner, aligned
        keys, values = (geometry.heads * geometry.dim(side) for side in ("key", "value"))
        self.key_moment = torch.zeros(keys, keys, dtype=torch.float64)
        self.value_moment = torch.zeros(values, values, dtype=torch.float64)
        # Those that count under attention: variances of keys by what they change, and values as they are averaged.
        self.attended_keys = torch.zeros_like(self.key_moment)
        self.attended_values = torch.zeros_like(self.value_moment)
        self.generator = torch.Generator().manual_seed(0)
        self.batches = 0

    def observe(self, hidden: torch.Tensor) -> None:
        """Run the layer on (B, T, D) and add what its attention does."""
        self.add(self.runner.observe(hidden, with_queries=self.aligned))

    def add(self, observed: ObservedAttention) -> None:
        """Add one batch."""
        heads = self.geometry.heads
        keys, values = (side.detach().float() for side in (observed.keys, observed.values))  # (B, H, T, d)
        if self.aligned:
            metric = self.runner.output_metric(observed, self.generator).unflatten(0, (heads, -1)).float()
            self.metric = metric if not self.batches else self.metric + (metric - self.metric) / (self.batches + 1)
        with torch.no_grad():
            self._add(observed, keys, values)
        self.batches += 1

    def _add(self, observed: ObservedAttention, keys: torch.Tensor, values: torch.Tensor) -> None:
        flat_keys, flat_values = (side.transpose(1, 2).flatten(2) for side in (keys, values))  # (B, T, H d)
        self.key_moment += self._second_moment(flat_keys.flatten(0, 1))
        self.value_moment += self._second_moment(flat_values.flatten(0, 1))
        self.tokens += keys.shape[0] * keys.shape[2]
        if not self.aligned:
            return
        assert observed.weights is not None
        length = keys.shape[2]
        at = torch.linspace(0, length - 1, min(length, SAMPLED_QUERIES), device=keys.device).round().long()
        weights = observed.weights(at).float().unflatten(1, (self.geometry.heads, -1))  # (B, H, G, S, T)
        queries = observed.queries[:, :, at].float().unflatten(1, (self.geometry.heads, -1))  # (B, H, G, S, d)
        for weight, query, key, value, wide_key, wide_value in zip(
            weights, queries, keys, values, flat_keys, flat_values, strict=True
        ):
            averaged = weight.flatten(0, 2) @ wide_value  # (Hq S, H d)
            self.attended_values += self._second_moment(averaged) / (weight.shape[0] * weight.shape[1])
            self.accumulate_key_sensitivity(weight, query, key, value)
            self._accumulate_keys(weight, query, wide_key, value)
        self.queries += len(at) * len(keys)

    def _accumulate_keys(
        self, weights: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Accumulate the variance of all key channels under attention, (H d, H d), as `key_covariance` is for pairs."""
        importance = (self._leverage(weights, values)[..., None] * self._energy(queries)).sum(-1)  # (H, G, S)
        common = torch.einsum("hgs,hgst->st", importance, weights)
        weight = importance.sum((0, 1))
        centre = common @ keys / weight.clamp(min=1e-30)[:, None]  # (S, H d)
        self.attended_keys += self._second_moment(keys * common.sum(0).sqrt()[:, None])
        self.attended_keys -= self._second_moment(centre * weight.sqrt()[:, None])

    def finish(self) -> CacheStatistics:
        """Return the means.

        Raises:
            RequestError: Something is not finite.
        """
        count = max(self.queries, 1)
        key, value = self.key_moment / self.tokens, self.value_moment / self.tokens
        attended_key = self.attended_keys / count if self.aligned else key
        attended_value = self.attended_values / count if self.aligned else value
        covariance, sensitivity = self.key_covariance / count, self.relative_sensitivity()
        check_finite(key, value, attended_key, attended_value, covariance, sensitivity)
        heads, dim = self.geometry.heads, self.geometry.value_dim
        root: Any = np.broadcast_to(np.eye(dim), (heads, dim, dim))
        if self.aligned:
            root, _ = sqrt_and_inverse_sqrt(self.metric.double().sum(1).cpu().numpy())

        def statistics(moment: torch.Tensor, attended: torch.Tensor) -> LayerStatistics:
            return LayerStatistics(
                self.tokens, _bordered(moment), _bordered(attended), covariance.numpy(), sensitivity.numpy()
            )

        return CacheStatistics(
            statistics(attended_key if self.aligned else key, attended_key), statistics(value, attended_value), root
        )


def cached_heads(geometry: LayerGeometry, side: str, statistics: CacheStatistics) -> AttentionHeads:
    """Return heads whose input is the heads of one side as they are cached: what is fitted to them is an encoder.

    Args:
        geometry: Of the layer.
        side: ``key`` or ``value``.
        statistics: Of the layer.
    """
    count, dim = geometry.heads, geometry.dim(side)
    channels = np.concatenate((np.eye(count * dim), np.zeros((count * dim, 1))), axis=1)  # no bias
    heads = channels.reshape(count, dim, -1)
    unread = np.broadcast_to(0.0, heads.shape)
    return AttentionHeads(
        query=unread,
        key=heads if side == "key" else unread,
        value=heads if side == "value" else unread,
        output=statistics.output_root if side == "value" else np.broadcast_to(0.0, (count, 1, dim)),
        key_norm=None,
        head_norm=None,
        rotary_dim=geometry.rotary_dim,
        norm_eps=0.0,
        interleaved=geometry.interleaved,
    )


def _bordered(moment: torch.Tensor) -> Array:
    """Return a moment (n, n) with a constant 1 appended to its inputs, which no head has: (n + 1, n + 1)."""
    wide = np.zeros((len(moment) + 1, len(moment) + 1))
    wide[:-1, :-1], wide[-1, -1] = moment.cpu().numpy(), 1.0
    return wide


__all__ = ["CacheAccumulator", "CacheStatistics", "cached_heads"]
