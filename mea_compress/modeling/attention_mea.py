"""Multi-head Explicit Attention (MEA, arXiv 2601.19611): the compositions and the attention that reads through them.

A layer projects its input to component heads, caches those, and composes from them the key/value heads that the
queries see. RoPE is linear and the same for all heads, so components are cached after RoPE and composed afterwards.
This file needs nothing but torch, and transformers only where a model is initialised or run as a whole; it is copied
into every checkpoint that uses it.

Every form that has a weight (see section_mea.py) is read by one class of `MODULES`; components of the other forms are
heads already.

Shapes: B batch, T tokens, D hidden size, d head_dim, Hq query heads, H key/value heads, C component heads, P rotary
pairs, N complex components (the sum over a layer's rotary pairs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .decode_mea import (
    TILE,
    absorb_is_faster,
    add_mask,
    fused,
    key_scores,
    may_fuse,
    readable_mask,
    softmax,
    weighted_values,
)
from .section_mea import (
    COMPLEX,
    ENCODED_COMPLEX,
    ENCODED_LOW_RANK,
    ENCODED_REAL,
    FORMS,
    KEPT,
    LOW_RANK,
    OWN_FORMS,
    POSITION_DIGITS,
    REAL,
    SELECTED,
    SHARED_LATENT,
    Form,
    cached_width,
    rotary_pairs,
    side_form,
)

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_MISSING_CACHE = (
    "the new tokens continue a sequence and no cache holds what came before: hand the cache of the earlier tokens "
    "over, or run the whole sequence; if this came from generate, this release of transformers passes its cache in a "
    "way that this code does not know"
)
_MISSING_POSITIONS = (
    "keys that are cached before RoPE need the positions of their tokens: this release of transformers hands none over "
    "as position_ids, so run one of those that this code was tested with"
)
_QUANTIZED_CACHE = (
    "a quantised cache would round the positions of its tokens, beside which latent keys are kept: use another cache, "
    "or compress to keys that are cached after RoPE, such as frequency"
)
Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of tokens, each (B or 1, T, rotary_dim)."""


def rotate_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on heads: x (B, T, heads, d); cos, sin (B, T, rotary_dim), the two halves of which are the same."""
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]
    return torch.cat((rotated, rest), dim=-1)


class HeadRMSNorm(nn.Module):
    """RMSNorm over head_dim, with one weight for all heads."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """1/rms of x (..., d) in float32 or wider: (..., 1)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor, operation: str = "norm") -> torch.Tensor:
        """Return x (..., d) normalised, or its `scale`, or multiplied by the weight (`weigh`) or divided (`unweigh`).

        All are asked for here, as in `Composition`.
        """
        if operation == "scale":
            return self.scale(x)
        if operation != "norm":
            return x * self.weight if operation == "weigh" else x / self.weight
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * self.scale(x)).to(x.dtype)


@dataclass(frozen=True)
class SideSizes:
    """Sizes of one side (keys or values) of a layer.

    Attributes:
        width: Numbers a token that the weight reads: what the side caches, or both sides where they share a latent.
        heads: H.
        head_dim: d.
        rotary_dim: Channels of a head that RoPE rotates.
        rotary_components: Complex components of each rotary pair; empty where pairs have none of their own.
        interleaved: Whether RoPE rotates neighbouring channels together.
    """

    width: int
    heads: int
    head_dim: int
    rotary_dim: int
    rotary_components: tuple[int, ...] = ()
    interleaved: bool = False


class Composition(nn.Module):
    """How one side of a layer is read from its components; `MODULES` has a subclass for every form with a weight.

    Args:
        sizes: Of the side.
        shape: Of the weight.
        encoder_shape: Of the weight that makes components of heads; None where the projection makes them.
    """

    def __init__(self, sizes: SideSizes, shape: tuple[int, ...], encoder_shape: tuple[int, ...] | None = None):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(shape))
        if encoder_shape is not None:
            self.encoder = nn.Parameter(torch.empty(encoder_shape))

    def reset(self) -> None:
        """Set the weight at which training from scratch begins, and refill what no checkpoint stores."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, operation: str = "rebuild", *arguments: Any) -> torch.Tensor:
        """Do one of the operations below.

        All are asked for here, because what wraps a module (an adapter of peft's, accelerate's offloading) knows of no
        other way in.
        """
        return getattr(self, operation)(x, *arguments)

    def rebuild(self, components: torch.Tensor) -> torch.Tensor:
        """Rebuild the heads: (B, T, width) -> (B, T, H, d)."""
        raise NotImplementedError

    def encode(self, heads: torch.Tensor) -> torch.Tensor:
        """Make components of final heads, where the form has an encoder: (B, H, T, d) -> (B, T, width)."""
        raise NotImplementedError

    def rotate(
        self, components: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor | None
    ) -> torch.Tensor:
        """Return components (B, T, width) after RoPE, their channels multiplied by `norm` (d,) before.

        Only forms that commute with RoPE have it; those that rebuild weighted keys are not handed a `norm`.
        """
        raise NotImplementedError

    def absorb(self, queries: torch.Tensor) -> torch.Tensor:
        """Widen queries of heads to queries of components: (B, H, rows, d) -> (B, H, rows, width)."""
        raise NotImplementedError

    def contract(self, outputs: torch.Tensor) -> torch.Tensor:
        """Turn weighted sums of components into those of heads: (B, H, rows, width) -> (B, H, rows, d)."""
        raise NotImplementedError


class HeadComposition(Composition):
    """Head-level linear composition: head h = sum over c of weight[c, h] * component c (weight: C x H)."""

    def reset(self) -> None:
        """Component c is head c, and the further heads reuse them in turn."""
        from transformers import initialization as init

        components, heads = self.weight.shape
        start = torch.zeros(components, heads)
        start[torch.arange(heads) % components, torch.arange(heads)] = 1.0
        init.copy_(self.weight, start)
        if hasattr(self, "encoder"):
            init.copy_(self.encoder, torch.eye(components, heads))

    def encode(self, heads: torch.Tensor) -> torch.Tensor:
        """(B, H, T, d) -> (B, T, C * d)."""
        return torch.einsum("bhtd,ch->btcd", heads, self.encoder).flatten(-2)

    def rebuild(self, components: torch.Tensor) -> torch.Tensor:
        """(B, T, C * d) -> (B, T, H, d)."""
        return self.weight.mT @ components.unflatten(-1, (self.weight.shape[0], -1))

    def rotate(
        self, components: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor | None
    ) -> torch.Tensor:
        """RoPE on components (B, T, C * d), each of which is a head."""
        heads = components.unflatten(-1, (-1, self.sizes.head_dim))
        return rotate_heads(heads if norm is None else norm * heads, cos, sin).flatten(-2)

    def absorb(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries of heads as queries of components: (B, H, rows, d) -> (B, H, rows, C * d)."""
        return torch.einsum("bhrd,ch->bhrcd", queries, self.weight.to(queries.dtype)).flatten(-2)

    def contract(self, outputs: torch.Tensor) -> torch.Tensor:
        """Weighted sums of components as those of heads: (B, H, rows, C * d) -> (B, H, rows, d)."""
        outputs = outputs.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("bhrcd,ch->bhrd", outputs, self.weight.to(outputs.dtype))


class FrequencyComposition(Composition):
    """Complex composition for every rotary pair: K[h, p] = sum over components c of pair p of w[c, h] * component c.

    A complex factor commutes with RoPE, so complex components are cached after RoPE like component heads. They are
    sorted by pair; a vector of them holds all real parts, then all imaginary parts. The weight is (2, N, H): real,
    imaginary.
    """

    def __init__(self, sizes: SideSizes, shape: tuple[int, ...], encoder_shape: tuple[int, ...] | None = None):
        super().__init__(sizes, shape, encoder_shape)
        self.rotary_components = list(sizes.rotary_components)
        self.first, self.second = rotary_pairs(sizes.head_dim, sizes.rotary_dim, sizes.interleaved)
        pair, slot = self._tables()
        self.pair_of_component = nn.Buffer(pair, persistent=False)  # (N,)
        self.slot_of_component = nn.Buffer(slot, persistent=False)  # (N,): pair * most + position within the pair
        order = torch.argsort(torch.tensor(self.first + self.second, device="cpu"))
        self.channel_order = nn.Buffer(
            order.to(pair.device), persistent=False
        )  # (d,): from (first, second) halves to channels
        self.channels_of_component = nn.Buffer(self._channels(pair), persistent=False)  # (2, N)

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        most = max(self.rotary_components)
        pair = [p for p, count in enumerate(self.rotary_components) for _ in range(count)]
        slot = [p * most + i for p, count in enumerate(self.rotary_components) for i in range(count)]
        return torch.tensor(pair), torch.tensor(slot)

    def _channels(self, pair: torch.Tensor) -> torch.Tensor:
        """The channels of a head that hold the real and the imaginary part of every component's pair."""
        return torch.tensor([self.first, self.second]).to(pair.device)[:, pair]

    def reset(self) -> None:
        """Real composition, a head after another; also refills the tables, which no checkpoint stores."""
        from transformers import initialization as init

        pair, slot = self._tables()
        init.copy_(self.channels_of_component, self._channels(pair))
        init.copy_(self.pair_of_component, pair)
        init.copy_(self.slot_of_component, slot)
        init.copy_(self.channel_order, torch.argsort(torch.tensor(self.first + self.second)))
        start = torch.zeros(self.weight.shape)
        most, heads = max(self.rotary_components), self.weight.shape[-1]
        for head in range(heads):
            start[0, slot % most == head % most, head] = 1.0
        init.copy_(self.weight, start)
        if hasattr(self, "encoder"):
            init.copy_(self.encoder, start / start.sum(-1, keepdim=True).clamp(min=1))

    def encode(self, heads: torch.Tensor) -> torch.Tensor:
        """(B, H, T, d) -> (B, T, 2N), real parts before imaginary ones."""
        real, imaginary = heads[..., self.channels_of_component].unbind(-2)  # (B, H, T, N)
        weight_real, weight_imaginary = self.encoder.mT[:, :, None]  # (H, 1, N)
        return torch.cat(
            (
                (real * weight_real - imaginary * weight_imaginary).sum(1),
                (imaginary * weight_real + real * weight_imaginary).sum(1),
            ),
            dim=-1,
        )

    def rotate(
        self, components: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor | None
    ) -> torch.Tensor:
        """RoPE on components (B, T, 2N), each at its pair's frequency; pairs that it leaves alone stay as they are."""
        half = cos.shape[-1] // 2
        rotates = (self.pair_of_component < half).to(cos.dtype)
        index = self.pair_of_component.clamp(max=half - 1)
        cos = cos[..., index] * rotates + (1 - rotates)  # (B, T, N)
        sin = sin[..., index] * rotates
        real, imaginary = components.chunk(2, dim=-1)
        return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)

    def rebuild(self, components: torch.Tensor) -> torch.Tensor:
        """(B, T, 2N) -> (B, T, H, d)."""
        pairs, most, heads = len(self.rotary_components), max(self.rotary_components), self.weight.shape[-1]
        shape = components.shape[:-1]
        # Components and weights laid out as (pair, position), so that every pair is one small matrix product.
        padded = components.new_zeros(*shape, 2, pairs * most).index_copy(
            -1, self.slot_of_component, components.unflatten(-1, (2, -1))
        )
        real, imaginary = padded.unflatten(-1, (pairs, most)).unbind(-3)  # (B, T, P, most)
        weight = self.weight.new_zeros(2, pairs * most, heads).index_copy(1, self.slot_of_component, self.weight)
        weight_real, weight_imaginary = weight.view(2, pairs, most, heads).unbind(0)
        head_real = torch.einsum("btpc,pch->bthp", real, weight_real) - torch.einsum(
            "btpc,pch->bthp", imaginary, weight_imaginary
        )
        head_imaginary = torch.einsum("btpc,pch->bthp", imaginary, weight_real) + torch.einsum(
            "btpc,pch->bthp", real, weight_imaginary
        )
        return torch.cat((head_real, head_imaginary), dim=-1)[..., self.channel_order]

    def absorb(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries of heads as queries of components: (B, H, rows, d) -> (B, H, rows, 2N)."""
        real, imaginary = queries[..., self.channels_of_component].unbind(-2)  # (B, H, rows, N)
        weight_real, weight_imaginary = self.weight.to(queries.dtype).mT[:, :, None]  # (H, 1, N)
        return torch.cat(
            (
                real * weight_real + imaginary * weight_imaginary,
                imaginary * weight_real - real * weight_imaginary,
            ),
            dim=-1,
        )


class LatentComposition(Composition):
    """Low rank over all heads at once: head h = weight[h] @ latent (weight: H * d x m)."""

    def reset(self) -> None:
        """The latent is the first heads, and the further heads reuse them in turn."""
        from transformers import initialization as init

        start = torch.eye(self.weight.shape[1]).repeat(-(-self.weight.shape[0] // self.weight.shape[1]), 1)
        init.copy_(self.weight, start[: self.weight.shape[0]])
        if hasattr(self, "encoder"):
            init.copy_(self.encoder, torch.eye(*self.encoder.shape))

    def encode(self, heads: torch.Tensor) -> torch.Tensor:
        """(B, H, T, d) -> (B, T, m)."""
        return nn.functional.linear(heads.transpose(1, 2).flatten(2), self.encoder)

    def rebuild(self, components: torch.Tensor) -> torch.Tensor:
        """(B, T, m) -> (B, T, H, d)."""
        return nn.functional.linear(components, self.weight).unflatten(-1, (self.sizes.heads, -1))

    def absorb(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries of heads as queries of latents: (B, H, rows, d) -> (B, H, rows, m); for keys cached after RoPE."""
        weight = self.weight.to(queries.dtype).unflatten(0, (self.sizes.heads, -1))
        return torch.einsum("bhrd,hdm->bhrm", queries, weight)

    def contract(self, outputs: torch.Tensor) -> torch.Tensor:
        """Weighted sums of latents as those of heads: (B, H, rows, m) -> (B, H, rows, d)."""
        weight = self.weight.to(outputs.dtype).unflatten(0, (self.sizes.heads, -1))
        return torch.einsum("bhrm,hdm->bhrd", outputs, weight)  # a product would copy the weight for every sequence


MODULES: dict[str, type[Composition]] = {
    **dict.fromkeys((REAL.name, KEPT.name, SELECTED.name, ENCODED_REAL.name), HeadComposition),
    **dict.fromkeys((COMPLEX.name, ENCODED_COMPLEX.name), FrequencyComposition),
    **dict.fromkeys((LOW_RANK.name, SHARED_LATENT.name, ENCODED_LOW_RANK.name), LatentComposition),
}
"""The class that reads each form with a weight."""


def register_form(form: Form, module: type[Composition]) -> None:
    """Make a form known, and the class that reads it; a file that brings one calls this when it is imported.

    Raises:
        ValueError: The name is that of a form of this file.
    """
    if form.name in OWN_FORMS:
        raise ValueError(f"the name {form.name} is taken by another form; choose another name")
    FORMS[form.name], MODULES[form.name] = form, module


def write_position(position_ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Write positions (B or 1, T) as digits to the base 256, which every float type holds exactly.

    Args:
        position_ids: Below 256 ** POSITION_DIGITS.
        like: (B, T, ...), of the dtype to write in.

    Returns:
        (B, T, POSITION_DIGITS).
    """
    digits = torch.stack([(position_ids >> 8 * place) & 255 for place in range(POSITION_DIGITS)], dim=-1)
    return digits.to(like).expand(like.shape[0], -1, -1)


def read_position(digits: torch.Tensor) -> torch.Tensor:
    """Return the positions (B, T), float32, that `write_position` has written; 0 where a cache is empty."""
    wide = digits.to(torch.float32)
    return sum(wide[..., place] * 256.0**place for place in range(POSITION_DIGITS))  # type: ignore[return-value]


def take_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Cache | None, dict[str, Any]]:
    """Find the cache among the arguments of an attention block by its type, and return the keywords without it.

    Transformers has renamed this argument (``past_key_value``, ``past_key_values``, ``cache``); a name would miss the
    next one without a word.

    Raises:
        ValueError: The cache is of a kind that keeps tokens in another way, such as that of continuous batching.
    """
    from transformers.cache_utils import Cache

    cache = None
    rest = {}
    for name, value in (*((None, value) for value in args), *kwargs.items()):
        if isinstance(value, Cache):
            cache = value
        elif type(value).__name__.endswith("Cache"):
            raise ValueError(
                f"components cannot be kept in a {type(value).__name__} (continuous batching hands this one over): "
                "use generate with a Cache of transformers"
            )
        elif name is not None:
            rest[name] = value
    return cache, rest


def refuse_missing_cache(sin: torch.Tensor) -> None:
    """Raise where the positions of new tokens say that others came before them, which no cache holds.

    Whatever a release of transformers calls positions, RoPE has had them: the sine of every pair is 0 at position 0,
    and a sequence that starts elsewhere is the continuation of one.

    Args:
        sin: (B, T, rotary_dim), of the new tokens.

    Raises:
        ValueError: A sequence has no token at position 0.
    """
    if sin.is_meta or torch.jit.is_tracing():
        return
    continued = sin.ne(0).any(-1).all(-1).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~continued, _MISSING_CACHE)
    elif continued:
        raise ValueError(_MISSING_CACHE)


class MeaAttention(nn.Module):
    """Explicit attention over reconstructed heads (arXiv 2601.19611), grouped queries, optional head norm and QK-norm.

    With QK-norm the cache holds, beside the components of the weighted keys, 1/rms of every reconstructed head:
    the norm divides by one number a token and head, so it commutes with composition and RoPE.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        section = config.mea
        spec, bias = section["layers"][layer_idx], section["bias"]
        self.config = config
        self.layer_idx = layer_idx
        self.query_heads = config.num_attention_heads
        self.heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        self.rotary_dim = int(self.head_dim * rope.get("partial_rotary_factor", 1.0))
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.layer_type = config.layer_types[layer_idx] if getattr(config, "layer_types", None) else None
        window = getattr(config, "sliding_window", None)
        self.sliding_window = window if self.layer_type in (None, "sliding_attention") else None
        self.key_form, self.value_form = side_form(spec, "key"), side_form(spec, "value")
        # Pooled keys and values are plain grouped-query attention, with fewer heads than the configuration names.
        pooled = self.key_form.repeats and self.value_form.repeats
        self.plain_heads = spec["key_components"] if pooled else self.heads
        self.num_key_value_groups = self.query_heads // self.plain_heads
        self.key_width = cached_width(spec["key_components"], self.head_dim)
        self.value_width = cached_width(spec["value_components"], self.head_dim)

        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.query_heads * self.head_dim, bias=bias["query"])
        self.k_proj = nn.Linear(hidden, self.key_width, bias=bias["key"])
        self.v_proj = nn.Linear(hidden, self.value_width, bias=bias["value"])
        self.o_proj = nn.Linear(self.query_heads * self.head_dim, hidden, bias=bias["output"])
        if section["qk_norm"]:
            self.q_norm = HeadRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = HeadRMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = section["qk_norm"]
        self.caches_norm_scalars = self.qk_norm and self.key_form.caches_norm_scalars
        if section["head_norm"]:
            self.head_norm = HeadRMSNorm(self.head_dim, config.rms_norm_eps)
        self.has_head_norm = section["head_norm"]
        self.key_composition = self._composition("key", spec)
        self.value_composition = self._composition("value", spec)
        # Static caches want as many heads of keys as of values: where these differ, plain heads too are cached flat.
        plain = self.key_composition is None and self.value_composition is None
        self.caches_heads = plain and self.key_width == self.value_width

    def _composition(self, side: str, spec: dict[str, Any]) -> Any:
        """The module that reads one side, or None where its components are heads already."""
        form, width = getattr(self, f"{side}_form"), getattr(self, f"{side}_width")
        both = self.key_width + self.value_width
        shape = form.shape(width, both, self.heads, self.head_dim)
        if shape is None:
            return None
        counts = tuple(spec["rotary_components"]) if form.per_pair else ()
        sizes = SideSizes(both if form.joint else width, self.heads, self.head_dim, self.rotary_dim, counts)
        return MODULES[form.name](sizes, shape)

    def _update(
        self,
        cache: Cache,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new tokens to a cache, and return all that it holds; see `project`."""
        if not self.key_form.commutes_with_rope:
            if position_ids is None:
                raise ValueError(_MISSING_POSITIONS)
            if any("Quantized" in type(layer).__name__ for layer in cache.layers):
                raise ValueError(_QUANTIZED_CACHE)
        return cache.update(*self.project(hidden_states, cos, sin, position_ids), self.layer_idx)

    def _expand(self, cached: torch.Tensor, composition: Composition | None) -> torch.Tensor:
        """What is cached (B, groups, T, width) as heads (B, heads, T, d)."""
        if composition is not None:
            return composition(cached[:, 0]).transpose(1, 2)
        plain = self._plain_heads(cached)
        return plain.repeat_interleave(self.plain_heads // plain.shape[1], dim=1)

    def _plain_heads(self, cached: torch.Tensor) -> torch.Tensor:
        """A side without a composition, as heads (B, groups, T, d)."""
        return cached if self.caches_heads else cached[:, 0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _flat(self, x: torch.Tensor, composition: Composition | None) -> torch.Tensor:
        """Projected components (B, T, width) as they are cached: one wide head, or plain heads (B, heads, T, d)."""
        if composition is not None:
            return x[:, None]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_to_cache(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        components = self.k_proj(hidden_states)  # (B, T, width)
        composition, form = self.key_composition, self.key_form
        if composition is None:
            heads = components.unflatten(-1, (-1, self.head_dim))
            return rotate_heads(self.k_norm(heads) if self.qk_norm else heads, cos, sin).transpose(1, 2)
        if not form.commutes_with_rope:
            return components[:, None]
        weighs = self.caches_norm_scalars and not form.weighted_keys
        norm = self.k_norm(components.new_ones(self.head_dim), "weigh") if weighs else None
        rotated = composition(components, "rotate", cos, sin, norm)
        if self.caches_norm_scalars:
            heads = composition(components)
            scale = self.k_norm(self.k_norm(heads, "unweigh") if form.weighted_keys else heads, "scale")  # (B, T, H, 1)
            rotated = torch.cat((rotated, scale[..., 0].to(rotated.dtype)), dim=-1)
        return rotated[:, None]

    def _expanded_keys(self, cached: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The keys that the queries see (B, heads, T, d), rotated, from what is cached."""
        if not self.key_form.commutes_with_rope:
            return self._rebuilt_keys(cached[:, 0], *rotation)
        if not self.caches_norm_scalars:
            return self._expand(cached, self.key_composition)
        components, scale = cached[..., : -self.heads], cached[..., -self.heads :]
        return self._expand(components, self.key_composition) * scale[:, 0].transpose(1, 2)[..., None]

    def project(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds of (B, T, D): keys and values, each (B, 1, T, width), or both (B, heads, T, d).

        Keys that are cached before RoPE have their positions beside them where `position_ids` (B or 1, T) are given.
        """
        keys = self._keys_to_cache(hidden_states, cos, sin)
        values = self._flat(self.v_proj(hidden_states), self.value_composition)
        if self.caches_heads:
            return keys, values
        keys, values = keys.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2)
        if position_ids is not None and not self.key_form.commutes_with_rope:
            keys = torch.cat((keys, write_position(position_ids, keys)), dim=-1)
        return keys[:, None], values[:, None]

    def expand(self, keys: torch.Tensor, values: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (rotated) and values that the queries see, each (B, heads, T, d), from what is cached.

        Args:
            keys: As `project` returns them, with or without positions.
            values: As `project` returns them.
            rotation: cos and sin of every cached token.
        """
        if not self.key_form.commutes_with_rope:
            keys = keys[..., : self.key_width]
        if self.key_form.joint:  # both sides read the whole latent
            keys = values = torch.cat((keys, values), dim=-1)
        return self._expanded_keys(keys, rotation), self._expand(values, self.value_composition)

    def _rebuilt_keys(self, latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Latent keys (B, T, m) as rotated heads (B, H, T, d)."""
        keys = self.key_composition(latent)  # (B, T, H, d)
        if self.qk_norm:
            keys = self.k_norm(keys)
        return rotate_heads(keys, cos.to(keys.dtype), sin.to(keys.dtype)).transpose(1, 2)

    def _cached_rotation(self, keys: torch.Tensor) -> Rotation:
        """Rotation by the positions beside cached keys (B, 1, T, width), at the model's frequencies of this step.

        The rotary module is not called: where its frequencies depend on the length, it would take that from the
        positions that it is given here, and keep it.
        """
        positions = read_position(keys[:, 0, :, self.key_width :])
        rotary: Any = self.rotary
        angles = (positions[..., None] * rotary.inv_freq.to(positions)).repeat(1, 1, 2)
        scaling = rotary.attention_scaling
        return (angles.cos() * scaling).to(keys.dtype), (angles.sin() * scaling).to(keys.dtype)

    def _attends_as_sdpa(self) -> bool:
        """Whether the configured attention is transformers' own: what others put in its place may do more (kvpress)."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock = self.config._attn_implementation == "sdpa"
        return stock and ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", sdpa_attention_forward) is sdpa_attention_forward

    def _absorbs(self, queries: torch.Tensor, attention_mask: Any) -> bool:
        """Whether to attend to the components themselves."""
        tokens = queries.shape[-2]
        stock = self._attends_as_sdpa() and not (self.training and self.attention_dropout)
        return stock and readable_mask(attention_mask, tokens) and self.may_absorb(tokens, queries.device.type)

    def may_absorb(self, tokens: int, device: str) -> bool:
        """Return whether `attend_to_components` serves so many new tokens, and is faster than rebuilding heads.

        ``config.mea["decode"]`` may say absorb or expand.

        Args:
            tokens: New tokens Q.
            device: Device type, as in ``torch.device.type``.
        """
        choice = self.config.mea.get("decode", "auto")
        if choice == "expand":
            return False
        key, value = self.key_form, self.value_form
        # Keys that are cached before RoPE are rebuilt tile by tile, whatever reads them.
        if not (key.plain or "key" in key.absorbs or not key.commutes_with_rope):
            return False
        if not (value.plain or "value" in value.absorbs):
            return False
        sides = (key, self.key_width / self.head_dim), (value, self.value_width / self.head_dim)
        return choice == "absorb" or absorb_is_faster(
            *sides, self.query_heads, self.heads, self.head_dim, tokens, device
        )

    def _logits(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        """Queries (B, Hq, Q, d), scaled, in float32 or wider, against what is cached: (B, Hq, Q, T)."""
        shape, composition = queries.shape, self.key_composition
        rows = queries.unflatten(1, (self.heads, -1)).flatten(2, 3)  # (B, H, rows, d)
        if composition is None:
            keys = self._plain_heads(keys)
            rows = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
            logits = key_scores(rows.to(keys.dtype), keys)
        elif not self.key_form.commutes_with_rope:
            logits = self._logits_of_latents(rows.to(keys.dtype), keys, values, rotation)
        else:
            rows = self._absorbed(queries).to(keys.dtype)
            logits = key_scores(rows, keys[..., : self.key_width]).unflatten(2, (self.heads, -1))[:, 0]
        if self.caches_norm_scalars:  # 1/rms of every head and token
            logits = logits.to(queries.dtype) * keys[:, 0, :, None, self.key_width :].permute(0, 3, 2, 1)
        return logits.reshape(*shape[:-1], -1)

    def _logits_of_latents(
        self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        """Rows (B, H, rows, d) against keys that are rebuilt, on a CPU tile by tile: (B, H, rows, T)."""
        whole = rows.device.type != "cpu" or torch.compiler.is_compiling()
        length = keys.shape[-2]
        logits = []
        for start in range(0, length, length if whole else TILE):
            tile = slice(start, length if whole else start + TILE)
            latent = keys[:, 0, tile]
            if self.key_form.joint:
                latent = torch.cat((latent, values[:, 0, tile]), dim=-1)
            cos, sin = (part[:, tile] for part in rotation)
            logits.append(rows @ self._rebuilt_keys(latent, cos, sin).mT)
        return torch.cat(logits, dim=-1)

    def _absorbed(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries (B, Hq, Q, d) as queries of components that are cached flat: (B, 1, Hq * Q, key width)."""
        rows = queries.unflatten(1, (self.heads, -1)).flatten(2, 3)
        return self.key_composition(rows, "absorb").flatten(1, 2)[:, None]

    def _fused(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any) -> torch.Tensor | None:
        """Sums of values (B, 1, Hq * Q, value width), by one kernel where components are flat."""
        composition = self.key_composition
        if composition is None or not self.key_form.commutes_with_rope or self.value_composition is None:
            return None
        cpu_kernel = self.config.mea.get("cpu_kernel", True)
        if not may_fuse(keys, values, queries, cpu_kernel=cpu_kernel):
            return None
        absorbed = self._absorbed(queries)
        if not may_fuse(keys, values, absorbed, cpu_kernel=cpu_kernel):  # its weight may be trained
            return None
        components = keys[..., : self.key_width]
        norms = keys[:, 0, :, self.key_width :] if self.caches_norm_scalars else None
        return fused(absorbed.to(keys.dtype), components, values, norms, mask, queries.shape[2])

    def attend_to_components(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotation: Rotation, mask: Any
    ) -> torch.Tensor:
        """Return the attention of queries (B, Hq, Q, d), rotated, to what is cached: (B, Q, Hq, d).

        Args:
            queries: Of new tokens.
            keys: As `project` returns them, without positions.
            values: As `project` returns them.
            rotation: cos and sin of every cached token, for keys that are cached before RoPE.
            mask: As `add_mask` takes it.
        """
        wide = torch.promote_types(queries.dtype, torch.float32)
        scaled = queries.to(wide) * self.scaling
        output = self._fused(scaled, keys, values, mask)  # (B, 1, rows, W)
        if output is None:
            logits = self._logits(scaled, keys, values, rotation)
            weights = softmax(add_mask(logits, mask)).to(values.dtype)  # (B, Hq, Q, T)
            if self.value_composition is None:
                values = self._plain_heads(values)
            rows = weights.unflatten(1, (values.shape[1], -1)).flatten(2, 3)
            output = weighted_values(rows, values)  # (B, N, rows, W)
            if self.value_form.joint:
                output = torch.cat((weighted_values(rows, keys), output), dim=-1)
        if self.value_composition is not None:
            output = output[:, 0].unflatten(1, (self.heads, -1)).to(wide)
            output = self.value_composition(output, "contract").to(queries.dtype)
        return output.reshape(*queries.shape).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from every new token to all cached ones.

        Args:
            hidden_states: (B, T, D), the layer's normed input.
            position_embeddings: cos and sin, each (B, T, rotary_dim).
            attention_mask: As the configured attention implementation wants it.
            *args: May hold the cache of components.
            **kwargs: May hold the cache of components, under any name; the rest is handed to the attention
                implementation.

        Returns:
            The block's output (B, T, D) and the attention weights where the implementation returns them.

        Raises:
            ValueError: Tokens came before the new ones and no cache holds them, or the cache is of an unknown kind.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        cos, sin = position_embeddings
        cache, kwargs = take_cache(args, kwargs)
        # An engine that calls this as remote code keeps the heads that are handed to its attention, by its own pages.
        in_engine = self.config._attn_implementation == "vllm"
        if cache is None and not self.training and not in_engine:
            refuse_missing_cache(sin)
        queries = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, T, Hq, d)
        if self.qk_norm:
            queries = self.q_norm(queries)
        cos, sin = cos.to(queries.dtype), sin.to(queries.dtype)  # under autocast the stream is wider than products
        queries = rotate_heads(queries, cos, sin).transpose(1, 2)
        if cache is None:
            keys, values = self.project(hidden_states, cos, sin)
        else:
            keys, values = self._update(cache, hidden_states, cos, sin, kwargs.get("position_ids"))
            if not self.key_form.commutes_with_rope:
                cos, sin = self._cached_rotation(keys)
                keys = keys[..., : self.key_width]

        weights = None
        if self._absorbs(queries, attention_mask):
            output = self.attend_to_components(queries, keys, values, (cos, sin), attention_mask)
        else:
            keys, values = self.expand(keys, values, (cos, sin))
            if in_engine:  # its pages are made for as many heads as the configuration names
                keys, values = (side.repeat_interleave(self.heads // side.shape[1], dim=1) for side in (keys, values))
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = attend(
                self,
                queries,
                keys,
                values,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )  # (B, T, Hq, d), or flat from an engine
        output = output.reshape(*hidden_states.shape[:-1], self.query_heads, self.head_dim)
        if self.has_head_norm:
            output = self.head_norm(output)
        return self.o_proj(output.flatten(-2)), weights
