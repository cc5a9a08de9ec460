"""A small attention block as heads, and the block written out in float64, for tests of alignment and compositions."""

import numpy as np

from mea_compress.heads.types import AttentionHeads
from mea_compress.modeling.section_mea import rotary_pairs

D, HEADS, GROUP, HEAD_DIM, TOKENS = 24, 4, 2, 8, 9
# Under QK-norm queries have a norm of their own, which no method looks at.
QUERY_NORM = np.random.default_rng(11).random(HEAD_DIM) + 0.5


def make_heads(seed=0, rotary_dim=HEAD_DIM, head_norm=False, key_norm=False):
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return generator.standard_normal(shape) / D**0.5

    def weight(wanted):
        return generator.random(HEAD_DIM) + 0.5 if wanted else None

    return AttentionHeads(
        query=draw(HEADS * GROUP, HEAD_DIM, D + 1),
        key=draw(HEADS, HEAD_DIM, D + 1),
        value=draw(HEADS, HEAD_DIM, D + 1),
        output=draw(HEADS * GROUP, D, HEAD_DIM),
        key_norm=weight(key_norm),
        head_norm=weight(head_norm),
        rotary_dim=rotary_dim,
        norm_eps=1e-6,
    )


def run(heads, seed=1):
    """The attention block written out, float64: (T, D)."""
    generator = np.random.default_rng(seed)
    x = np.concatenate((generator.standard_normal((TOKENS, D)), np.ones((TOKENS, 1))), 1)
    first, second = rotary_pairs(HEAD_DIM, heads.rotary_dim)
    frequency = np.zeros(len(first))
    frequency[: heads.rotary_dim // 2] = generator.random(heads.rotary_dim // 2)
    turn = np.exp(1j * np.arange(TOKENS)[:, None] * frequency)  # (T, P)

    def normed(x, weight):
        return x if weight is None else x / np.sqrt(np.square(x).mean(-1, keepdims=True) + heads.norm_eps) * weight

    def rotated(weight, norm):
        projected = normed(x @ weight.T, norm)  # (T, d)
        return (projected[:, first] + 1j * projected[:, second]) * turn

    out = np.zeros((TOKENS, D))
    causal = np.tri(TOKENS, dtype=bool)
    for i in range(len(heads.query)):
        g = i // heads.group
        query_norm = None if heads.key_norm is None else QUERY_NORM
        queries, keys = rotated(heads.query[i], query_norm), rotated(heads.key[g], heads.key_norm)
        logits = (queries @ keys.conj().T).real / HEAD_DIM**0.5
        weights = np.exp(np.where(causal, logits - logits.max(-1, keepdims=True), -np.inf))
        attended = weights / weights.sum(-1, keepdims=True) @ (x @ heads.value[g].T)
        out += normed(attended, heads.head_norm) @ heads.output[i].T
    return out
