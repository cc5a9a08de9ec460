"""Which rotary embeddings follow the length of a sequence, against the frequencies that transformers makes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mea_compress.architectures.rope import length_dependent_rope

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
KINDS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": FACTORS,
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_those_whose_frequencies_change_are_named(kind):
    rope = {"rope_type": kind, "rope_theta": 100.0, **KINDS[kind]}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=32, rope_parameters=rope
    )
    rotary = LlamaRotaryEmbedding(config)
    short, long = (rotary(torch.ones(1), torch.arange(length)[None])[0][:, :8] for length in (8, 64))
    assert length_dependent_rope(config) == (None if torch.allclose(short, long) else kind)


def test_longrope_with_one_list_of_factors_stays_as_it_is():
    rope = {"rope_type": "longrope", **FACTORS, "long_factor": FACTORS["short_factor"]}
    assert length_dependent_rope(SimpleNamespace(rope_parameters=rope)) is None


def test_each_type_of_layer_counts():
    rope = {"full_attention": {"rope_type": "dynamic", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}}
    assert length_dependent_rope(SimpleNamespace(rope_parameters=rope)) == "dynamic"
    assert length_dependent_rope(SimpleNamespace(rope_parameters=None)) is None
