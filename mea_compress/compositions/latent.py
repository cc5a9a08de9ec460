"""Joint low rank over all heads of a side: a latent of C·d numbers, from which every head is rebuilt linearly.

The whitened SVD of Palu (2407.21118), SVD-LLM (2403.07378) and CARE (2603.17946), with errors weighed by what the
layer does with them. Values are read through the latent by o_proj; keys must be rebuilt before RoPE.
"""

import torch

from mea_compress.calibration import LayerStatistics
from mea_compress.composed import Composed
from mea_compress.compositions.measure import key_weights, moment, value_root
from mea_compress.compositions.request import Request
from mea_compress.heads import AttentionHeads


def low_rank(rows: torch.Tensor, second: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank for E‖(R - U P) x‖²: U (n, rank) and P (rank, D + 1), P's rows as large as an average row of R."""
    vectors = torch.linalg.eigh(rows @ second @ rows.T).eigenvectors
    basis = vectors.flip(-1)[:, :rank]
    basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
    projection = basis.T @ rows
    average = (rows.square().sum() / rows.shape[0]).sqrt().clamp(min=1e-300)
    scale = average / projection.square().sum(1).sqrt().clamp(min=1e-12 * average)
    return basis / scale, projection * scale[:, None]


class Latent:
    """A joint latent, for keys (before RoPE) and values."""

    name = "latent"

    def keys(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed keys; queries stay as they are."""
        components, fit = request.components, request.fit
        count, head_dim, size = heads.key.shape
        weights = key_weights(heads, statistics, fit)
        channels = torch.ones(count, head_dim, dtype=torch.float64)
        for channel in heads.pairs:
            channels[:, channel] = weights
        if heads.key_norm is not None and fit == "aligned":
            gamma = heads.key_norm.abs()
            channels = channels * gamma.clamp(min=1e-6 * float(gamma.max()))
        rows = (heads.key * channels[..., None]).flatten(0, 1)
        expansion, projection = low_rank(rows, moment(statistics, fit, "key", size), components * head_dim)
        return Composed(self.name, count, head_dim, projection, expansion / channels.flatten()[:, None]), heads

    def values(
        self, heads: AttentionHeads, statistics: LayerStatistics | None, request: Request
    ) -> tuple[Composed, AttentionHeads]:
        """Composed values; o_proj stays as it is."""
        components, fit = request.components, request.fit
        count, head_dim, size = heads.value.shape
        square, inverse = value_root(heads, fit)
        rows = (square @ heads.value).flatten(0, 1)
        expansion, projection = low_rank(rows, moment(statistics, fit, "value", size), components * head_dim)
        expansion = (inverse @ expansion.unflatten(0, (count, head_dim))).flatten(0, 1)
        return Composed(self.name, count, head_dim, projection, expansion), heads
