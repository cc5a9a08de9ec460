"""Components at the cache of attention blocks that stay as they are.

Every attention block of transformers hands its final keys and values (after bias, norm and RoPE, whatever it has of
them) to its cache and attends to what comes back. A block that is composed here gets a stand-in for the cache, which
makes components of the heads (``encode``), keeps those in the cache, and hands back the heads that are rebuilt of all
of them (``rebuild``). Nothing of the family's own attention has to be known.

The first forward shows whether a block hands what it got on to its attention function, untouched and to nobody else,
and whether that function is softmax attention with the scale, soft-capping, sinks and mask that it is told. Such a one
gets the components themselves from then on, and `attend` reads them: with queries that are widened once a step and sums
that are contracted behind it, where that is faster, and else rebuilt. Gates and norms behind attention are the block's.

This file needs nothing but torch and transformers and is copied into every checkpoint that uses it.

Shapes: B batch, T tokens, Q new tokens, Hq query heads, H key/value heads, d channels of a head.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable
from functools import cache as remember
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_mea import MODULES, Composition, SideSizes, take_cache
from .decode_mea import (
    absorb_is_faster,
    add_mask,
    fused,
    key_scores,
    may_fuse,
    readable_mask,
    softmax,
    weighted_values,
)
from .section_mea import Form, cached_width, side_form

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

# What attention functions are handed beside queries, keys, values and mask that changes nothing of what is computed
# here: the mask has the window in it, and positions are in the queries.
_WITHOUT_EFFECT = {
    "dropout",
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
}
_READ = {"scaling", "softcap", "s_aux"}
_TOUCHED = (
    "the attention block has changed the components that it got from its cache, as it did not before: set decode to "
    'expand in the section mea of config.json, "mea": {"decode": "expand", ...}'
)
# What marks tensors that a stand-in has handed out.
_MARK = "mea_handed_by"
# How far an attention function may be from softmax attention, relative to the largest output.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE_ROUNDING = 0.03


class ComponentCache:
    """Stands in for the cache in one attention block; without a cache, new tokens are encoded and rebuilt all the same.

    Args:
        block: The attention block.
        cache: The cache that holds the components, or None.
        hands_components: Whether `update` gives components instead of heads.

    Attributes:
        read: Whether the attention function has got what `update` gave, untouched.
        plain: Whether the attention function made of it what softmax attention does; None where nobody looked.
    """

    def __init__(self, block: Any, cache: Cache | None, hands_components: bool = False):
        self.block, self.cache, self.hands_components = block, cache, hands_components
        self.read = False
        self.plain: bool | None = None
        self._handed: list[weakref.ref[torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new heads, each (B, H, T, d), and return all that the block attends to.

        Returns:
            Rebuilt heads (B, H, T', d), or components (B, 1, T', width), marked as such.
        """
        keys, values = self.block.encode(key_states, value_states)
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        if not self.hands_components:
            keys, values = self.block.rebuild(keys, values)
        if not torch.compiler.is_compiling():
            keys, values = keys[:], values[:]  # a mark on what a cache keeps would keep the cache
            for side in (keys, values):
                setattr(side, _MARK, self)
            self._handed = [weakref.ref(keys), weakref.ref(values)]
        return keys, values

    def kept_by_others(self) -> bool:
        """Return whether anybody still has what `update` gave, as layers have that share keys and values."""
        return any(handed() is not None for handed in self._handed)

    def get_seq_length(self, *args: Any) -> int:
        """Return the tokens that came before."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        """Return whatever else of the cache a block asks for."""
        if name in ("block", "cache"):  # not set yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.cache, name)


_NOBODY = ComponentCache(None, None)


class RoutedConfig:
    """The configuration as an attention block sees it: its attention function is `attend` in place of transformers'.

    Whatever else is put in place of these (kernels of an engine, an attention function of somebody's own) stays.

    Args:
        config: The model's configuration.
        eager: The attention function of the block's own file, or None where there is none.
    """

    def __init__(self, config: Any, eager: Callable[..., Any] | None):
        object.__setattr__(self, "routed", config)
        object.__setattr__(self, "eager", eager)
        object.__setattr__(self, "replaced", None)

    def __getattr__(self, name: str) -> Any:
        """Return a setting."""
        if name in ("routed", "eager", "replaced"):  # not set yet, while a copy is being made
            raise AttributeError(name)
        value = getattr(self.routed, name)
        if name != "_attn_implementation" or torch.compiler.is_compiling() or self.function(value) is None:
            return value
        object.__setattr__(self, "replaced", value)
        return ATTENTION

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting of the model's configuration; who puts back what was read here means what it stood for."""
        setattr(self.routed, name, self.replaced if value == ATTENTION else value)

    def function(self, implementation: str) -> Callable[..., Any] | None:
        """Return the attention function of transformers that `attend` takes the place of, None for any other."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if implementation == "eager":
            return self.eager
        stock = implementation == "sdpa"
        stock = (
            stock and ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", sdpa_attention_forward) is sdpa_attention_forward
        )
        return sdpa_attention_forward if stock else None


class EncodedAttention(nn.Module):
    """An attention block of transformers, its keys and values composed at its cache; see `compose_block`."""

    mea: dict[str, Any]
    config: Any
    key_composition: Composition | None
    value_composition: Composition | None
    cache_argument: tuple[str, int]
    """Name and place of the argument of its own forward that takes the cache."""
    reads_components: dict[str, bool]
    """For attention implementations under which a forward has shown it: whether components can be handed over."""

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make what is cached, each (B, 1, T, width), of final heads (B, H, T, d)."""
        flat = []
        for heads, composition in ((keys, self.key_composition), (values, self.value_composition)):
            flat.append(heads.transpose(1, 2).flatten(2) if composition is None else composition(heads, "encode"))
        return flat[0][:, None], flat[1][:, None]

    def rebuild(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rebuild heads (B, H, T, d) of what is cached (B, 1, T, width)."""
        heads = []
        for flat, composition in ((keys, self.key_composition), (values, self.value_composition)):
            rebuilt = self._heads(flat) if composition is None else composition(flat[:, 0]).transpose(1, 2)
            heads.append(rebuilt)
        return heads[0], heads[1]

    def _heads(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a side that is cached as it is, (B, 1, T, H * d), as heads (B, H, T, d)."""
        return flat[:, 0].unflatten(-1, (self.mea["heads"], -1)).transpose(1, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with a stand-in for its cache.

        Raises:
            ValueError: The cache is of an unknown kind.
            RuntimeError: The block does not read components as it read heads.
        """
        name, position = self.cache_argument
        cache, kwargs = take_cache(args, kwargs)
        implementation = self._implementation()
        stand_in = ComponentCache(self, cache, self.reads_components.get(implementation, False))
        if position < len(args):
            args = (*args[:position], stand_in, *args[position + 1 :])
        else:
            kwargs = {**kwargs, name: stand_in}
        try:
            output = super().forward(*args, **kwargs)
        except Exception as error:
            if stand_in.hands_components and not stand_in.read:
                raise RuntimeError(_TOUCHED) from error
            raise
        if stand_in.hands_components and not stand_in.read:
            raise RuntimeError(_TOUCHED)
        if implementation and implementation not in self.reads_components:
            if not stand_in.read:
                self.reads_components[implementation] = False
            elif stand_in.plain is not None:
                self.reads_components[implementation] = stand_in.plain and not stand_in.kept_by_others()
        return output

    def _implementation(self) -> str:
        """Return the attention implementation that `attend` takes the place of; empty for none."""
        config = getattr(self, "config", None)
        if torch.compiler.is_compiling() or not isinstance(config, RoutedConfig):
            return ""
        return str(config.replaced) if config._attn_implementation == ATTENTION else ""

    def may_absorb(self, queries: torch.Tensor, length: int, mask: Any, settings: dict[str, Any]) -> bool:
        """Return whether new tokens attend to the components themselves, and faster than to heads rebuilt of them.

        A sequence whose tokens are all new is expanded, however short it is: the first one always is, and the same is
        to become of the same.

        Args:
            queries: Of the new tokens, (B, Hq, Q, d).
            length: All tokens T, new ones included.
            mask: What the model made for its attention implementation.
            settings: What the block hands to its attention function beside.
        """
        tokens, device = queries.shape[2], queries.device.type
        unknown = {name for name, value in settings.items() if value is not None} - _WITHOUT_EFFECT - _READ
        if unknown or settings.get("dropout") or settings.get("scaling") is None or not readable_mask(mask, tokens):
            return False
        choice = (getattr(self.config, "mea", None) or {}).get("decode", "auto")
        sides: list[tuple[Form, float]] = []
        for side, dim in (("key", "head_dim"), ("value", "value_dim")):
            form = side_form(self.mea, side)
            if not (form.plain or side in form.absorbs):
                return False
            sides.append((form, cached_width(self.mea[f"{side}_components"], self.mea[dim]) / self.mea["head_dim"]))
        heads, head_dim = self.mea["heads"], self.mea["head_dim"]
        if choice != "auto" or all(form.plain for form, _ in sides):
            return choice == "absorb"
        faster = absorb_is_faster(sides[0], sides[1], queries.shape[1], heads, head_dim, tokens, device)
        return tokens < length and faster

    def attend_to_components(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from queries to what is cached, without rebuilding heads.

        Args:
            queries: (B, Hq, Q, d), final.
            keys: (B, 1, T, width).
            values: (B, 1, T, width).
            mask: As `add_mask` takes it.
            scaling: Of the logits.
            softcap: Logits x become softcap * tanh(x / softcap), before the mask.
            s_aux: Sinks (Hq,), a logit more for every query head, to which no value belongs.

        Returns:
            (B, Q, Hq, d of values), and the attention weights (B, Hq, Q, T), None where a kernel keeps them.
        """
        heads = self.mea["heads"]
        wide = torch.promote_types(queries.dtype, torch.float32)
        rows = (queries.to(wide) * scaling).unflatten(1, (heads, -1)).flatten(2, 3)  # (B, H, rows, d)
        weights = output = None
        if self.key_composition is not None:
            rows = self.key_composition(rows, "absorb").flatten(1, 2)[:, None]  # (B, 1, Hq * Q, width)
            if softcap is None and s_aux is None and self.value_composition is not None:
                output = self._fused(rows, keys, values, mask, queries.shape[2])
        else:
            keys = self._heads(keys)
        if output is None:
            logits = key_scores(rows.to(keys.dtype), keys).to(wide).reshape(*queries.shape[:-1], -1)
            weights = attention_weights(logits, mask, softcap, s_aux).to(values.dtype)
            if self.value_composition is None:
                values = self._heads(values)
            # A cache of one wide head is read by all rows at once.
            output = weighted_values(weights.unflatten(1, (values.shape[1], -1)).flatten(2, 3), values)
        if self.value_composition is not None:
            output = output[:, 0].unflatten(1, (heads, -1)).to(wide)  # (B, H, rows, width)
            output = self.value_composition(output, "contract")
        output = output.to(queries.dtype).reshape(*queries.shape[:-1], -1)
        return output.transpose(1, 2).contiguous(), weights

    def _fused(
        self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, tokens: int
    ) -> torch.Tensor | None:
        """Return weighted sums of components (B, 1, Hq * Q, width) by one kernel, None where none is to be had."""
        section = getattr(self.config, "mea", None) or {}
        if not may_fuse(keys, values, rows, cpu_kernel=section.get("cpu_kernel", True)):
            return None
        return fused(rows.to(keys.dtype), keys, values, None, mask, tokens)


def attention_weights(
    logits: torch.Tensor, mask: torch.Tensor | None, softcap: float | None, s_aux: torch.Tensor | None
) -> torch.Tensor:
    """Return what every query gives each token, (B, Hq, Q, T), of scaled logits; see `attend_to_components`."""
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = add_mask(logits, mask)
    if s_aux is None:
        return softmax(logits)
    sinks = s_aux.to(logits).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return softmax(torch.cat((logits, sinks), dim=-1))[..., :-1]


def is_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    told: dict[str, Any],
    output: torch.Tensor,
    causal: bool = False,
) -> bool | None:
    """Return whether an attention function made softmax attention of heads, by its last query; None if not to be seen.

    Args:
        query: (B, Hq, Q, d).
        key: (B, H, T, d).
        value: (B, H, T, d of values).
        mask: What the function was handed.
        told: Scale, soft-capping and sinks.
        output: (B, Q, Hq, d of values), what it made.
        causal: Whether queries and keys begin together and every query sees those up to its own, so that no mask says
            that the rest of a static cache is empty.
    """
    if not (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4)):
        return None
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling, softcap, s_aux = (told.get(name) for name in ("scaling", "softcap", "s_aux"))
    if scaling is None or output.shape != (query.shape[0], query.shape[2], query.shape[1], value.shape[-1]):
        return False
    seen = query.shape[2] if causal else key.shape[2]
    last = query[:, :, -1].unflatten(1, (key.shape[1], -1))  # (B, H, Hq / H, d): heads are not copied for their queries
    logits = (last @ key[:, :, :seen].mT).to(wide).flatten(1, 2)[:, :, None] * scaling
    weights = attention_weights(logits, None if mask is None else mask[..., -1:, :], softcap, s_aux)
    weights = weights[:, :, 0].unflatten(1, (key.shape[1], -1)).to(value.dtype)
    expected = (weights @ value[:, :, :seen]).flatten(1, 2).to(wide)
    difference = (output[:, -1].to(wide) - expected).abs().max()
    return bool(difference <= _ROUNDING.get(query.dtype, _COARSE_ROUNDING) * expected.abs().max())


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **settings: Any,
) -> Any:
    """Attend as the configured attention function of transformers does, to components where they are handed.

    Args:
        module: The attention block.
        query: (B, Hq, Q, d).
        key: Heads (B, H, T, d), or components (B, 1, T, width) that `ComponentCache` has marked.
        value: The same of values.
        attention_mask: As the configured implementation wants it.
        **settings: What the block says beside.

    Returns:
        (B, Q, Hq, d of values), and attention weights or None.
    """
    config: RoutedConfig = module.config
    implementation = config.routed._attn_implementation
    function: Any = config.function(implementation)
    stand_in: ComponentCache = getattr(key, _MARK, _NOBODY)
    if getattr(value, _MARK, None) is not stand_in or stand_in.block is not module:
        return function(module, query, key, value, attention_mask, **settings)
    stand_in.read = True
    told = {name: setting for name, setting in settings.items() if name in _READ}
    if implementation == "sdpa":  # a family's own function may have them from the block itself
        told = {name: setting for name, setting in told.items() if name in parameters_of(function)}
    if not stand_in.hands_components:
        output, weights = function(module, query, key, value, attention_mask, **settings)
        if implementation not in module.reads_components and not settings.get("dropout"):
            causal = implementation == "sdpa" and attention_mask is None and query.shape[2] > 1
            causal = causal and getattr(module, "is_causal", True)
            with torch.no_grad():
                stand_in.plain = is_plain(query, key, value, attention_mask, told, output, causal)
        return output, weights
    if module.may_absorb(query, key.shape[2], attention_mask, settings):
        output, weights = module.attend_to_components(query, key, value, attention_mask, **told)
        return output, weights if implementation == "eager" else None
    return function(module, query, *module.rebuild(key, value), attention_mask, **settings)


ATTENTION = f"{__name__}.attend"
"""The name of `attend` among transformers' attention functions: each copy of this file has its own."""
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


@remember
def parameters_of(function: Any) -> frozenset[str]:
    """Return the names of the parameters of a function."""
    return frozenset(inspect.signature(function).parameters)


@remember
def parameters(kind: Any) -> list[str]:
    """Return the names of the parameters of an attention block's own forward, in order."""
    return list(_signature(kind).parameters)[1:]


@remember
def cache_parameter(kind: Any) -> str:
    """Return the name under which an attention block takes its cache.

    It is the parameter annotated with `Cache`, or where none is, the one whose `update` is called.

    Raises:
        TypeError: It has no such parameter.
    """
    parameters = _signature(kind).parameters
    for name, parameter in parameters.items():
        if "Cache" in str(parameter.annotation) and parameter.kind is not parameter.VAR_KEYWORD:
            return name
    source = inspect.getsource(inspect.unwrap(_stock(kind).forward))
    for name in parameters:
        if re.search(rf"\b{name}\.update\(", source):
            return name
    raise TypeError(f"{kind.__name__} takes no cache under this release of transformers")


def _stock(kind: Any) -> Any:
    return next(base for base in kind.__mro__ if not issubclass(base, EncodedAttention))


def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(_stock(kind).forward)


@remember
def encoded_class(stock: Any) -> Any:
    """Return the class of an attention block that is composed at its cache, made of its stock class."""
    fields: dict[str, Any] = {"__module__": __name__, "__doc__": f"{stock.__name__} with components in its cache."}
    fields["reads_components"] = {}  # of a block without a configuration, which shows nothing
    if stock.forward is not nn.Module.forward:  # what only encodes and rebuilds has none
        name = cache_parameter(stock)  # looked up here: torch.compile reads no signatures
        fields["cache_argument"] = (name, parameters(stock).index(name))
    return type(f"Mea{stock.__name__}", (EncodedAttention, stock), fields)


def compose_block(block: Any, spec: dict[str, Any]) -> None:
    """Have an attention block compose its keys and values at its cache.

    Args:
        block: The attention block of a stock model; its class becomes one of `encoded_class`.
        spec: The layer's entry in the ``mea`` section.
    """
    stock: Any = type(block)
    block.__class__ = encoded_class(stock)
    block.mea = spec
    if hasattr(block, "config"):
        block.reads_components = {}
        names = inspect.unwrap(stock.forward).__globals__
        block.config = RoutedConfig(block.config, names.get("eager_attention_forward"))
    for side, dim in (("key", "head_dim"), ("value", "value_dim")):
        setattr(block, f"{side}_composition", _composition(side, spec, spec[dim]))


def _composition(side: str, spec: dict[str, Any], head_dim: int) -> Composition | None:
    """Return the module of one side, or None where its heads are cached as they are."""
    form, heads = side_form(spec, side), spec["heads"]
    width = cached_width(spec[f"{side}_components"], head_dim)
    shape = form.shape(width, width, heads, head_dim)
    if shape is None or form.encoder_shape is None:
        return None
    counts = tuple(spec["rotary_components"]) if form.per_pair else ()
    sizes = SideSizes(width, heads, head_dim, spec["rotary_dim"], counts, spec.get("interleaved", False))
    return MODULES[form.name](sizes, shape, form.encoder_shape(width, width, heads, head_dim))


__all__ = ["ComponentCache", "EncodedAttention", "RoutedConfig", "attend", "compose_block", "encoded_class"]
