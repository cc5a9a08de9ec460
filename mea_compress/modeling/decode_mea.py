"""Attention from a few new tokens to a long cache of components, without composing the cached heads.

A query of head g sees q . K_g = sum over c of (w[c, g] q) . K_c, so queries are widened once a step (`absorb` of the
compositions in modeling_mea.py) and attend to the cached components as they lie, a multi-query attention with one wide
head; the outputs are contracted with the composition of the values (`contract`). This file needs nothing but torch
and is copied into every checkpoint that uses it.

Shapes: B batch, T cached tokens, Q new tokens, Hq query heads, H key/value heads, C component heads, d head_dim; N
heads of a cache (one where components are cached flat) and R query rows that read each of them, Hq * Q / N.
"""

from typing import Any

import torch

# Multiply-adds a device does in the time in which it reads one cached number; one number more or less decides nothing.
_BALANCE = {"cpu": 16.0}
_BALANCE_OF_ACCELERATORS = 300.0
# Composing heads multiplies thin matrices, at this share of the rate of the wide ones (measured on a CPU: 47 of 222
# GFLOP/s in float32, 42 of 440 in bfloat16).
_COMPOSING_RATE = 0.2
# Latent keys are rebuilt so many tokens at a time on a CPU, which keeps a tile of all heads in its cache.
TILE = 512
# A CPU's fast product reads whole blocks of so many tokens.
BLOCK = 512


def side_cost(
    kind: str, rows: int, heads: int, components: float, head_dim: int, balance: float
) -> tuple[float, float]:
    """What one side (keys or values) costs for one cached token, absorbed and expanded.

    The larger of arithmetic and memory traffic, in multiply-adds per channel of a head. Absorbed, every query row
    reads C components; expanded, H heads are composed, written and read again, and every row reads one of them.

    Args:
        kind: The side's composition.
        rows: Query rows, Hq * Q.
        heads: H.
        components: C.
        head_dim: d.
        balance: Multiply-adds in the time of reading one number.

    Returns:
        The two costs.
    """
    if kind in ("none", "pool"):  # nothing to compose, however it is read
        plain = max(rows, balance * components)
        return plain, plain
    # Multiply-adds for each component and head.
    terms = {"latent": head_dim, "joint": head_dim, "frequency": 2}.get(kind, 1)
    absorbed = max(rows * components, balance * components)
    expanded = max(heads * components * terms / _COMPOSING_RATE + rows, balance * (components + 2 * heads))
    return absorbed, expanded


def absorbing_pays(
    key: tuple[str, float],
    value: tuple[str, float],
    query_heads: int,
    heads: int,
    head_dim: int,
    tokens: int,
    device: str,
) -> bool:
    """Whether new tokens attend faster to components than to the heads composed of them.

    Args:
        key: Composition and component count of the keys.
        value: The same of the values.
        query_heads: Hq.
        heads: H.
        head_dim: d.
        tokens: New tokens Q.
        device: Device type, as in ``torch.device.type``.
    """
    balance = _BALANCE.get(device, _BALANCE_OF_ACCELERATORS)
    sides = [value] if key[0] in ("latent", "joint") else [key, value]  # latent keys are rebuilt in either case
    costs = [side_cost(kind, query_heads * tokens, heads, count, head_dim, balance) for kind, count in sides]
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
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            attention_mask = attention_mask != 0
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = attention_mask[..., : logits.shape[-1]]
    if mask.is_floating_point():
        return logits + mask
    return logits.masked_fill(~mask.bool(), torch.finfo(logits.dtype).min)


def read_keys(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Queries (B, N, R, W) against cached keys (B, N, T, W): (B, N, R, T), on a CPU with T outermost in memory."""
    if not _on_plain_cpu(queries, keys):
        return queries @ keys.mT
    # In bfloat16 the plain product is oneDNN's already, and this one of its shapes is prepared once for all lengths.
    whole = _whole_blocks(keys) if keys.dtype == torch.float32 else 0
    product = []
    for rows, query in zip(keys.flatten(0, 1), queries.flatten(0, 1), strict=True):
        rest = rows[whole:] @ query.T
        product.append(torch.cat((_linear(rows[:whole], query), rest)) if whole else rest)
    return _stack(product).unflatten(0, keys.shape[:2]).mT


def read_values(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention weights (B, N, R, T) times cached values (B, N, T, W): (B, N, R, W)."""
    if not _on_plain_cpu(weights, values):
        return weights @ values
    whole = _whole_blocks(values)
    product = []
    for weight, rows in zip(weights.flatten(0, 1), values.flatten(0, 1), strict=True):
        rest = weight[:, whole:] @ rows[whole:]
        product.append(_linear(weight[:, :whole], rows[:whole].T) + rest if whole else rest)
    return _stack(product).unflatten(0, values.shape[:2])


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax, in float32 or wider, of (B, Hq, Q, T) over cached tokens, along their order in memory."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.stride(-1) != 1 and logits.device.type == "cpu" and not torch.compiler.is_compiling():
        return logits.permute(0, 3, 1, 2).softmax(1, dtype=wide).permute(0, 2, 3, 1)
    return logits.softmax(-1, dtype=wide)


def _stack(matrices: list[torch.Tensor]) -> torch.Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def _on_plain_cpu(*tensors: torch.Tensor) -> bool:
    """On a CPU, and neither compiled nor differentiated: a product a sequence is then faster than a batched one."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _whole_blocks(cached: torch.Tensor) -> int:
    """How many cached tokens oneDNN's linear layer reads; the BLAS reads the others.

    Measured where there is AVX-512, it is up to three times as fast for these shapes, but prepares itself anew for
    every shape, and a cache has another length at every step: whole blocks change their number seldom.
    """
    if cached.dtype not in (torch.float32, torch.bfloat16) or not _one_dnn():
        return 0
    return cached.shape[-2] // BLOCK * BLOCK


def _one_dnn() -> bool:
    wide = torch.backends.mkldnn.enabled and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(wide) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """X (M, K) times the transpose of weight (N, K), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
