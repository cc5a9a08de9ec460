"""One layer's attention as heads, before and after its keys and values were factored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mea_compress.heads.composed import Array, FactoredHeads
from mea_compress.modeling.section_mea import rotary_pairs


@dataclass(frozen=True)
class AttentionHeads:
    """One layer's attention. All arrays are float64; a bias is the last column of the weight (zeros without one).

    Attributes:
        query: (Hq, d, D + 1).
        key: (H, d, D + 1), before the key norm.
        value: (H, d, D + 1).
        output: (Hq, D, d).
        key_norm: (d,) or None.
        head_norm: (d,) or None: weight of the RMSNorm on each query head's output.
        rotary_dim: Channels of a head that RoPE rotates.
        norm_eps: Epsilon of the norms.
        interleaved: Whether RoPE rotates neighbouring channels together.
        order: Which of the checkpoint's key/value heads each of them is, H; None where they stand as there.
    """

    query: Array
    key: Array
    value: Array
    output: Array
    key_norm: Array | None
    head_norm: Array | None
    rotary_dim: int
    norm_eps: float
    interleaved: bool = False
    order: tuple[int, ...] | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[0] // self.key.shape[0]

    @property
    def pairs(self) -> tuple[list[int], list[int]]:
        """The two channels of every rotary pair."""
        return rotary_pairs(self.key.shape[1], self.rotary_dim, self.interleaved)


@dataclass(frozen=True)
class ComposedLayer:
    """A layer after surgery: factored keys and values, and what else of its attention changed.

    Attributes:
        key: Components and composition of the keys.
        value: Components and composition of the values.
        query: (Hq, d, D + 1), or None where q_proj stays as it is.
        output: (Hq, D, d), or None where o_proj stays as it is.
        head_norm: (d,), or None where the head norm stays as it is.
        block: Where the layer's attention stays as it is and is composed at its cache: what its entry in the ``mea``
            section says of that. Component projections are encoders then, whose inputs are the heads.
        refitted: Weights of that block that were fitted again, by their names below it, as they are stored.
        order: Which of the checkpoint's key/value heads each of them is, H; None where they stand as there.
    """

    key: FactoredHeads
    value: FactoredHeads
    query: Array | None = None
    output: Array | None = None
    head_norm: Array | None = None
    block: Mapping[str, Any] | None = None
    refitted: Mapping[str, Array] = field(default_factory=dict)
    order: tuple[int, ...] | None = None
