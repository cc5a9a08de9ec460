"""Keys or values of one layer, factored into component projections and the weight that rebuilds the heads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mea_compress.modeling.section_mea import (
    COMPLEX,
    ENCODED_COMPLEX,
    ENCODED_LOW_RANK,
    ENCODED_REAL,
    HEADS,
    KEPT,
    LOW_RANK,
    POOLED,
    REAL,
    SELECTED,
    SHARED_LATENT,
    Form,
)

Array: TypeAlias = NDArray[Any]
"""Numbers of heads, compositions and statistics: float64, and complex128 where rotary pairs are complex numbers."""


def split_heads(rows: Array, head_dim: int) -> Array:
    """Return the rows of a projection (heads * d, n) as heads (heads, d, n)."""
    return rows.reshape(-1, head_dim, rows.shape[-1])


def join_heads(heads: Array) -> Array:
    """Return heads (heads, d, n) as the rows of a projection (heads * d, n)."""
    return heads.reshape(-1, heads.shape[-1])


@dataclass(frozen=True)
class FactoredHeads:
    """Keys or values of one layer as component projections and a mixing weight. All arrays are float64.

    Attributes:
        form: How the side is stored, cached and read.
        heads: H, the heads that the queries see.
        head_dim: d.
        projection: (width, D + 1): the rows of k_proj or v_proj, the bias as last column.
        weight: ``key_composition.weight`` or ``value_composition.weight``; None where components are heads already.
        rotary_components: Complex components of each rotary pair (forms with `per_pair` alone).
        pairs: The two channels of every rotary pair (forms with `per_pair` alone).
        latent: The rows of k_proj and v_proj together, (both widths, D + 1), which the weight reads (`joint` forms).
        groups: Separate groups of adjacent heads, each rebuilt from its own share of the components.
        composition: What the section calls the side: the method that fitted it; empty for the name of the form.
    """

    form: Form
    heads: int
    head_dim: int
    projection: Array
    weight: Array | None = None
    rotary_components: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    latent: Array | None = None
    groups: int = 1
    composition: str = ""

    @property
    def components(self) -> int | float:
        """Component heads: cached width over head_dim."""
        whole, rest = divmod(self.projection.shape[0], self.head_dim)
        return whole if not rest else self.projection.shape[0] / self.head_dim

    def expansion(self) -> Array:
        """Return the linear map from components to heads, (H * d, width): every form is one.

        For keys it commutes with RoPE where the form says so.
        """
        return EXPANSIONS[self.form.name](self)

    def encoder(self) -> Array:
        """Return the encoder as a checkpoint stores it, of a projection whose inputs are the heads themselves."""
        return ENCODERS[self.form.name][0](self)

    def with_encoder(self, stored: Array) -> "FactoredHeads":
        """Return the side with another encoder, as a checkpoint stores it."""
        projection = ENCODERS[self.form.name][1](self, stored)
        return replace(self, projection=np.concatenate((projection, np.zeros((len(projection), 1))), axis=1))

    def each_head(self) -> Iterator[Array]:
        """Yield the heads as the queries see them, one after another, (d, D + 1) each."""
        if self.form.scalar:
            yield from self.reconstruct()
        elif self.form.plain:
            components = split_heads(self.projection, self.head_dim)
            for head in range(self.heads):
                yield components[head * components.shape[0] // self.heads]
        else:
            rows = self.projection if self.latent is None else self.latent
            expansion = self.expansion()
            for channels in expansion.reshape(self.heads, self.head_dim, expansion.shape[1]):
                yield channels @ rows

    def reconstruct(self) -> Array:
        """Return the heads as the queries see them, (H, d, D + 1); where all are cached, the projection itself."""
        if self.form.identity:
            return split_heads(self.projection, self.head_dim)
        if self.form.scalar:
            assert self.weight is not None
            components = split_heads(self.projection, self.head_dim)
            return (self.weight.T @ components.reshape(len(components), -1)).reshape(-1, *components.shape[1:])
        heads = np.empty((self.heads, self.head_dim, self.projection.shape[1]))
        for place, head in zip(heads, self.each_head(), strict=True):
            place[...] = head
        return heads


def _repeated(side: FactoredHeads) -> Array:
    components = side.projection.shape[0] // side.head_dim
    return np.kron(np.eye(components).repeat(side.heads // components, axis=0), np.eye(side.head_dim))


def _real(side: FactoredHeads) -> Array:
    assert side.weight is not None
    return np.kron(side.weight.T, np.eye(side.head_dim))


def _complex(side: FactoredHeads) -> Array:
    assert side.weight is not None and side.pairs is not None and side.rotary_components is not None
    first, second = side.pairs
    total = side.weight.shape[1]
    expansion = np.zeros((side.heads, side.head_dim, 2 * total))
    component = 0
    for pair, count in enumerate(side.rotary_components):
        for _ in range(count):
            real, imaginary = side.weight[0, component], side.weight[1, component]  # (H,)
            expansion[:, first[pair], component] = real
            expansion[:, first[pair], total + component] = -imaginary
            expansion[:, second[pair], component] = imaginary
            expansion[:, second[pair], total + component] = real
            component += 1
    return expansion.reshape(-1, 2 * total)


def _low_rank(side: FactoredHeads) -> Array:
    assert side.weight is not None
    return side.weight


EXPANSIONS: dict[str, Callable[[FactoredHeads], Array]] = {
    **dict.fromkeys((HEADS.name, POOLED.name), _repeated),
    **dict.fromkeys((REAL.name, KEPT.name, SELECTED.name, ENCODED_REAL.name), _real),
    **dict.fromkeys((COMPLEX.name, ENCODED_COMPLEX.name), _complex),
    **dict.fromkeys((LOW_RANK.name, SHARED_LATENT.name, ENCODED_LOW_RANK.name), _low_rank),
}
"""The linear map of each form, (H * d, width)."""


def _real_encoder(side: FactoredHeads) -> Array:
    rows = side.projection[:, :-1].reshape(-1, side.head_dim, side.heads, side.head_dim)
    return rows[:, 0, :, 0].copy()


def _from_real_encoder(side: FactoredHeads, stored: Array) -> Array:
    return np.kron(stored, np.eye(side.head_dim))


def _complex_encoder(side: FactoredHeads) -> Array:
    first, _, places = _pairs_of_components(side)
    rows = side.projection[:, :-1].reshape(2, len(places), side.heads, side.head_dim)
    # A complex number e for each component and head: its real part reads Re(e) of a pair's first channel.
    return np.stack([rows[part, places, :, first] for part in (0, 1)])


def _from_complex_encoder(side: FactoredHeads, stored: Array) -> Array:
    first, second, places = _pairs_of_components(side)
    rows = np.zeros((2, len(places), side.heads, side.head_dim))
    rows[0, places, :, first], rows[0, places, :, second] = stored[0], -stored[1]
    rows[1, places, :, first], rows[1, places, :, second] = stored[1], stored[0]
    return rows.reshape(2 * len(places), -1)


def _pairs_of_components(side: FactoredHeads) -> tuple[Array, Array, Array]:
    """Return the two channels of each complex component, and the components' places."""
    assert side.pairs is not None and side.rotary_components is not None
    first, second = (np.repeat(channels, side.rotary_components) for channels in side.pairs)
    return first, second, np.arange(len(first))


def _low_rank_encoder(side: FactoredHeads) -> Array:
    return side.projection[:, :-1]


def _from_low_rank_encoder(side: FactoredHeads, stored: Array) -> Array:
    return stored


ENCODERS: dict[str, tuple[Callable[[FactoredHeads], Array], Callable[[FactoredHeads, Array], Array]]] = {
    ENCODED_REAL.name: (_real_encoder, _from_real_encoder),
    ENCODED_COMPLEX.name: (_complex_encoder, _from_complex_encoder),
    ENCODED_LOW_RANK.name: (_low_rank_encoder, _from_low_rank_encoder),
}
"""For each form with an encoder: what is stored of its projection (width, H * d + 1), and the projection (width, H * d)
of what is stored."""
