"""Explicit attention written as the formulas stand: the readable reference that faster paths are tested against."""

from collections.abc import Callable
from typing import Any

import torch

from mea_compress.modeling.attention_mea import rotate_heads
from mea_compress.modeling.section_mea import (
    COMPLEX,
    ENCODED_COMPLEX,
    ENCODED_LOW_RANK,
    ENCODED_REAL,
    KEPT,
    LOW_RANK,
    REAL,
    SELECTED,
    SHARED_LATENT,
    Form,
)


def reconstruct(form: Form, composition: Any, components: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """T_lc[t, h] from component heads, one head at a time (arXiv 2601.19611, head-level linear composition).

    Args:
        form: Of the side.
        composition: Its module, or None where components are heads already.
        components: (T, width).
        heads: H.
        head_dim: d.

    Returns:
        (T, H, d).
    """
    if form.plain:  # (groups, d) -> each group's component stands for all its heads
        shared = components.reshape(len(components), -1, head_dim)
        return shared.repeat_interleave(heads // shared.shape[1], dim=1)
    return RECONSTRUCT[form.name](composition, components, heads)


def _real(composition: Any, components: torch.Tensor, heads: int) -> torch.Tensor:
    weight = composition.weight  # C x H: a number for each component and head
    component_heads = components.reshape(len(components), weight.shape[0], -1)
    return torch.stack([sum(weight[c, h] * component_heads[:, c] for c in range(len(weight))) for h in range(heads)], 1)


def _complex(composition: Any, components: torch.Tensor, heads: int) -> torch.Tensor:
    width, pairs = components.shape[1], len(composition.rotary_components)
    weight = torch.complex(composition.weight[0], composition.weight[1])  # (N, H)
    numbers = torch.complex(components[:, : width // 2], components[:, width // 2 :])  # (T, N)
    pair = composition.pair_of_component
    rebuilt = components.new_zeros(len(components), heads, 2 * pairs)
    for p in range(pairs):
        k = numbers[:, pair == p] @ weight[pair == p]  # (T, H), complex
        rebuilt[:, :, composition.first[p]] = k.real
        rebuilt[:, :, composition.second[p]] = k.imag
    return rebuilt


def _low_rank(composition: Any, components: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.stack([components @ rows.T for rows in composition.weight.chunk(heads)], 1)


RECONSTRUCT: dict[str, Callable[[Any, torch.Tensor, int], torch.Tensor]] = {
    **dict.fromkeys((REAL.name, KEPT.name, SELECTED.name, ENCODED_REAL.name), _real),
    **dict.fromkeys((COMPLEX.name, ENCODED_COMPLEX.name), _complex),
    **dict.fromkeys((LOW_RANK.name, SHARED_LATENT.name, ENCODED_LOW_RANK.name), _low_rank),
}
"""The formula of each form with a weight."""


def reference_attention(
    attention: Any, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """k, v projections -> HLC -> QK-norm -> RoPE -> softmax attention per query head -> head norm -> o_proj.

    Args:
        attention: A ``MeaAttention`` module; only its weights are used.
        hidden_states: (T, D), one sequence.
        cos: (T, rotary_dim).
        sin: (T, rotary_dim).
        visible: (T, T) boolean, which key each query sees.

    Returns:
        (T, D).
    """
    heads, query_heads, head_dim = attention.heads, attention.query_heads, attention.head_dim
    queries = attention.q_proj(hidden_states).reshape(-1, query_heads, head_dim)
    keys = attention.k_proj(hidden_states)
    values = attention.v_proj(hidden_states)
    key_form, value_form = attention.key_form, attention.value_form
    if key_form.joint:  # both sides read the whole latent
        keys = values = torch.cat((keys, values), -1)
    keys = reconstruct(key_form, attention.key_composition, keys, heads, head_dim)
    if attention.qk_norm and key_form.weighted_keys:
        keys = keys / attention.k_norm.weight
    values = reconstruct(value_form, attention.value_composition, values, heads, head_dim)
    if attention.qk_norm:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries = rotate_heads(queries[None], cos[None], sin[None])[0]
    keys = rotate_heads(keys[None], cos[None], sin[None])[0]
    outputs = []
    for i in range(query_heads):
        head = i // (query_heads // heads)
        logits = queries[:, i] @ keys[:, head].T / head_dim**0.5
        probabilities = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(probabilities @ values[:, head])
    output = torch.stack(outputs, 1)  # (T, Hq, d)
    if attention.has_head_norm:
        output = attention.head_norm(output)
    return attention.o_proj(output.flatten(1))
