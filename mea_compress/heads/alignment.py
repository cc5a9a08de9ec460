"""Changes of basis inside heads that leave the function of the attention as it is.

Keys: multiplying rotary pair p of head g by a complex number commutes with RoPE, and the queries of the group take it
back. Values: any invertible map of a head is taken back by o_proj; under a head norm only rotations are. The norm of
QK-norm keys does not commute with either, so their basis stays.
"""

from dataclasses import replace

import numpy as np

from mea_compress.heads.composed import Array
from mea_compress.heads.types import AttentionHeads

_TOLERANCE = 1e-9
_ROUNDS = 500


def key_pairs(heads: AttentionHeads) -> Array:
    """Keys as complex rotary pairs, (H, P, D + 1), complex128."""
    first, second = heads.pairs
    return heads.key[:, first] + 1j * heads.key[:, second]


def from_pairs(pairs: Array, heads: AttentionHeads) -> Array:
    """Complex rotary pairs (..., P, D + 1) as channels (..., d, D + 1), float64."""
    first, second = heads.pairs
    channels = np.empty((*pairs.shape[:-2], heads.query.shape[1], pairs.shape[-1]))
    channels[..., first, :] = pairs.real
    channels[..., second, :] = pairs.imag
    return channels


def change_key_basis(heads: AttentionHeads, factors: Array) -> AttentionHeads:
    """k[g, p] -> z k[g, p] and q[i, p] -> q[i, p] / conj(z): every logit stays the same.

    Args:
        heads: A layer without QK-norm.
        factors: z, (H, P), complex128, none of them zero.
    """
    return replace(
        heads, key=from_pairs(key_pairs(heads) * factors[..., None], heads), query=query_for(heads, 1 / factors.conj())
    )


def query_for(heads: AttentionHeads, factors: Array) -> Array:
    """Queries whose pairs are multiplied by their group's factors (H, P): (Hq, d, D + 1)."""
    first, second = heads.pairs
    pairs = heads.query[:, first] + 1j * heads.query[:, second]
    return from_pairs(pairs * factors.repeat(heads.group, axis=0)[..., None], heads)


def fold_head_norm(heads: AttentionHeads) -> AttentionHeads:
    """Moves the head norm's weight into o_proj, so that what remains of the norm commutes with rotations."""
    if heads.head_norm is None:
        return heads
    return replace(heads, output=heads.output * heads.head_norm, head_norm=np.ones_like(heads.head_norm))


def change_value_basis(heads: AttentionHeads, maps: Array) -> AttentionHeads:
    """V[g] -> A[g] V[g] and W_O[i] -> W_O[i] A[g]⁻¹: the block's output stays the same.

    Args:
        heads: The layer; under a head norm with its weight folded (`fold_head_norm`).
        maps: A, (H, d, d); rotations under a head norm, else any invertible matrices.
    """
    inverse = np.linalg.inv(maps).repeat(heads.group, axis=0)  # (Hq, d, d)
    return replace(heads, value=maps @ heads.value, output=heads.output @ inverse)


def output_metric(heads: AttentionHeads) -> Array:
    """M[g] = sum over the group's query heads of W_Oᵀ W_O: what an error of a value head costs, (H, d, d)."""
    own = heads.output.mT @ heads.output  # (Hq, d, d)
    return own.reshape(-1, heads.group, *own.shape[1:]).sum(1)


def root(matrix: Array, floor: float = 1e-10) -> tuple[Array, Array]:
    """M^½ and M^-½ of symmetric positive matrices (..., n, n), eigenvalues clamped to `floor` of the largest.

    Where nothing is above 0, both are the identity.
    """
    values, vectors = np.linalg.eigh(matrix)
    largest = values[..., -1:]
    least = np.where(largest > 0, floor * largest, 1.0)
    square = np.sqrt(np.maximum(values, least))
    return (vectors * square[..., None, :]) @ vectors.mT, (vectors / square[..., None, :]) @ vectors.mT


def align_phases(cross: Array, components: int) -> Array:
    """Phases that make heads as alike as possible before they are combined with real coefficients.

    Alternates (a) the top C eigenvectors of the real H × H Gram and (b) each phase to that of the inner product with
    the reconstruction. Two starts, the better end is kept.

    Args:
        cross: E[k[g, p] conj(k[h, p])], (P, H, H), complex128, weighted as errors count.
        components: C.

    Returns:
        z of modulus 1, (H, P), complex128.
    """
    heads = cross.shape[1]
    leading = np.linalg.eigh(cross).eigenvectors[..., -1]  # (P, H)
    starts = [np.ones((heads, cross.shape[0]), cross.dtype), phase(leading.conj()).T]
    return _best([_align_phases(cross, components, start) for start in starts])


def _align_phases(cross: Array, components: int, z: Array) -> tuple[float, Array]:
    captured = -1.0
    for _ in range(_ROUNDS):
        aligned = cross * z.T[:, :, None] * z.T[:, None, :].conj()  # (P, H, H)
        values, vectors = np.linalg.eigh(aligned.real.sum(0))
        now = float(values[-components:].sum())
        if now - captured <= _TOLERANCE * abs(now):
            break
        captured = now
        top = vectors[:, -components:]
        projector = top @ top.T  # (H, H)
        # <k, reconstruction> = sum over h of Π[g, h] conj(z[h]) cross[g, h]
        inner = ((projector * cross) @ z.conj().T[..., None])[..., 0].T  # (H, P)
        z = phase(inner.conj())
    return captured, z


def align_rotations(cross: Array, components: int) -> Array:
    """Rotations that make value heads as alike as possible before they are combined with real coefficients.

    Alternates the top C eigenvectors of the H × H Gram with orthogonal Procrustes; starts from each head's own
    principal basis and from the basis as it is, and keeps the better end.

    Args:
        cross: E[v[g] v[h]ᵀ], (H, H, d, d), float64, whitened as errors count.
        components: C.

    Returns:
        A, (H, d, d), orthogonal.
    """
    heads, head_dim = cross.shape[0], cross.shape[-1]
    own = np.stack([cross[g, g] for g in range(heads)])
    principal = np.linalg.eigh(own).eigenvectors.mT[:, ::-1]  # (H, d, d), an axis a row
    # Signs are free: the first head's make its largest entries positive, the others agree with it axis by axis.
    first = principal[0]
    first = first * np.sign(np.take_along_axis(first, np.abs(first).argmax(1, keepdims=True), 1))
    agreement = ((principal @ cross[:, 0]) * first).sum(-1)  # (H, d)
    principal = principal * np.where(agreement < 0, -1.0, 1.0)[..., None]
    identity = np.broadcast_to(np.eye(head_dim), (heads, head_dim, head_dim))
    return _best([_align_rotations(cross, components, start) for start in (principal, identity)])


def _align_rotations(cross: Array, components: int, maps: Array) -> tuple[float, Array]:
    captured = -1.0
    for _ in range(_ROUNDS):
        gram = turned_gram(cross, maps)
        values, vectors = np.linalg.eigh(gram)
        now = float(values[-components:].sum())
        if now - captured <= _TOLERANCE * abs(now):
            break
        captured = now
        top = vectors[:, -components:]
        projector = top @ top.T  # (H, H)
        inner = (projector[..., None, None] * (cross @ maps.mT)).sum(1)  # E[v reconstructionᵀ], (H, d, d)
        maps = nearest_rotation(inner)
    return captured, maps


def turned_gram(cross: Array, maps: Array) -> Array:
    """E⟨A[g] v[g], A[h] v[h]⟩ for E[v[g] v[h]ᵀ] (H, H, d, d) and A (H, d, d): (H, H)."""
    return ((maps[:, None] @ cross) * maps[None]).sum((-2, -1))


def nearest_rotation(inner: Array) -> Array:
    """Orthogonal A with the largest tr(A · inner), for any number of matrices (..., d, d): orthogonal Procrustes."""
    left, _, right = np.linalg.svd(inner)
    return right.mT @ left.mT


def phase(z: Array) -> Array:
    """Z / |z|, and 1 where z is 0."""
    size = np.abs(z)
    return np.where(size > 0, z / np.maximum(size, 1e-300), 1.0)


def _best(ends: list[tuple[float, Array]]) -> Array:
    return max(ends, key=lambda end: end[0])[1]
