"""Joint low rank over all heads: a latent from which every head is rebuilt linearly.

`latent` has one latent a side: the whitened SVD of Palu (2407.21118), SVD-LLM (2403.07378) and CARE (2603.17946), with
errors weighed by what the layer does with them. `joint` has one for both sides. Values are read through the latent by
o_proj; keys must be rebuilt before RoPE.
"""

import torch

from mea_compress.calibration import LayerStatistics
from mea_compress.composed import Composed
from mea_compress.compositions.measure import key_weights, moment, through, value_root
from mea_compress.compositions.request import Request
from mea_compress.heads import AttentionHeads


def low_rank(rows: torch.Tensor, second: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank for E‖(R - U P) x‖²: U (n, rank) and P (rank, D + 1), P's rows as large as an average row of R."""
    vectors = torch.linalg.eigh(through(rows, second) @ rows.T).eigenvectors
    basis = vectors.flip(-1)[:, :rank]
    basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
    projection = basis.T @ rows
    average = (rows.square().sum() / rows.shape[0]).sqrt().clamp(min=1e-300)
    scale = average / projection.square().sum(1).sqrt().clamp(min=1e-12 * average)
    return basis / scale, projection * scale[:, None]


def _channel_weights(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> torch.Tensor:
    """What an error of each channel of each key head costs, (H, d)."""
    weights = key_weights(heads, statistics, fit)
    channels = torch.ones(heads.key.shape[:2], dtype=torch.float64)
    for channel in heads.pairs:
        channels[:, channel] = weights
    if heads.key_norm is not None and fit == "aligned":
        gamma = heads.key_norm.abs()
        channels = channels * gamma.clamp(min=1e-6 * float(gamma.max()))
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
        rows = (heads.key * channels[..., None]).flatten(0, 1)
        expansion, projection = low_rank(rows, moment(statistics, fit, "key"), request.width(head_dim))
        return Composed(self.name, count, head_dim, projection, expansion / channels.flatten()[:, None]), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed values; o_proj stays as it is."""
        fit = request.fit
        count, head_dim = heads.value.shape[:2]
        square, inverse = value_root(heads, fit)
        rows = (square @ heads.value).flatten(0, 1)
        expansion, projection = low_rank(rows, moment(statistics, fit, "value"), request.width(head_dim))
        expansion = (inverse @ expansion.unflatten(0, (count, head_dim))).flatten(0, 1)
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
            self.name, expansion.shape[0], expansion.shape[1], own, expansion.flatten(0, 1), latent=latent
        ), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed values; o_proj stays as it is."""
        latent, _, expansion = _share_latent(heads, statistics, request)
        own = latent[len(latent) - request.width(heads.value.shape[1]) :]
        return Composed(
            self.name, expansion.shape[0], expansion.shape[1], own, expansion.flatten(0, 1), latent=latent
        ), heads


def _share_latent(
    heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latent's rows (rank, D + 1), and what keys and values read from it, each (H, d, rank).

    Keys and values are stacked, weighed and made equal in size; then keys count `emphasis` times as much, for an error
    of a key changes what is attended to.
    """
    count, head_dim = heads.key.shape[:2]
    channels = _channel_weights(heads, statistics, request.fit)
    square, inverse = value_root(heads, request.fit)
    second = moment(statistics, request.fit, "key")
    keys = (heads.key * channels[..., None]).flatten(0, 1)
    values = (square @ heads.value).flatten(0, 1)
    attended = moment(statistics, request.fit, "value")
    energy = [(through(rows, seen) * rows).sum() for rows, seen in ((keys, second), (values, attended))]
    scale = request.emphasis * float((energy[1] / energy[0]).sqrt() if min(energy) > 0 else 1.0)
    rank = request.width(head_dim) + round(request.other * head_dim)
    expansion, latent = low_rank(torch.cat((keys * scale, values)), second, rank)
    for_keys = (expansion[: count * head_dim] / scale / channels.flatten()[:, None]).unflatten(0, (count, head_dim))
    for_values = inverse @ expansion[count * head_dim :].unflatten(0, (count, head_dim))
    return latent, for_keys, for_values
