"""What the fits look at: moments, weights of errors and inner products, for each kind of fit.

``weights`` looks at the projections alone, ``activations`` at what they send on calibration text, ``aligned`` also at
what the layer does with it: key errors count as much as the queries of their rotary pair are long, value errors as
much as o_proj amplifies them, and values are looked at after attention has averaged them.
"""

import torch

from mea_compress.alignment import fold_head_norm, key_pairs, output_metric, root
from mea_compress.calibration import LayerStatistics
from mea_compress.heads import AttentionHeads

_FLOOR = 1e-4


def moment(statistics: LayerStatistics | None, fit: str, side: str) -> torch.Tensor | None:
    """Σ = E[x xᵀ] as the fit sees it, (D + 1, D + 1); None, for the identity, where it looks at weights alone."""
    if fit == "weights" or statistics is None:
        return None
    return statistics.attended if fit == "aligned" and side == "value" else statistics.moment


def through(rows: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """Rows times Σ, (..., D + 1), as inner products of rows take them; see `moment`."""
    return rows if second is None else rows @ second.to(rows.dtype)


def key_weights(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> torch.Tensor:
    """Root of what an error of each rotary pair of each key head costs, (H, P); ones where the fit ignores it.

    Under a key norm a head's errors also count in proportion to 1/rms of the head.
    """
    if fit != "aligned" or statistics is None:
        return torch.ones(heads.key.shape[0], len(heads.pairs[0]), dtype=torch.float64)
    weights = _noticed(statistics)
    if heads.key_norm is not None:
        power = torch.einsum("hdx,xy,hdy->h", heads.key, statistics.moment, heads.key) / heads.key.shape[1]
        weights = weights / power.clamp(min=1e-300).sqrt()[:, None]
    return weights


def _noticed(statistics: LayerStatistics) -> torch.Tensor:
    cost = statistics.key_cost.sqrt()
    return cost.clamp(min=_FLOOR * float(cost.max().clamp(min=1e-300)))


def key_cross(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> torch.Tensor:
    """E[k[g, p] conj(k[h, p])] of weighted keys, (P, H, H), complex128; ``aligned``: as attention notices their errors.

    Args:
        heads: The layer; with ``aligned`` in the basis and the order of the statistics.
        statistics: Of the layer; see `moment` for None.
        fit: The fit.
    """
    if fit == "aligned" and statistics is not None:
        weights = _noticed(statistics).T  # of normed keys under a key norm
        return statistics.key_covariance * weights[:, :, None] * weights[:, None, :]
    pairs = key_pairs(heads)  # (H, P, D + 1)
    return torch.einsum("gpx,hpx->pgh", through(pairs, moment(statistics, fit, "key")), pairs.conj())


def value_root(heads: AttentionHeads, fit: str) -> tuple[torch.Tensor, torch.Tensor]:
    """M^½ and M^-½ of what o_proj does with each value head, (H, d, d) each; identities where the fit ignores it."""
    if fit != "aligned":
        identity = torch.eye(heads.value.shape[1], dtype=torch.float64).expand(heads.value.shape[0], -1, -1)
        return identity, identity
    return root(output_metric(fold_head_norm(heads)), floor=_FLOOR**2)


def value_cross(values: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """E[v[g] v[h]ᵀ], (H, H, d, d)."""
    return torch.einsum("gax,hbx->ghab", through(values, second), values)
