"""What a composition makes of one side (keys or values) of one layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Composed:
    """Component projections and the composition that rebuilds the heads from them. All tensors are float64.

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
    projection: torch.Tensor
    weight: torch.Tensor | None = None
    rotary_components: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    latent: torch.Tensor | None = None
    groups: int = 1

    @property
    def components(self) -> int | float:
        """Component heads: cached width over head_dim."""
        whole, rest = divmod(self.projection.shape[0], self.head_dim)
        return whole if not rest else self.projection.shape[0] / self.head_dim

    def expansion(self) -> torch.Tensor:
        """The linear map from components to heads, (H * d, width): every composition is one.

        For keys it commutes with RoPE unless the kind is ``latent``.
        """
        width, d, weight = self.projection.shape[0], self.head_dim, self.weight
        if self.kind in ("none", "pool"):
            components = width // d
            own = torch.eye(components, dtype=torch.float64).repeat_interleave(self.heads // components, dim=0)
            return torch.kron(own, torch.eye(d, dtype=torch.float64))
        assert weight is not None
        if self.kind in ("latent", "joint"):
            return weight
        if self.kind == "frequency":
            return self._frequency_expansion(weight)
        same = torch.eye(d, dtype=torch.float64)
        return torch.einsum("ch,ij->hicj", weight, same).reshape(self.heads * d, width)

    def _frequency_expansion(self, weight: torch.Tensor) -> torch.Tensor:
        assert self.pairs is not None and self.rotary_components is not None
        first, second = self.pairs
        lanes = weight.shape[1]
        expansion = torch.zeros(self.heads, self.head_dim, 2 * lanes, dtype=torch.float64)
        lane = 0
        for pair, count in enumerate(self.rotary_components):
            for _ in range(count):
                real, imaginary = weight[0, lane], weight[1, lane]  # (H,)
                expansion[:, first[pair], lane] = real
                expansion[:, first[pair], lanes + lane] = -imaginary
                expansion[:, second[pair], lane] = imaginary
                expansion[:, second[pair], lanes + lane] = real
                lane += 1
        return expansion.flatten(0, 1)

    def each_head(self) -> Iterator[torch.Tensor]:
        """The heads as the queries see them, one after another, (d, D + 1) each."""
        if self.kind in ("frequency", "latent", "joint"):
            rows = self.projection if self.latent is None else self.latent
            for own in self.expansion().unflatten(0, (self.heads, self.head_dim)):
                yield own @ rows
            return
        if self.weight is not None:
            yield from self.composed_heads()
            return
        components = self.projection.unflatten(0, (-1, self.head_dim))
        for head in range(self.heads):
            yield components[head * components.shape[0] // self.heads]

    def composed_heads(self) -> torch.Tensor:
        """The heads as the queries see them, (H, d, D + 1); where all are cached, the projection itself."""
        if self.kind == "none":
            return self.projection.unflatten(0, (self.heads, self.head_dim))
        if self.kind in ("head", "prune", "share"):
            assert self.weight is not None
            components = self.projection.unflatten(0, (-1, self.head_dim))
            return (self.weight.T @ components.flatten(1)).unflatten(1, components.shape[1:])
        heads = self.projection.new_empty(self.heads, self.head_dim, self.projection.shape[1])
        for head, own in zip(heads, self.each_head(), strict=True):
            head.copy_(own)
        return heads
