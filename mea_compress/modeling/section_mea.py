"""The ``mea`` section of a configuration: what each layer caches and how heads are composed from it.

It stands beside the settings of a stock family. This file is plain Python and is copied into every checkpoint that
uses it.

The section::

    {"format": 1,
     "head_norm": false,           RMSNorm over head_dim on every query head's attention output
     "qk_norm": false,             RMSNorm over head_dim on queries and on composed keys, before RoPE
     "bias": {"query": false, "key": false, "value": false, "output": false},
     "decode": "auto",             optional: absorb or expand decides how new tokens read a cache of components
     "cpu_kernel": true,           optional: false forbids that a compiler builds the kernel that reads it on a CPU
     "layers": [{"key_composition": "head", "key_components": 2,
                 "value_composition": "head", "value_components": 2}, ...]}

``key_components`` and ``value_components`` count component heads: the layer caches that many times ``head_dim``
numbers a token. Compositions: ``none`` (every head is cached), ``pool`` (a component is shared by the heads of one
group, as in grouped-query attention), ``head``, ``prune`` and ``share`` (a matrix of components x heads), ``frequency``
(complex, a matrix for each rotary pair; keys only), ``latent`` (a matrix of channels x rank) and ``joint`` (a latent of
which keys and values each cache a part and which both read whole). The last three may have part of a head as
components: their width is any number of channels. A layer with ``frequency`` keys also lists ``rotary_components``, the
number of complex components of each rotary pair.
"""

from typing import Any

CODE_VERSION = "0.2.0"
"""The release of mea-compress that this code is from."""
TESTED_TRANSFORMERS = ("5.16.1", "5.24.0")
"""The oldest and the newest release of transformers under which this code was tried."""
FORMAT = 1
KEY_COMPOSITIONS = ("none", "pool", "head", "prune", "share", "frequency", "latent", "joint")
DECODE = ("auto", "absorb", "expand")
VALUE_COMPOSITIONS = ("none", "pool", "head", "prune", "share", "latent", "joint")
# Compositions whose cached width is not tied to whole heads.
FRACTIONAL = ("frequency", "latent", "joint")


def cached_width(components: float, head_dim: int) -> int:
    """Numbers a token that `components` component heads take; part of a head is a whole number of channels."""
    return round(components * head_dim)


def rotary_pairs(head_dim: int, rotary_dim: int) -> tuple[list[int], list[int]]:
    """The two channels of every pair of a head: RoPE turns (p, p + rotary_dim/2); what it leaves is paired alike."""
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first = [*range(half), *range(rotary_dim, rotary_dim + rest)]
    second = [*range(half, rotary_dim), *range(rotary_dim + rest, head_dim)]
    return first, second


def complete_section(
    section: dict[str, Any] | None, config: Any, *, qk_norm: bool, bias: dict[str, bool]
) -> dict[str, Any]:
    """Fills in what a ``mea`` section leaves out and refuses what cannot be run.

    Args:
        section: The section as given; ``None`` for a native model with as many components as heads.
        config: The configuration that it belongs to (head counts and depth are read from it).
        qk_norm: Whether the family normalises queries and keys unless the section says otherwise.
        bias: Which projections of the family have a bias unless the section says otherwise.

    Raises:
        ValueError: The section is of another format or disagrees with the configuration.
    """
    section = dict(section or {})
    if section.setdefault("format", FORMAT) != FORMAT:
        raise ValueError(f"mea section has format {section['format']}, this code reads format {FORMAT}")
    section.setdefault("head_norm", False)
    section.setdefault("qk_norm", qk_norm)
    section["bias"] = {**bias, **section.get("bias", {})}
    if section.get("decode", "auto") not in DECODE:
        raise ValueError(f"mea section: decode is one of {', '.join(DECODE)}, not {section['decode']!r}")
    if not isinstance(section.get("cpu_kernel", True), bool):
        raise ValueError(f"mea section: cpu_kernel is true or false, not {section['cpu_kernel']!r}")
    heads, depth = config.num_key_value_heads, config.num_hidden_layers
    whole = {"key_composition": "head", "key_components": heads, "value_composition": "head", "value_components": heads}
    layers = section.setdefault("layers", [dict(whole) for _ in range(depth)])
    if len(layers) != depth:
        raise ValueError(f"mea section describes {len(layers)} layers, the model has {depth}")
    for index, layer in enumerate(layers):
        for side, known in (("key", KEY_COMPOSITIONS), ("value", VALUE_COMPOSITIONS)):
            composition, components = layer.get(f"{side}_composition"), layer.get(f"{side}_components")
            if composition not in known:
                raise ValueError(f"mea layer {index}: unknown {side}_composition {composition!r}")
            fractional = composition in FRACTIONAL
            numeric = isinstance(components, int | float) and not isinstance(components, bool)
            least = 1 / 1024 if fractional else 1
            if not numeric or not least <= components <= heads or (components % 1 and not fractional):
                raise ValueError(
                    f"mea layer {index}: {side}_components must lie between 1 and {heads}, not {components!r}"
                )
            if composition == "none" and components != heads:
                raise ValueError(f"mea layer {index}: composition none caches all {heads} heads, not {components}")
            if composition == "frequency":
                _check_rotary_components(index, layer.get("rotary_components"), components, config)
            groups = layer.get("groups", 1)
            if not isinstance(groups, int) or groups < 1 or heads % groups:
                raise ValueError(f"mea layer {index}: groups must divide {heads} heads, not {groups!r}")
            if composition == "pool" and heads % components:
                raise ValueError(f"mea layer {index}: {components} pooled components do not divide {heads} heads")
        if (layer["key_composition"] == "joint") != (layer["value_composition"] == "joint"):
            raise ValueError(f"mea layer {index}: joint keys and joint values read one latent and go together")
    return section


def _check_rotary_components(index: int, counts: Any, components: float, config: Any) -> None:
    """Every rotary pair has a whole number of complex components, and they fill the width that the layer caches."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs, lanes = head_dim // 2, cached_width(components, head_dim) // 2
    whole = isinstance(counts, list | tuple) and all(type(count) is int and count >= 0 for count in counts)
    if not whole or len(counts) != pairs or sum(counts) != lanes:
        raise ValueError(
            f"mea layer {index}: rotary_components must be {pairs} whole numbers that add up to {lanes}, not {counts!r}"
        )
