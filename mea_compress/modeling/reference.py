"""Explicit attention written as the formulas stand: the readable reference that faster paths are tested against."""

from typing import Any

import torch

from mea_compress.modeling.attention_mea import FrequencyComposition, HeadComposition, rotate_heads


def compose(composition: Any, components: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """T_lc[t, h] from component heads, one head at a time (arXiv 2601.19611, head-level linear composition).

    Args:
        composition: A composition module, or None where every head is cached or components are shared by groups.
        components: (T, width).
        heads: H.
        head_dim: d.

    Returns:
        (T, H, d).
    """
    tokens, width = components.shape
    if composition is None:  # (groups, d) -> each group's component stands for all its heads
        own = components.reshape(tokens, -1, head_dim)
        return own.repeat_interleave(heads // own.shape[1], dim=1)
    if isinstance(composition, FrequencyComposition):
        weight = torch.complex(composition.weight[0], composition.weight[1])  # (N, H)
        lanes = torch.complex(components[:, : width // 2], components[:, width // 2 :])  # (T, N)
        pairs = len(composition.rotary_components)
        pair = composition.pair_of_lane
        composed = components.new_zeros(tokens, heads, 2 * pairs)
        for p in range(pairs):
            k = lanes[:, pair == p] @ weight[pair == p]  # (T, H), complex
            composed[:, :, composition.first[p]] = k.real
            composed[:, :, composition.second[p]] = k.imag
        return composed
    weight = composition.weight
    if isinstance(composition, HeadComposition):  # C x H: a number for each component and head
        component_heads = components.reshape(tokens, weight.shape[0], -1)
        return torch.stack(
            [sum(weight[c, h] * component_heads[:, c] for c in range(len(weight))) for h in range(heads)], 1
        )
    return torch.stack([components @ rows.T for rows in weight.chunk(heads)], 1)


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
    if attention.key_kind == "joint":  # both sides read the whole latent
        keys = values = torch.cat((keys, values), -1)
    if attention.qk_norm and isinstance(attention.key_composition, FrequencyComposition):
        keys = (
            compose(attention.key_composition, keys, heads, head_dim) / attention.k_norm.weight
        )  # lanes compose weighted keys
    else:
        keys = compose(attention.key_composition, keys, heads, head_dim)
    values = compose(attention.value_composition, values, heads, head_dim)
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
