"""The ``mea`` section of a configuration: what each layer caches and how heads are rebuilt from it.

It stands beside the settings of a stock family. This file is plain Python and is copied into every checkpoint that
uses it.

The section::

    {"format": 1,
     "head_norm": false,           RMSNorm over head_dim on every query head's attention output
     "qk_norm": false,             RMSNorm over head_dim on queries and on rebuilt keys, before RoPE
     "bias": {"query": false, "key": false, "value": false, "output": false},
     "decode": "auto",             optional: absorb or expand decides how new tokens read a cache of components
     "cpu_kernel": true,           optional: false forbids that a compiler builds the kernel that reads it on a CPU
     "layers": [{"key_composition": "head", "key_components": 2,
                 "value_composition": "head", "value_components": 2}, ...]}

``key_components`` and ``value_components`` count component heads: the layer caches that many times ``head_dim``
numbers a token. A composition is the name of the method that fitted the side; the *form* says how the side is stored,
cached and read (see `Form`). `FORM_OF` knows the forms of format 1's compositions: ``none`` (every head is cached),
``pool`` (a component is shared by the heads of one group, as in grouped-query attention), ``head``, ``prune`` and
``share`` (a matrix of components x heads), ``frequency`` (complex, a matrix for each rotary pair; keys only),
``latent`` (a matrix of channels x rank) and ``joint`` (a latent of which keys and values each cache a part and which
both read whole). The last three may have part of a head as components: their width is any number of channels. Any
other composition names its form as well, in ``key_form`` or ``value_form``. A layer whose keys have a matrix for each
rotary pair also lists ``rotary_components``, the number of complex components of each pair.

A layer whose attention is the stock family's own, with components at its cache, names that ``block`` and says what the
block hands to a cache: ``heads``, ``head_dim``, ``value_dim``, ``rotary_dim`` and whether RoPE pairs are
``interleaved``. Its forms are encoded ones, in which a second matrix makes components of the heads. A layer that caches
no keys and values per head is null::

    {"block": "model.layers.3.self_attn", "heads": 4, "head_dim": 8, "value_dim": 8, "rotary_dim": 8,
     "interleaved": false, "key_composition": "frequency", "key_components": 2, "key_form": "encoded-complex",
     "rotary_components": [2, 2, 2, 2],
     "value_composition": "latent", "value_components": 2, "value_form": "encoded-low-rank"}
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

CODE_VERSION = "0.2.0"
"""The release of mea-compress that this code is from."""
TESTED_TRANSFORMERS = ("5.16.1", "5.24.0")
"""The oldest and the newest release of transformers under which this code was tried."""
FORMAT = 1
DECODE = ("auto", "absorb", "expand")
SIDES = ("key", "value")
POSITION_DIGITS = 3
"""Numbers that hold a token's position beside keys that are cached before RoPE: its digits to the base 256."""

WeightShape = Callable[[int, int, int, int], tuple[int, ...]]
"""Shape of a tensor from the side's cached width, that of both sides together, H and d."""


def _each_channel(head_dim: int) -> int:
    return head_dim


def _one(head_dim: int) -> int:
    return 1


def _two(head_dim: int) -> int:
    return 2


def _components_by_heads(width: int, both: int, heads: int, head_dim: int) -> tuple[int, ...]:
    return width // head_dim, heads


def _complex_by_heads(width: int, both: int, heads: int, head_dim: int) -> tuple[int, ...]:
    return 2, width // 2, heads


def _channels_by_rank(width: int, both: int, heads: int, head_dim: int) -> tuple[int, ...]:
    return heads * head_dim, width


def _rank_by_channels(width: int, both: int, heads: int, head_dim: int) -> tuple[int, ...]:
    return width, heads * head_dim


def _channels_by_shared_rank(width: int, both: int, heads: int, head_dim: int) -> tuple[int, ...]:
    return heads * head_dim, both


@dataclass(frozen=True)
class Form:
    """How one side (keys or values) of a layer is stored, cached and read.

    A form has a decoder, which rebuilds the heads from what is cached (``key_composition.weight``), and optionally an
    encoder, which makes what is cached from the heads; without one the encoder is folded into k_proj or v_proj.

    Attributes:
        name: As ``key_form`` and ``value_form`` call it.
        sides: Which sides can have it.
        step_channels: Channels that its cached width grows by; None where components are whole heads.
        weight_shape: Shape of the decoder's weight; None where components are heads already (a plain form).
        encoder_shape: Shape of the encoder's weight; None where it is folded into the projection.
        multiply_adds: Of rebuilding one channel of a head from one component, given d.
        identity: Whether every head is cached as it is.
        repeats: Whether a component stands for every head of its group as it is.
        scalar: Whether the weight is one real number for each component and head (HLC, arXiv 2601.19611).
        per_pair: Whether each rotary pair has components of its own, listed in ``rotary_components``.
        joint: Whether both sides read one latent, of which each caches a part.
        commutes_with_rope: Whether keys are cached after RoPE; otherwise they are rebuilt before it.
        weighted_keys: Whether it rebuilds keys that the key norm's weight has multiplied already.
        absorbs: Sides that are read without rebuilding heads: by wider queries (key), or by contracting sums (value).
        frozen: What layer-local refinement leaves as it is: ``proj``, ``composition`` or both.
    """

    name: str
    sides: tuple[str, ...] = SIDES
    step_channels: int | None = None
    weight_shape: WeightShape | None = None
    encoder_shape: WeightShape | None = None
    multiply_adds: Callable[[int], int] = _each_channel
    identity: bool = False
    repeats: bool = False
    scalar: bool = False
    per_pair: bool = False
    joint: bool = False
    commutes_with_rope: bool = True
    weighted_keys: bool = False
    absorbs: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether components are heads already, so that no weight rebuilds them."""
        return self.weight_shape is None

    @property
    def caches_norm_scalars(self) -> bool:
        """Whether 1/rms of every reconstructed key is cached beside the components under QK-norm.

        Keys that are cached after RoPE are normalised when they are read, unless an encoder makes components of keys
        that are normalised already.
        """
        return not self.plain and self.commutes_with_rope and self.encoder_shape is None

    def beside(self, heads: int, qk_norm: bool) -> int:
        """Return the numbers a token that are cached beside the components of keys.

        1/rms of every reconstructed key under QK-norm, or the digits of the position where keys are cached before
        RoPE: which tokens a cache holds, and where they stood, is not to be guessed.

        Args:
            heads: H.
            qk_norm: Whether keys are normalised.
        """
        if not self.commutes_with_rope:
            return POSITION_DIGITS
        return heads if qk_norm and self.caches_norm_scalars else 0

    @property
    def fractional(self) -> bool:
        """Whether part of a head can be cached."""
        return self.step_channels is not None

    def step(self, head_dim: int) -> Fraction:
        """Return the least share of a head that its width can grow by."""
        return Fraction(self.step_channels or head_dim, head_dim)

    def shape(self, width: int, both: int, heads: int, head_dim: int) -> tuple[int, ...] | None:
        """Return the shape of ``key_composition.weight`` or ``value_composition.weight``, None where there is none.

        Args:
            width: Numbers a token that the side caches.
            both: The same of keys and values together.
            heads: H.
            head_dim: d.
        """
        return None if self.weight_shape is None else self.weight_shape(width, both, heads, head_dim)


HEADS = Form("heads", identity=True)
POOLED = Form("pooled", repeats=True)
REAL = Form(
    "real",
    weight_shape=_components_by_heads,
    multiply_adds=_one,
    scalar=True,
    absorbs=SIDES,
)
# Real matrices whose components are heads of the original, bit for bit; the second has ones and zeros alone.
KEPT = replace(REAL, name="kept", frozen=("proj",))
SELECTED = replace(REAL, name="selected", frozen=("proj", "composition"))
COMPLEX = Form(
    "complex",
    sides=("key",),
    step_channels=2,
    weight_shape=_complex_by_heads,
    multiply_adds=_two,
    per_pair=True,
    weighted_keys=True,
    absorbs=("key",),
)
LOW_RANK = Form(
    "low-rank",
    step_channels=1,
    weight_shape=_channels_by_rank,
    commutes_with_rope=False,
    absorbs=("value",),
)
SHARED_LATENT = replace(
    LOW_RANK,
    name="shared-latent",
    weight_shape=_channels_by_shared_rank,
    joint=True,
)
# The same at the cache of an attention block that stays as it is: an encoder makes the components of final heads, so
# that keys are cached after whatever norm and RoPE the block has.
ENCODED_REAL = replace(REAL, name="encoded-real", encoder_shape=_components_by_heads)
ENCODED_COMPLEX = replace(COMPLEX, name="encoded-complex", encoder_shape=_complex_by_heads, weighted_keys=False)
ENCODED_LOW_RANK = replace(
    LOW_RANK, name="encoded-low-rank", encoder_shape=_rank_by_channels, commutes_with_rope=True, absorbs=SIDES
)
ENCODED = {REAL.name: ENCODED_REAL, COMPLEX.name: ENCODED_COMPLEX, LOW_RANK.name: ENCODED_LOW_RANK}
"""The encoded form of those that have one, by the name of the form whose encoder is folded into the projection."""
FORMS = {
    form.name: form
    for form in (HEADS, POOLED, REAL, KEPT, SELECTED, COMPLEX, LOW_RANK, SHARED_LATENT, *ENCODED.values())
}
"""Every form by its name; `register_form` of attention_mea.py adds one."""
OWN_FORMS = frozenset(FORMS)
"""The names of the forms that this file brings."""
FORM_OF = {
    "none": HEADS,
    "pool": POOLED,
    "head": REAL,
    "prune": KEPT,
    "share": SELECTED,
    "frequency": COMPLEX,
    "latent": LOW_RANK,
    "joint": SHARED_LATENT,
}
"""The forms of format 1's compositions, whose sections name none."""


def side_form(layer: Mapping[str, Any], side: str) -> Form:
    """Return the form of one side of a layer of the section.

    Args:
        layer: An entry of ``layers``.
        side: ``key`` or ``value``.

    Raises:
        ValueError: There is no such form for that side.
    """
    composition, name = layer.get(f"{side}_composition"), layer.get(f"{side}_form")
    form = None
    if isinstance(composition, str):
        form = FORM_OF.get(composition) if name is None else FORMS.get(name) if isinstance(name, str) else None
        if form is None and name is not None:
            raise ValueError(f"unknown {side}_form {name!r}; import the module that registers it")
    if form is None or side not in form.sides:
        raise ValueError(f"unknown {side}_composition {composition!r}")
    return form


def side_section(side: str, composition: str, components: float, form: Form) -> dict[str, Any]:
    """Return the entries of one side of a layer; the form is named where it is not the composition's of format 1."""
    entries = {f"{side}_composition": composition, f"{side}_components": components}
    return entries if FORM_OF.get(composition) == form else entries | {f"{side}_form": form.name}


def every_head(heads: int) -> dict[str, Any]:
    """Return the entry of a layer that caches every one of its H heads as it is."""
    entries: dict[str, Any] = {}
    for side in SIDES:
        entries |= side_section(side, "none", heads, HEADS)
    return entries


def cached_width(components: float, head_dim: int) -> int:
    """Return the numbers that `components` component heads take a token; part of a head is a whole number of them."""
    return round(components * head_dim)


def uniform_components(total: int, pairs: int) -> list[int]:
    """Return as many of `total` complex components for every rotary pair; what is left over goes to the fastest."""
    return [total // pairs + (pair < total % pairs) for pair in range(pairs)]


def rotary_pairs(head_dim: int, rotary_dim: int, interleaved: bool = False) -> tuple[list[int], list[int]]:
    """The two channels of every pair of a head: RoPE rotates (p, p + rotary_dim/2); what it leaves is paired alike.

    Args:
        head_dim: d.
        rotary_dim: Channels that RoPE rotates.
        interleaved: Whether it rotates (2p, 2p + 1) instead.
    """
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    if interleaved:
        return [*range(0, head_dim, 2)], [*range(1, head_dim, 2)]
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
    heads, depth = getattr(config, "num_key_value_heads", config.num_attention_heads), config.num_hidden_layers
    whole = {"key_composition": "head", "key_components": heads, "value_composition": "head", "value_components": heads}
    layers = section.setdefault("layers", [dict(whole) for _ in range(depth)])
    if len(layers) != depth:
        raise ValueError(f"mea section describes {len(layers)} layers, the model has {depth}")
    for index, layer in enumerate(layers):
        if layer is None and any(other and "block" in other for other in layers):
            continue  # it caches no keys and values per head
        if "block" in layer:
            _check_block(index, layer)
        forms = [_checked_form(index, layer, side, config) for side in SIDES]
        groups = layer.get("groups", 1)
        if not isinstance(groups, int) or groups < 1 or heads % groups:
            raise ValueError(f"mea layer {index}: groups must divide {heads} heads, not {groups!r}")
        if forms[0].joint != forms[1].joint:
            raise ValueError(f"mea layer {index}: joint keys and joint values read one latent and go together")
    return section


def _checked_form(index: int, layer: dict[str, Any], side: str, config: Any) -> Form:
    """Return the form of one side of a layer, which the layer's numbers fit."""
    try:
        form = side_form(layer, side)
    except ValueError as error:
        raise ValueError(f"mea layer {index}: {error}") from None
    components: Any = layer.get(f"{side}_components")
    heads = layer.get("heads") or config.num_key_value_heads
    if not form.plain and ("block" in layer) != (form.encoder_shape is not None):
        raise ValueError(f"mea layer {index}: {side}_form {form.name} does not go with the layer's attention")
    numeric = isinstance(components, int | float) and not isinstance(components, bool)
    least = 1 / 1024 if form.fractional else 1
    if not numeric or not least <= components <= heads or (components % 1 and not form.fractional):
        raise ValueError(f"mea layer {index}: {side}_components must lie between 1 and {heads}, not {components!r}")
    if form.identity and components != heads:
        composition = layer[f"{side}_composition"]
        raise ValueError(f"mea layer {index}: composition {composition} caches all {heads} heads, not {components}")
    if form.per_pair:
        head_dim = layer.get("head_dim") or getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        _check_rotary_components(index, layer.get("rotary_components"), components, head_dim)
    if form.repeats and heads % components:
        raise ValueError(f"mea layer {index}: {components} pooled components do not divide {heads} heads")
    return form


def _check_block(index: int, layer: dict[str, Any]) -> None:
    """Raise unless a layer says where its attention block is and what that hands to a cache."""
    block, sizes = layer["block"], [layer.get(name) for name in ("heads", "head_dim", "value_dim")]
    rotary_dim = layer.get("rotary_dim")
    whole = all(type(size) is int and 1 <= size <= 1 << 20 for size in sizes)
    if not isinstance(block, str) or not whole or not isinstance(layer.get("interleaved", False), bool):
        raise ValueError(f"mea layer {index}: block, heads, head_dim and value_dim do not say what its block caches")
    if type(rotary_dim) is not int or not 0 <= rotary_dim <= layer["head_dim"] or rotary_dim % 2:
        raise ValueError(f"mea layer {index}: RoPE cannot rotate {rotary_dim!r} of {layer['head_dim']} channels")


def _check_rotary_components(index: int, counts: Any, components: float, head_dim: int) -> None:
    """Every rotary pair has a whole number of complex components, and they fill the width that the layer caches."""
    pairs, total = head_dim // 2, cached_width(components, head_dim) // 2
    whole = isinstance(counts, list | tuple) and all(type(count) is int and count >= 0 for count in counts)
    if not whole or len(counts) != pairs or sum(counts) != total:
        raise ValueError(
            f"mea layer {index}: rotary_components must be {pairs} whole numbers that add up to {total}, not {counts!r}"
        )
