"""What the fits look at: moments, weights of errors and inner products, for each kind of fit.

``weights`` looks at the projections alone, ``activations`` at what they send on calibration text, ``aligned`` also at
what the layer does with it: key errors count as much as the queries of their rotary pair are long, value errors as
much as o_proj amplifies them, and values are looked at after attention has averaged them.
"""

import numpy as np

from mea_compress.heads.alignment import fold_head_norm, key_pairs, output_metric, root
from mea_compress.heads.composed import Array, join_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads

_FLOOR = 1e-4


def moment(statistics: LayerStatistics | None, fit: str, side: str) -> Array | None:
    """Σ = E[x xᵀ] as the fit sees it, (D + 1, D + 1); None, for the identity, where it looks at weights alone."""
    if fit == "weights" or statistics is None:
        return None
    return statistics.attended if fit == "aligned" and side == "value" else statistics.moment


def through(rows: Array, second: Array | None) -> Array:
    """Rows times Σ, (..., D + 1), as inner products of rows take them; see `moment`."""
    return rows if second is None else rows @ second


def key_weights(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """Root of what an error of each rotary pair of each key head costs, (H, P); ones where the fit ignores it.

    Under a key norm a head's errors also count in proportion to 1/rms of the head.
    """
    if fit != "aligned" or statistics is None:
        return np.ones((heads.key.shape[0], len(heads.pairs[0])))
    weights = _noticed(statistics)
    if heads.key_norm is not None:
        power = (through(heads.key, statistics.moment) * heads.key).sum((1, 2)) / heads.key.shape[1]
        weights = weights / np.sqrt(np.maximum(power, 1e-300))[:, None]
    return weights


def _noticed(statistics: LayerStatistics) -> Array:
    cost = np.sqrt(statistics.key_cost)
    return np.maximum(cost, _FLOOR * max(cost.max(), 1e-300))


def key_cross(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """E[k[g, p] conj(k[h, p])] of weighted keys, (P, H, H), complex128; ``aligned``: as attention notices their errors.

    Args:
        heads: The layer; with ``aligned`` in the basis and the order of the statistics.
        statistics: Of the layer; see `moment` for None.
        fit: The fit.
    """
    if fit == "aligned" and statistics is not None:
        weights = _noticed(statistics).T  # of normed keys under a key norm
        return statistics.key_covariance * weights[:, :, None] * weights[:, None, :]
    return pair_cross(key_pairs(heads), moment(statistics, fit, "key"))


def pair_cross(pairs: Array, second: Array | None) -> Array:
    """E[k[g, p] conj(k[h, p])] of rotary pairs (H, P, D + 1): (P, H, H), complex128."""
    return through(pairs, second).swapaxes(0, 1) @ pairs.conj().transpose(1, 2, 0)


def head_gram(heads: Array, second: Array | None) -> Array:
    """E⟨k[g], k[h]⟩ of heads (H, d, D + 1): (H, H)."""
    return through(heads, second).reshape(len(heads), -1) @ heads.reshape(len(heads), -1).T


def largest_entries(basis: Array) -> Array:
    """The entry of each column that is largest in size, (1, columns): what fixes a sign or phase that is free."""
    return np.take_along_axis(basis, np.abs(basis).argmax(0, keepdims=True), 0)


def value_root(heads: AttentionHeads, fit: str) -> tuple[Array, Array]:
    """M^½ and M^-½ of what o_proj does with each value head, (H, d, d) each; identities where the fit ignores it."""
    if fit != "aligned":
        head_dim = heads.value.shape[1]
        identity = np.broadcast_to(np.eye(head_dim), (heads.value.shape[0], head_dim, head_dim))
        return identity, identity
    return root(output_metric(fold_head_norm(heads)), floor=_FLOOR**2)


def value_cross(values: Array, second: Array | None) -> Array:
    """E[v[g] v[h]ᵀ], (H, H, d, d)."""
    count, head_dim = values.shape[:2]
    inner = join_heads(through(values, second)) @ join_heads(values).T
    return inner.reshape(count, head_dim, count, head_dim).swapaxes(1, 2)
