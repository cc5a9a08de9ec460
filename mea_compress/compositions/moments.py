"""Covariances, error weights and Gram matrices for each kind of fit.

``weights`` looks at the projections alone, ``activations`` at what they send on calibration text, ``aligned`` also at
what the layer does with it: key errors count as much as the queries of their rotary pair are long, value errors as
much as o_proj amplifies them, and values are looked at after attention has averaged them.
"""

import numpy as np

from mea_compress.heads.alignment import fold_head_norm, key_pairs, output_metric, sqrt_and_inverse_sqrt
from mea_compress.heads.composed import Array, join_heads
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.heads.types import AttentionHeads

_FLOOR = 1e-4


def moment(statistics: LayerStatistics | None, fit: str, side: str) -> Array | None:
    """Return Σ = E[x xᵀ] as the fit sees it, (D + 1, D + 1); None, the identity, where it looks at weights alone."""
    if fit == "weights" or statistics is None:
        return None
    return statistics.attention_weighted_moment if fit == "aligned" and side == "value" else statistics.moment


def apply_covariance(rows: Array, covariance: Array | None) -> Array:
    """Return rows times Σ, (..., D + 1), the left side of their inner products; see `moment`."""
    return rows if covariance is None else rows @ covariance


def key_weights(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """Return the root of each rotary pair's sensitivity for each key head, (H, P); ones where the fit ignores it.

    Under a key norm a head's errors also count in proportion to 1/rms of the head.
    """
    if fit != "aligned" or statistics is None:
        return np.ones((heads.key.shape[0], len(heads.pairs[0])))
    weights = _root_sensitivity(statistics)
    if heads.key_norm is not None:
        power = (apply_covariance(heads.key, statistics.moment) * heads.key).sum((1, 2)) / heads.key.shape[1]
        weights = weights / np.sqrt(np.maximum(power, 1e-300))[:, None]
    return weights


def _root_sensitivity(statistics: LayerStatistics) -> Array:
    """Return the root of the key sensitivity, (H, P), clamped to `_FLOOR` of the largest."""
    root = np.sqrt(statistics.key_sensitivity)
    return np.maximum(root, _FLOOR * max(root.max(), 1e-300))


def key_cross(heads: AttentionHeads, statistics: LayerStatistics | None, fit: str) -> Array:
    """Return E[k[g, p] conj(k[h, p])] of weighted keys, (P, H, H), complex128; ``aligned``: weighted by sensitivity.

    Args:
        heads: The layer; with ``aligned`` in the basis and the order of the statistics.
        statistics: Of the layer; see `moment` for None.
        fit: The fit.
    """
    if fit == "aligned" and statistics is not None:
        weights = _root_sensitivity(statistics).T  # of normed keys under a key norm
        return statistics.key_covariance * weights[:, :, None] * weights[:, None, :]
    return pair_cross(key_pairs(heads), moment(statistics, fit, "key"))


def pair_cross(pairs: Array, covariance: Array | None) -> Array:
    """Return E[k[g, p] conj(k[h, p])] of rotary pairs (H, P, D + 1): (P, H, H), complex128."""
    return apply_covariance(pairs, covariance).swapaxes(0, 1) @ pairs.conj().transpose(1, 2, 0)


def head_gram(heads: Array, covariance: Array | None) -> Array:
    """Return E⟨k[g], k[h]⟩ of heads (H, d, D + 1): (H, H)."""
    return apply_covariance(heads, covariance).reshape(len(heads), -1) @ heads.reshape(len(heads), -1).T


def leading_components(gram: Array, count: int) -> Array:
    """Return the `count` leading eigenvectors of a Gram matrix (n, n), as columns in descending order, (n, count)."""
    return fix_phases(np.linalg.eigh(gram).eigenvectors[:, ::-1][:, :count])


def fix_phases(basis: Array) -> Array:
    """Make the entry of each column that is largest in size positive: its sign or phase is free.

    So the bytes of a result are the same wherever its eigenvectors are (scikit-learn's `svd_flip`).
    """
    largest = np.take_along_axis(basis, np.abs(basis).argmax(0, keepdims=True), 0)
    return basis * (np.abs(largest) / largest)


def value_root(heads: AttentionHeads, fit: str) -> tuple[Array, Array]:
    """Return M^½ and M^-½ of o_proj's metric on each value head, (H, d, d); identities where the fit ignores it."""
    if fit != "aligned":
        head_dim = heads.value.shape[1]
        identity = np.broadcast_to(np.eye(head_dim), (heads.value.shape[0], head_dim, head_dim))
        return identity, identity
    return sqrt_and_inverse_sqrt(output_metric(fold_head_norm(heads)), floor=_FLOOR**2)


def value_cross(values: Array, covariance: Array | None) -> Array:
    """Return E[v[g] v[h]ᵀ], (H, H, d, d)."""
    count, head_dim = values.shape[:2]
    inner = join_heads(apply_covariance(values, covariance)) @ join_heads(values).T
    return inner.reshape(count, head_dim, count, head_dim).swapaxes(1, 2)
