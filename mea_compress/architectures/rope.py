"""Rotary embeddings whose frequencies follow the length of a sequence, as configurations say it."""

from __future__ import annotations

from typing import Any

_LENGTH_INDEPENDENT = ("default", "linear", "llama3", "yarn", "proportional")


def length_dependent_rope(config: Any) -> str | None:
    """Return the RoPE type if its frequencies change with the length of the sequence, else None.

    Args:
        config: Of a model; some families have parameters of their own for each type of layer.

    Example:
        >>> from types import SimpleNamespace
        >>> length_dependent_rope(SimpleNamespace(rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
        'dynamic'
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for part in (parameters, *parameters.values()):
        kind = part.get("rope_type", "default") if isinstance(part, dict) else "default"
        same = kind == "longrope" and part["short_factor"] == part["long_factor"]
        if kind not in _LENGTH_INDEPENDENT and not same:
            return kind
    return None


__all__ = ["length_dependent_rope"]
