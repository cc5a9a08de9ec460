"""Changes of basis inside heads that leave the function of the attention as it is.

Keys: multiplying rotary pair p of head g by a complex number commutes with RoPE, and the queries of the group take it
back. Values: any invertible map of a head is taken back by o_proj; under a head norm only rotations are. The norm of
QK-norm keys does not commute with either, so their basis stays.
"""

from dataclasses import replace

import torch

from mea_compress.heads import AttentionHeads

_TOLERANCE = 1e-9
_ROUNDS = 500


def key_pairs(heads: AttentionHeads) -> torch.Tensor:
    """Keys as complex rotary pairs, (H, P, D + 1), complex128."""
    first, second = heads.pairs
    return torch.complex(heads.key[:, first], heads.key[:, second])


def from_pairs(pairs: torch.Tensor, heads: AttentionHeads) -> torch.Tensor:
    """Complex rotary pairs (..., P, D + 1) as channels (..., d, D + 1), float64."""
    first, second = heads.pairs
    channels = pairs.real.new_empty(*pairs.shape[:-2], heads.query.shape[1], pairs.shape[-1])
    channels[..., first, :] = pairs.real
    channels[..., second, :] = pairs.imag
    return channels


def change_key_basis(heads: AttentionHeads, factors: torch.Tensor) -> AttentionHeads:
    """k[g, p] -> z k[g, p] and q[i, p] -> q[i, p] / conj(z): every logit stays the same.

    Args:
        heads: A layer without QK-norm.
        factors: z, (H, P), complex128, none of them zero.
    """
    return replace(
        heads, key=from_pairs(key_pairs(heads) * factors[..., None], heads), query=query_for(heads, 1 / factors.conj())
    )


def query_for(heads: AttentionHeads, factors: torch.Tensor) -> torch.Tensor:
    """Queries whose pairs are multiplied by their group's factors (H, P): (Hq, d, D + 1)."""
    first, second = heads.pairs
    pairs = torch.complex(heads.query[:, first], heads.query[:, second])
    return from_pairs(pairs * factors.repeat_interleave(heads.group, 0)[..., None], heads)


def fold_head_norm(heads: AttentionHeads) -> AttentionHeads:
    """Moves the head norm's weight into o_proj, so that what remains of the norm commutes with rotations."""
    if heads.head_norm is None:
        return heads
    return replace(heads, output=heads.output * heads.head_norm, head_norm=torch.ones_like(heads.head_norm))


def change_value_basis(heads: AttentionHeads, maps: torch.Tensor) -> AttentionHeads:
    """V[g] -> A[g] V[g] and W_O[i] -> W_O[i] A[g]⁻¹: the block's output stays the same.

    Args:
        heads: The layer; under a head norm with its weight folded (`fold_head_norm`).
        maps: A, (H, d, d); rotations under a head norm, else any invertible matrices.
    """
    inverse = torch.linalg.inv(maps).repeat_interleave(heads.group, 0)  # (Hq, d, d)
    return replace(heads, value=maps @ heads.value, output=heads.output @ inverse)


def output_metric(heads: AttentionHeads) -> torch.Tensor:
    """M[g] = sum over the group's query heads of W_Oᵀ W_O: what an error of a value head costs, (H, d, d)."""
    return (heads.output.transpose(1, 2) @ heads.output).unflatten(0, (-1, heads.group)).sum(1)


def root(matrix: torch.Tensor, floor: float = 1e-10) -> tuple[torch.Tensor, torch.Tensor]:
    """M^½ and M^-½ of symmetric positive matrices (..., n, n), eigenvalues clamped to `floor` of the largest.

    Where nothing is above 0, both are the identity.
    """
    values, vectors = torch.linalg.eigh(matrix)
    largest = values[..., -1:]
    least = torch.where(largest > 0, floor * largest, torch.ones_like(largest))
    square = values.clamp(min=least).sqrt()
    return (vectors * square[..., None, :]) @ vectors.mT, (vectors / square[..., None, :]) @ vectors.mT


def align_phases(cross: torch.Tensor, components: int) -> torch.Tensor:
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
    leading = torch.linalg.eigh(cross).eigenvectors[..., -1]  # (P, H)
    starts = [torch.ones(heads, cross.shape[0], dtype=cross.dtype), _phase(leading.conj()).T]
    return _best([_align_phases(cross, components, start) for start in starts])


def _align_phases(cross: torch.Tensor, components: int, z: torch.Tensor) -> tuple[float, torch.Tensor]:
    captured = -1.0
    for _ in range(_ROUNDS):
        aligned = cross * z.T[:, :, None] * z.T[:, None, :].conj()  # (P, H, H)
        values, vectors = torch.linalg.eigh(aligned.real.sum(0))
        now = float(values[-components:].sum())
        if now - captured <= _TOLERANCE * abs(now):
            break
        captured = now
        top = vectors[:, -components:]
        projector = (top @ top.T).to(cross.dtype)  # (H, H)
        # <k, reconstruction> = sum over h of Π[g, h] conj(z[h]) cross[g, h]
        inner = torch.einsum("gh,hp,pgh->gp", projector, z.conj(), cross)
        z = _phase(inner.conj())
    return captured, z


def align_rotations(cross: torch.Tensor, components: int) -> torch.Tensor:
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
    own = torch.stack([cross[g, g] for g in range(heads)])
    principal = torch.linalg.eigh(own).eigenvectors.mT.flip(-2)
    identity = torch.eye(head_dim, dtype=cross.dtype).expand(heads, -1, -1)
    return _best([_align_rotations(cross, components, start) for start in (principal, identity)])


def _align_rotations(cross: torch.Tensor, components: int, maps: torch.Tensor) -> tuple[float, torch.Tensor]:
    captured = -1.0
    for _ in range(_ROUNDS):
        gram = torch.einsum("gab,ghbc,hac->gh", maps, cross, maps)
        values, vectors = torch.linalg.eigh(gram)
        now = float(values[-components:].sum())
        if now - captured <= _TOLERANCE * abs(now):
            break
        captured = now
        top = vectors[:, -components:]
        inner = torch.einsum("gh,ghbc,hac->gba", top @ top.T, cross, maps)  # E[v reconstructionᵀ], (H, d, d)
        left, _, right = torch.linalg.svd(inner)
        maps = right.mT @ left.mT
    return captured, maps


def _phase(z: torch.Tensor) -> torch.Tensor:
    size = z.abs()
    return torch.where(size > 0, z / size.clamp(min=1e-300), torch.ones_like(z))


def _best(ends: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
    return max(ends, key=lambda end: end[0])[1]
