"""Attention from a few new tokens to a long cache of components, without composing the cached heads.

A query of head g sees q . K_g = sum over c of (w[c, g] q) . K_c, so queries are widened once a step (`absorb` of the
compositions in attention_mea.py) and attend to the cached components as they lie, a multi-query attention with one wide
head; the outputs are contracted with the composition of the values (`contract`). This file needs nothing but torch
and is copied into every checkpoint that uses it.

Shapes: B batch, T cached tokens, Q new tokens, Hq query heads, H key/value heads, C component heads, d head_dim; N
heads of a cache (one where components are cached flat) and R query rows that read each of them, Hq * Q / N.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

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
# A GPU's kernel splits the cache among its processors by blocks of so many tokens.
GPU_BLOCK = 128
# Query rows that the kernel holds at once, so that it reads the cache once, and the numbers of its accumulator.
GPU_ROWS, GPU_ACCUMULATOR = 64, 32768


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


def fused_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens: int,
    blocks: BlockMask,
    options: Any = None,
) -> torch.Tensor:
    """What absorbed queries get from flat components, in one kernel that reads each cached number once.

    The same as `key_scores`, norms, `add_mask`, `softmax` and `weighted_values` one after another, the readable
    reference, but for a row that sees nothing, which gets zeros. Compiled only on a GPU; elsewhere it runs as it is
    written.

    All rows are queries of one head: as heads of their own, their number would have to be a power of two.

    Args:
        queries: (B, 1, Hq * Q, key width), scaled; the rows of a query head lie together.
        keys: (B, 1, T, key width).
        values: (B, 1, T, value width).
        norms: 1/rms of every rebuilt key, (B, T, H), or None.
        mask: (B or 1, Hq or 1, Q, T), boolean where a token is seen, or additive; or None.
        tokens: Q.
        blocks: Of `every_block`.
        options: Of `kernel_options`.

    Returns:
        (B, 1, Hq * Q, value width), in the dtype of the queries.
    """
    group = queries.shape[2] // norms.shape[-1] if norms is not None else 1

    def score(logit: torch.Tensor, b: torch.Tensor, _: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> Any:
        if norms is not None:
            logit = logit * norms[b, token, row // group]
        if mask is None:
            return logit
        # Where all sequences or heads share a mask, its only index is 0.
        entry = mask[b * (mask.shape[0] > 1), row // tokens * (mask.shape[1] > 1), row % tokens, token]
        return logit + entry if mask.is_floating_point() else torch.where(entry, logit, -float("inf"))

    output: Any = flex_attention(
        queries, keys, values, score_mod=score, block_mask=blocks, scale=1.0, kernel_options=options
    )
    return output


@lru_cache(maxsize=1)
def every_block(rows: int, length: int, device: torch.device) -> BlockMask:
    """All cached tokens, block by block: without a list of blocks the kernel would not share them out."""
    blocks = -(-length // GPU_BLOCK)
    count = torch.full((1, 1, 1), blocks, dtype=torch.int32, device=device)
    indices = torch.arange(blocks, dtype=torch.int32, device=device)[None, None, None]
    return BlockMask.from_kv_blocks(count, indices, BLOCK_SIZE=GPU_BLOCK, seq_lengths=(rows, length))


def kernel_options(rows: int, key_width: int, value_width: int, itemsize: int, shared: int) -> dict[str, int] | None:
    """How the kernel of `fused_attention` is to be built, or None where it cannot be.

    A product on a GPU is at least 16 wide, and widths are rounded up to powers of two. A tile of queries and one of
    the cache must fit in the memory of a processor, and the sums of all rows in its registers.

    Args:
        rows: Hq * Q.
        key_width: Of the cached keys, without norms.
        value_width: Of the cached values.
        itemsize: Bytes of a cached number.
        shared: Bytes of shared memory that one block of threads may have.
    """
    if min(key_width, value_width) < 16 or rows > GPU_ROWS:
        return None
    held, keys, values = (1 << (number - 1).bit_length() for number in (max(rows, 16), key_width, value_width))
    if held * values > GPU_ACCUMULATOR:
        return None
    for tile, stages in ((64, 2), (32, 2), (64, 1), (32, 1), (16, 1)):
        if itemsize * (held * keys + stages * tile * (keys + values)) <= shared:
            return {"BLOCK_N": tile, "num_stages": stages, "num_warps": 8 if held * values > 8192 else 4}
    return None


def may_fuse(keys: torch.Tensor, values: torch.Tensor, *others: torch.Tensor, cpu_kernel: bool = True) -> bool:
    """Whether `fused` may read this cache: where a device has a kernel, and nothing looks at what is computed.

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
    return devices == {"cuda"} or (devices == {"cpu"} and cpu_kernel and readable(keys, values))


_NOT_FUSED: set[tuple] = set()


def fused(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor | None:
    """What absorbed queries get from flat components, by the kernel of their device; None where none can be had.

    A mask that does not fit is left to plain products, which say what is wrong with it.

    Args:
        queries: As `fused_attention`, in the dtype of the keys.
        keys: As there.
        values: As there.
        norms: As there.
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
    if queries.device.type == "cpu":
        return attend_on_cpu(queries, keys, values, norms, mask)
    return attend_on_gpu(queries, keys, values, norms, mask, tokens)


def attend_on_gpu(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor | None:
    """`fused_attention`, compiled once for all lengths of a cache; None where there is none. Arguments as there."""
    rows, length, width = queries.shape[2], keys.shape[2], values.shape[3]
    form = (str(keys.device), keys.dtype, *queries.shape, width, tokens, norms is None, getattr(mask, "dtype", None))
    if form in _NOT_FUSED or keys.dtype != values.dtype or keys.dtype.itemsize not in (2, 4):
        return None
    device = torch.cuda.get_device_properties(keys.device)
    options = kernel_options(
        rows, queries.shape[3], width, keys.dtype.itemsize, getattr(device, "shared_memory_per_block_optin", 48 * 1024)
    )
    if options is None:
        return None
    try:
        blocks = every_block(rows, length, keys.device)
        return _compiled(form)(queries, keys, values, norms, mask, tokens, blocks, options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler does not support here, plain products do
        _NOT_FUSED.add(form)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"cached components are read by plain products, no kernel was built: {reason}", stacklevel=2)
        return None


@cache
def _compiled(form: tuple) -> Callable:
    """`fused_attention` compiled for a form, each apart where this torch can, so that many do not count as one."""
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    compile_: Any = torch.compile
    return compile_(fused_attention, fullgraph=True, **apart)
