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
    """Length of the queries that meet each rotary pair of each key head, (H, P); ones where the fit ignores it.

    Under a key norm a head's errors also count in proportion to 1/rms of the head.
    """
    count, pairs = heads.key.shape[0], len(heads.pairs[0])
    if fit != "aligned" or statistics is None:
        return torch.ones(count, pairs, dtype=torch.float64)
    length = statistics.query_energy.sqrt()
    length = length.clamp(min=_FLOOR * float(length.max().clamp(min=1e-300)))
    if heads.key_norm is not None:
        power = torch.einsum("hdx,xy,hdy->h", heads.key, statistics.moment, heads.key) / heads.key.shape[1]
        length = length / power.clamp(min=1e-300).sqrt()[:, None]
    return length


def key_cross(heads: AttentionHeads, second: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
    """E[k[g, p] conj(k[h, p])] of weighted keys, (P, H, H), complex128."""
    pairs = key_pairs(heads) * weights[..., None]  # (H, P, D + 1)
    return torch.einsum("gpx,hpx->pgh", through(pairs, second), pairs.conj())


def value_root(heads: AttentionHeads, fit: str) -> tuple[torch.Tensor, torch.Tensor]:
    """M^½ and M^-½ of what o_proj does with each value head, (H, d, d) each; identities where the fit ignores it."""
    if fit != "aligned":
        identity = torch.eye(heads.value.shape[1], dtype=torch.float64).expand(heads.value.shape[0], -1, -1)
        return identity, identity
    return root(output_metric(fold_head_norm(heads)), floor=_FLOOR**2)


def value_cross(values: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """E[v[g] v[h]ᵀ], (H, H, d, d)."""
    return torch.einsum("gax,hbx->ghab", through(values, second), values)
