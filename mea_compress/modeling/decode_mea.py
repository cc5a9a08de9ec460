"""Attention from a few new tokens to a long cache of components, without composing the cached heads.

A query of head g sees q . K_g = sum over c of (w[c, g] q) . K_c, so queries are widened once a step (`absorb` of the
compositions in attention_mea.py) and attend to the cached components as they lie, a multi-query attention with one wide
head; the outputs are contracted with the composition of the values (`contract`). This file needs nothing but torch
and is copied into every checkpoint that uses it.

Shapes: B batch, T cached tokens, Q new tokens, Hq query heads, H key/value heads, C component heads, d head_dim; N
heads of a cache (one where components are cached flat) and R query rows that read each of them, Hq * Q / N.
"""

from typing import Any

import torch

from .decode_cpu_mea import attend_on_cpu, readable
from .section_mea import Form

# Machine balance: multiply-adds per cached number read (roofline model); decisions are insensitive to it.
_BALANCE = {"cpu": 16.0}
_BALANCE_OF_ACCELERATORS = 300.0
# The same for a number of a rebuilt head, which is written and read again: measured on a CPU, where 30 to 100 new
# tokens cost as much absorbed as expanded at the shapes of Llama-3.2-1B and Llama-3.1-8B.
_BALANCE_OF_COMPOSED = {"cpu": 300.0}
# Composing heads multiplies thin matrices, at this share of the rate of the wide ones (measured on a CPU: 47 of 222
# GFLOP/s in float32, 42 of 440 in bfloat16).
_COMPOSING_RATE = 0.2
# Latent keys are rebuilt so many tokens at a time on a CPU, which keeps a tile of all heads in its cache.
TILE = 512


def side_cost(form: Form, rows: int, heads: int, components: float, head_dim: int, device: str) -> tuple[float, float]:
    """What one side (keys or values) costs for one cached token, absorbed and expanded.

    The larger of arithmetic and memory traffic, in multiply-adds per channel of a head. Absorbed, every query row
    reads C components; expanded, H heads are rebuilt, written and read again, and every row reads one of them.

    Args:
        form: Of the side.
        rows: Query rows, Hq * Q.
        heads: H.
        components: C.
        head_dim: d.
        device: Device type, as in ``torch.device.type``.

    Returns:
        The two costs.
    """
    balance = _BALANCE.get(device, _BALANCE_OF_ACCELERATORS)
    if form.plain:  # nothing to rebuild, however it is read
        plain = max(rows, balance * components)
        return plain, plain
    absorbed = max(rows * components, balance * components)
    traffic = balance * components + _BALANCE_OF_COMPOSED.get(device, balance) * 2 * heads
    expanded = max(heads * components * form.multiply_adds(head_dim) / _COMPOSING_RATE + rows, traffic)
    return absorbed, expanded


def absorb_is_faster(
    key: tuple[Form, float],
    value: tuple[Form, float],
    query_heads: int,
    heads: int,
    head_dim: int,
    tokens: int,
    device: str,
) -> bool:
    """Whether new tokens attend faster to components than to the heads rebuilt from them.

    Args:
        key: Form and component count of the keys.
        value: The same of the values.
        query_heads: Hq.
        heads: H.
        head_dim: d.
        tokens: New tokens Q.
        device: Device type, as in ``torch.device.type``.
    """
    sides = [key, value] if key[0].commutes_with_rope else [value]  # others are rebuilt in either case
    costs = [side_cost(form, query_heads * tokens, heads, count, head_dim, device) for form, count in sides]
    absorbed, expanded = (sum(cost) for cost in zip(*costs, strict=True))
    return absorbed < expanded or (absorbed == expanded and tokens == 1)


def readable_mask(attention_mask: Any, tokens: int) -> bool:
    """Whether `add_mask` understands a mask; without one, only a single new token is known to see all the others."""
    if attention_mask is None:
        return tokens == 1
    if not isinstance(attention_mask, torch.Tensor):
        return False
    return attention_mask.dim() == 4 or (attention_mask.dim() == 2 and tokens == 1)


def add_mask(logits: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Hides what the mask hides.

    Args:
        logits: (B, Hq, Q, T).
        attention_mask: Boolean or integer, where a token is seen, or additive: (B or 1, Hq or 1, Q, >= T), or (B, T)
            for a single new token; or None.
    """
    if attention_mask is None:
        return logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = _four_dimensional(attention_mask, logits.shape[-1])
    if mask.is_floating_point():
        return logits + mask
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


def _four_dimensional(mask: torch.Tensor, length: int) -> torch.Tensor:
    """A mask as (B or 1, Hq or 1, Q, length), boolean or additive."""
    mask = (mask[:, None, None] if mask.dim() == 2 else mask)[..., :length]
    return mask if mask.is_floating_point() else mask.bool()


def key_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Queries (B, N, R, W) against cached keys (B, N, T, W): (B, N, R, T), on a CPU with T outermost in memory."""
    if not _on_plain_cpu(queries, keys):
        return queries @ keys.mT
    pairs = zip(queries.flatten(0, 1), keys.flatten(0, 1), strict=True)
    return torch.stack([rows @ query.T for query, rows in pairs]).unflatten(0, keys.shape[:2]).mT


def weighted_values(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention weights (B, N, R, T) times cached values (B, N, T, W): (B, N, R, W)."""
    if not _on_plain_cpu(weights, values):
        return weights @ values
    pairs = zip(weights.flatten(0, 1), values.flatten(0, 1), strict=True)
    return torch.stack([weight @ rows for weight, rows in pairs]).unflatten(0, values.shape[:2])


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax, in float32 or wider, of (B, Hq, Q, T) over cached tokens, along their order in memory."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.stride(-1) != 1 and logits.device.type == "cpu" and not torch.compiler.is_compiling():
        return logits.permute(0, 3, 1, 2).softmax(1, dtype=wide).permute(0, 2, 3, 1)
    return logits.softmax(-1, dtype=wide)


def _on_plain_cpu(*tensors: torch.Tensor) -> bool:
    """On a CPU, for inference: a product a sequence is then faster than a batched one."""
    return tensors[0].device.type == "cpu" and _is_inference(*tensors)


def _is_inference(*tensors: torch.Tensor) -> bool:
    """No autograd, tracing or torch.compile looks at what is done with these."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def may_fuse(keys: torch.Tensor, values: torch.Tensor, *others: torch.Tensor, cpu_kernel: bool = True) -> bool:
    """Return whether `fused` may read this cache: on a CPU, where nothing looks at what is computed.

    A kernel compiled from FlexAttention was tried on a GPU and read slower than plain products: on an H200 at 32 K
    tokens 1.07 ms against 0.18 for eight sequences, and at best the same for one.

    Args:
        keys: What is cached.
        values: What is cached.
        others: What queries are made of.
        cpu_kernel: Whether the configuration lets a compiler build the kernel of a CPU.
    """
    tensors = (keys, values, *others)
    if not _is_inference(*tensors):
        return False
    devices = {tensor.device.type for tensor in tensors}
    return devices == {"cpu"} and cpu_kernel and readable(keys, values)


def fused(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor | None:
    """Return what absorbed queries get from flat components by the CPU's kernel, or None where none can be had.

    A mask that does not fit is left to plain products, which say what is wrong with it.

    Args:
        queries: (B, 1, Hq * Q, key width), scaled, in the dtype of the keys; the rows of a query head lie together.
        keys: (B, 1, T, key width).
        values: (B, 1, T, value width).
        norms: 1/rms of every rebuilt key, (B, T, H), or None.
        mask: As `add_mask` takes it.
        tokens: Q.
    """
    if mask is not None:
        batch, length, query_heads = keys.shape[0], keys.shape[2], queries.shape[2] // tokens
        mask = _four_dimensional(mask, length)
        fits = ((1, batch), (1, query_heads), (1, tokens), (1, length))
        if any(size not in sizes for size, sizes in zip(mask.shape, fits, strict=True)):
            return None
        mask = mask.expand(-1, -1, tokens, length)
    return attend_on_cpu(queries, keys, values, norms, mask)
