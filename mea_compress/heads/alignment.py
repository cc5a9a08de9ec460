"""Changes of basis inside heads that leave the function of the attention as it is.

Keys: multiplying rotary pair p of head g by a complex number commutes with RoPE, and the queries of the group take it
back. Values: any invertible map of a head is taken back by o_proj; under a head norm only rotations are. The norm of
QK-norm keys does not commute with either, so their basis stays.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mea_compress.heads.composed import Array
from mea_compress.heads.types import AttentionHeads

_TOLERANCE = 1e-9
_ROUNDS = 500


def key_pairs(heads: AttentionHeads) -> Array:
    """Return the keys as complex rotary pairs, (H, P, D + 1), complex128."""
    first, second = heads.pairs
    return heads.key[:, first] + 1j * heads.key[:, second]


def from_pairs(pairs: Array, heads: AttentionHeads) -> Array:
    """Return complex rotary pairs (..., P, D + 1) as channels (..., d, D + 1), float64."""
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
        heads,
        key=from_pairs(key_pairs(heads) * factors[..., None], heads),
        query=scale_query_pairs(heads, 1 / factors.conj()),
    )


def scale_query_pairs(heads: AttentionHeads, factors: Array) -> Array:
    """Return the queries whose pairs are multiplied by their group's factors (H, P): (Hq, d, D + 1)."""
    first, second = heads.pairs
    pairs = heads.query[:, first] + 1j * heads.query[:, second]
    return from_pairs(pairs * factors.repeat(heads.group, axis=0)[..., None], heads)


def fold_head_norm(heads: AttentionHeads) -> AttentionHeads:
    """Move the head norm's weight into o_proj, so that what remains of the norm commutes with rotations."""
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
    """Return M[g] = sum over the group's query heads of W_Oᵀ W_O, the sensitivity to value errors, (H, d, d)."""
    metric = heads.output.mT @ heads.output  # (Hq, d, d)
    return metric.reshape(-1, heads.group, *metric.shape[1:]).sum(1)


def sqrt_and_inverse_sqrt(matrix: Array, floor: float = 1e-10) -> tuple[Array, Array]:
    """Return M^½ and M^-½ of Hermitian positive matrices (..., n, n), eigenvalues clamped to `floor` of the largest.

    Where nothing is above 0, both are the identity.
    """
    values, vectors = np.linalg.eigh(matrix)
    largest = values[..., -1:]
    least = np.where(largest > 0, floor * largest, 1.0)
    square = np.sqrt(np.maximum(values, least))
    transposed = vectors.mT.conj()
    return (vectors * square[..., None, :]) @ transposed, (vectors / square[..., None, :]) @ transposed


def align_phases(cross: Array, components: int) -> Array:
    """Find phases that make heads as alike as possible before they are combined with real coefficients.

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


def _align_phases(cross: Array, components: int, start: Array) -> tuple[float, Array]:
    def gram(z: Array) -> Array:
        aligned = cross * z.T[:, :, None] * z.T[:, None, :].conj()  # (P, H, H)
        return aligned.real.sum(0)

    def improve(z: Array, projector: Array) -> Array:
        # <k, reconstruction> = sum over h of Π[g, h] conj(z[h]) cross[g, h]
        inner = ((projector * cross) @ z.conj().T[..., None])[..., 0].T  # (H, P)
        return phase(inner.conj())

    return _alternate(start, components, gram, improve)


def _alternate(
    start: Array, components: int, gram: Callable[[Array], Array], improve: Callable[[Array, Array], Array]
) -> tuple[float, Array]:
    """Alternate the top C eigenvectors of the heads' Gram with the alignment that suits them, to convergence.

    Args:
        start: The alignment to begin with.
        components: C.
        gram: The H × H Gram of heads in an alignment.
        improve: The alignment that suits a projector onto C components, (H, H), given the present one.

    Returns:
        The energy that C components capture, and the alignment.
    """
    captured, alignment = -1.0, start
    for _ in range(_ROUNDS):
        values, vectors = np.linalg.eigh(gram(alignment))
        energy = float(values[-components:].sum())
        if energy - captured <= _TOLERANCE * abs(energy):
            break
        captured = energy
        top = vectors[:, -components:]
        alignment = improve(alignment, top @ top.T)
    return captured, alignment


def align_rotations(cross: Array, components: int) -> Array:
    """Find rotations that make value heads as alike as possible before they are combined with real coefficients.

    Alternates the top C eigenvectors of the H × H Gram with orthogonal Procrustes; starts from each head's own
    principal basis and from the basis as it is, and keeps the better end.

    Args:
        cross: E[v[g] v[h]ᵀ], (H, H, d, d), float64, whitened as errors count.
        components: C.

    Returns:
        A, (H, d, d), orthogonal.
    """
    heads, head_dim = cross.shape[0], cross.shape[-1]
    within = np.stack([cross[g, g] for g in range(heads)])
    principal = np.linalg.eigh(within).eigenvectors.mT[:, ::-1]  # (H, d, d), an axis a row
    # Signs are free: the first head's make its largest entries positive, the others agree with it axis by axis.
    first = principal[0]
    first = first * np.sign(np.take_along_axis(first, np.abs(first).argmax(1, keepdims=True), 1))
    agreement = ((principal @ cross[:, 0]) * first).sum(-1)  # (H, d)
    principal = principal * np.where(agreement < 0, -1.0, 1.0)[..., None]
    identity = np.broadcast_to(np.eye(head_dim), (heads, head_dim, head_dim))
    return _best([_align_rotations(cross, components, start) for start in (principal, identity)])


def _align_rotations(cross: Array, components: int, start: Array) -> tuple[float, Array]:
    def improve(maps: Array, projector: Array) -> Array:
        inner = (projector[..., None, None] * (cross @ maps.mT)).sum(1)  # E[v reconstructionᵀ], (H, d, d)
        return nearest_rotation(inner)

    return _alternate(start, components, lambda maps: rotated_gram(cross, maps), improve)


def rotated_gram(cross: Array, maps: Array) -> Array:
    """Return E⟨A[g] v[g], A[h] v[h]⟩ for E[v[g] v[h]ᵀ] (H, H, d, d) and A (H, d, d): (H, H)."""
    return ((maps[:, None] @ cross) * maps[None]).sum((-2, -1))


def nearest_rotation(inner: Array) -> Array:
    """Return the orthogonal A with the largest tr(A · inner), for each matrix (..., d, d): orthogonal Procrustes."""
    left, _, right = np.linalg.svd(inner)
    return right.mT @ left.mT


def phase(z: Array) -> Array:
    """Return z / |z|, and 1 where z is 0."""
    size = np.abs(z)
    return np.where(size > 0, z / np.maximum(size, 1e-300), 1.0)


def _best(ends: list[tuple[float, Array]]) -> Array:
    return max(ends, key=lambda end: end[0])[1]
