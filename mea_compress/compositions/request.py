"""What a composition is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What a composition is asked for.

    Attributes:
        components: Component heads, C; the side caches C · head_dim numbers a token, which may be part
            of a head for `frequency`, `latent` and `joint`.
        fit: ``weights``, ``activations`` or ``aligned``.
        prune_by: How `prune` chooses the heads it keeps: ``pivot`` or ``contribution``.
        other: Component heads of the other side (`joint` divides what both have).
        emphasis: How much more an error of keys counts than one of values (`joint` alone).
        rotary_budget: How `frequency` deals its complex components out to rotary pairs: ``energy`` or ``uniform``.
    """

    components: float
    fit: str
    rotary_budget: str = "energy"
    prune_by: str = "pivot"
    other: float = 0
    emphasis: float = 3.0

    def width(self, head_dim: int) -> int:
        """Numbers that the side caches a token."""
        return round(self.components * head_dim)
