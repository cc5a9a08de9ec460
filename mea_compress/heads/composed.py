"""What a composition makes of one side (keys or values) of one layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
"""Numbers of heads, compositions and statistics: float64, and complex128 where rotary pairs are complex numbers."""


def split_heads(rows: Array, head_dim: int) -> Array:
    """Rows of a projection (heads * d, n) as heads (heads, d, n)."""
    return rows.reshape(-1, head_dim, rows.shape[-1])


def join_heads(heads: Array) -> Array:
    """Heads (heads, d, n) as rows of a projection (heads * d, n)."""
    return heads.reshape(-1, heads.shape[-1])


@dataclass(frozen=True)
class Composed:
    """Component projections and the composition that rebuilds the heads from them. All arrays are float64.

    Attributes:
        kind: Name of the composition.
        heads: H, the heads that the queries see.
        head_dim: d.
        projection: (width, D + 1): the rows of k_proj or v_proj, the bias as last column.
        weight: ``key_composition.weight`` or ``value_composition.weight``; None where heads are cached or pooled.
        rotary_components: Complex components of each rotary pair (``frequency`` alone).
        pairs: The two channels of every rotary pair (``frequency`` alone).
        latent: The rows of k_proj and v_proj together, (both widths, D + 1), which the weight reads (``joint`` alone).
        groups: Separate groups of adjacent heads, each composed from its own share of the components.
    """

    kind: str
    heads: int
    head_dim: int
    projection: Array
    weight: Array | None = None
    rotary_components: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    latent: Array | None = None
    groups: int = 1

    @property
    def components(self) -> int | float:
        """Component heads: cached width over head_dim."""
        whole, rest = divmod(self.projection.shape[0], self.head_dim)
        return whole if not rest else self.projection.shape[0] / self.head_dim

    def expansion(self) -> Array:
        """The linear map from components to heads, (H * d, width): every composition is one.

        For keys it commutes with RoPE unless the kind is ``latent``.
        """
        width, d, weight = self.projection.shape[0], self.head_dim, self.weight
        if self.kind in ("none", "pool"):
            components = width // d
            own = np.eye(components).repeat(self.heads // components, axis=0)
            return np.kron(own, np.eye(d))
        assert weight is not None
        if self.kind in ("latent", "joint"):
            return weight
        if self.kind == "frequency":
            return self._frequency_expansion(weight)
        return np.kron(weight.T, np.eye(d))

    def _frequency_expansion(self, weight: Array) -> Array:
        assert self.pairs is not None and self.rotary_components is not None
        first, second = self.pairs
        lanes = weight.shape[1]
        expansion = np.zeros((self.heads, self.head_dim, 2 * lanes))
        lane = 0
        for pair, count in enumerate(self.rotary_components):
            for _ in range(count):
                real, imaginary = weight[0, lane], weight[1, lane]  # (H,)
                expansion[:, first[pair], lane] = real
                expansion[:, first[pair], lanes + lane] = -imaginary
                expansion[:, second[pair], lane] = imaginary
                expansion[:, second[pair], lanes + lane] = real
                lane += 1
        return expansion.reshape(-1, 2 * lanes)

    def each_head(self) -> Iterator[Array]:
        """The heads as the queries see them, one after another, (d, D + 1) each."""
        if self.kind in ("frequency", "latent", "joint"):
            rows = self.projection if self.latent is None else self.latent
            expansion = self.expansion()
            for own in expansion.reshape(self.heads, self.head_dim, expansion.shape[1]):
                yield own @ rows
            return
        if self.weight is not None:
            yield from self.composed_heads()
            return
        components = split_heads(self.projection, self.head_dim)
        for head in range(self.heads):
            yield components[head * components.shape[0] // self.heads]

    def composed_heads(self) -> Array:
        """The heads as the queries see them, (H, d, D + 1); where all are cached, the projection itself."""
        if self.kind == "none":
            return split_heads(self.projection, self.head_dim)
        if self.kind in ("head", "prune", "share"):
            assert self.weight is not None
            components = split_heads(self.projection, self.head_dim)
            return (self.weight.T @ components.reshape(len(components), -1)).reshape(-1, *components.shape[1:])
        heads = np.empty((self.heads, self.head_dim, self.projection.shape[1]))
        for head, own in zip(heads, self.each_head(), strict=True):
            head[...] = own
        return heads
