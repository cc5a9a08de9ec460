"""Components at the cache of attention blocks that stay as they are.

Every attention block of transformers hands its final keys and values (after bias, norm and RoPE, whatever it has of
them) to its cache and attends to what comes back. A block that is composed here gets a stand-in for the cache, which
makes components of the heads (``encode``), keeps those in the cache, and hands back the heads that are rebuilt of all
of them (``rebuild``). Nothing of the family's own attention has to be known. This file needs nothing but torch and
transformers and is copied into every checkpoint that uses it.

Shapes: B batch, T tokens, H key/value heads, d channels of a head.
"""

from __future__ import annotations

import inspect
from functools import cache as remember
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .attention_mea import MODULES, Composition, SideSizes, take_cache
from .section_mea import cached_width, side_form

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class ComponentCache:
    """Stands in for the cache in one attention block; without a cache, new tokens are encoded and rebuilt all the same.

    Args:
        block: The attention block.
        cache: The cache that holds the components, or None.
    """

    def __init__(self, block: Any, cache: Cache | None):
        self.block, self.cache = block, cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new heads, each (B, H, T, d), and return all that the block attends to, rebuilt: (B, H, T', d)."""
        keys, values = self.block.encode(key_states, value_states)
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return self.block.rebuild(keys, values)

    def get_seq_length(self, *args: Any) -> int:
        """Return the tokens that came before."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        """Return whatever else of the cache a block asks for."""
        if name in ("block", "cache"):  # not set yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.cache, name)


class EncodedAttention(nn.Module):
    """An attention block of transformers, its keys and values composed at its cache; see `compose_block`."""

    mea: dict[str, Any]
    key_composition: Composition | None
    value_composition: Composition | None

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
            rebuilt = (
                flat[:, 0].unflatten(-1, (self.mea["heads"], -1)) if composition is None else composition(flat[:, 0])
            )
            heads.append(rebuilt.transpose(1, 2))
        return heads[0], heads[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with a stand-in for its cache.

        Raises:
            ValueError: The cache is of an unknown kind.
        """
        kind: Any = type(self)
        name = cache_parameter(kind)
        cache, kwargs = take_cache(args, kwargs)
        stand_in = ComponentCache(self, cache)
        position = parameters(kind).index(name)
        if position < len(args):
            args = (*args[:position], stand_in, *args[position + 1 :])
        else:
            kwargs = {**kwargs, name: stand_in}
        return super().forward(*args, **kwargs)


@remember
def parameters(kind: Any) -> list[str]:
    """Return the names of the parameters of an attention block's own forward, in order."""
    return list(_signature(kind).parameters)[1:]


@remember
def cache_parameter(kind: Any) -> str:
    """Return the name under which an attention block takes its cache: the parameter annotated with `Cache`.

    Raises:
        TypeError: It has no such parameter.
    """
    for name, parameter in _signature(kind).parameters.items():
        if "Cache" in str(parameter.annotation) and parameter.kind is not parameter.VAR_KEYWORD:
            return name
    raise TypeError(f"{kind.__name__} takes no cache under this release of transformers")


def _signature(kind: Any) -> inspect.Signature:
    stock = next(base for base in kind.__mro__ if not issubclass(base, EncodedAttention))
    return inspect.signature(stock.forward)


@remember
def encoded_class(stock: Any) -> Any:
    """Return the class of an attention block that is composed at its cache, made of its stock class."""
    fields = {"__module__": __name__, "__doc__": f"{stock.__name__} with components in its cache."}
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


__all__ = ["ComponentCache", "EncodedAttention", "compose_block", "encoded_class"]
