"""What a composition is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What a composition is asked for.

    Attributes:
        components: Component heads, C; the side caches C · head_dim numbers a token.
        fit: ``weights``, ``activations`` or ``aligned``.
        rotary_budget: How `frequency` deals its complex components out to rotary pairs: ``energy`` or ``uniform``.
    """

    components: int
    fit: str
    rotary_budget: str = "energy"
