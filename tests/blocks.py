"""A small attention block as heads, and the block written out in float64, for tests of alignment and compositions."""

import torch

from mea_compress.heads import AttentionHeads
from mea_compress.modeling.attention_mea import rotary_pairs

D, HEADS, GROUP, HEAD_DIM, TOKENS = 24, 4, 2, 8, 9


def make_heads(seed=0, rotary_dim=HEAD_DIM, head_norm=False, key_norm=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / D**0.5

    def weight(wanted):
        return torch.rand(HEAD_DIM, generator=generator, dtype=torch.float64) + 0.5 if wanted else None

    return AttentionHeads(
        query=draw(HEADS * GROUP, HEAD_DIM, D + 1),
        key=draw(HEADS, HEAD_DIM, D + 1),
        value=draw(HEADS, HEAD_DIM, D + 1),
        output=draw(HEADS * GROUP, D, HEAD_DIM),
        output_bias=None,
        query_norm=weight(key_norm),
        key_norm=weight(key_norm),
        head_norm=weight(head_norm),
        rotary_dim=rotary_dim,
        norm_eps=1e-6,
    )


def run(heads, seed=1):
    """The attention block written out, float64: (T, D)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, D, generator=generator, dtype=torch.float64)
    x = torch.cat((x, torch.ones(TOKENS, 1, dtype=torch.float64)), 1)
    first, second = rotary_pairs(HEAD_DIM, heads.rotary_dim)
    frequency = torch.zeros(len(first), dtype=torch.float64)
    frequency[: heads.rotary_dim // 2] = torch.rand(heads.rotary_dim // 2, generator=generator, dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(TOKENS)[:, None] * frequency)  # (T, P)

    def normed(x, weight):
        return x if weight is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + heads.norm_eps) * weight

    def rotated(weight, norm):
        projected = normed(x @ weight.T, norm)  # (T, d)
        return torch.complex(projected[:, first], projected[:, second]) * turn

    out = torch.zeros(TOKENS, D, dtype=torch.float64)
    causal = torch.ones(TOKENS, TOKENS).tril().bool()
    for i in range(len(heads.query)):
        g = i // heads.group
        queries, keys = rotated(heads.query[i], heads.query_norm), rotated(heads.key[g], heads.key_norm)
        logits = (queries @ keys.conj().T).real / HEAD_DIM**0.5
        attended = logits.masked_fill(~causal, -torch.inf).softmax(-1) @ (x @ heads.value[g].T)
        out += normed(attended, heads.head_norm) @ heads.output[i].T
    return out
