"""Speed and memory of models that run: caches are counted as they are, and models stay as they were."""

import pytest
import torch
from letters import tiny_llama

from mea_compress.errors import RequestError
from mea_compress.measure.speed import measure_speed
from mea_compress.modeling.configuration_mea import MeaLlamaConfig
from mea_compress.modeling.modeling_mea import MeaLlamaForCausalLM

HALF = {"key_composition": "head", "key_components": 1, "value_composition": "head", "value_components": 1}


def compressed():
    config = tiny_llama().config.to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    mea = {"layers": [dict(HALF) for _ in range(config["num_hidden_layers"])]}
    return MeaLlamaForCausalLM(MeaLlamaConfig(**{key: config[key] for key in sizes}, mea=mea)).eval()


def test_every_model_is_timed_at_every_context_and_batch_and_its_own_cache_counted():
    models = {"checkpoint": compressed(), "reference": tiny_llama()}
    timings = measure_speed(models, torch.arange(10), [5, 20], [1, 3], progress=False)
    names = ["checkpoint", "checkpoint, expanded", "reference"]
    expected = [(name, context, batch) for context in (5, 20) for batch in (1, 3) for name in names]
    assert [(timing.model, timing.context, timing.batch) for timing in timings] == expected
    for timing in timings:
        heads = 2 if timing.model == "reference" else 1
        # keys and values of 2 layers, head_dim 4, float32
        assert timing.cache_bytes == timing.context * timing.batch * 2 * 2 * heads * 4 * 4
        assert timing.prefill_seconds > 0 and timing.decode_milliseconds > 0
        assert timing.peak_bytes is None or timing.peak_bytes >= 0
    assert "decode" not in models["checkpoint"].config.mea


def test_expanded_means_that_no_step_absorbs(monkeypatch):
    from mea_compress.modeling.attention_mea import MeaAttention

    model, ways = compressed(), []
    absorbs = MeaAttention._absorbs
    monkeypatch.setattr(MeaAttention, "_absorbs", lambda *a: ways.append(absorbs(*a)) or ways[-1])
    measure_speed({"checkpoint": model}, torch.arange(10), [8], [1], progress=False)
    per_run = 2 * (1 + 4)  # layers x (prefill and 4 decoded tokens)
    runs = [ways[start : start + per_run] for start in range(0, len(ways), per_run)]
    assert [any(run) for run in runs] == [True, False] * 3


@pytest.mark.parametrize("context", [1, 33])
def test_contexts_that_cannot_be_measured_are_refused(context):
    with pytest.raises(RequestError, match=f"`contexts` {context} cannot be measured"):
        measure_speed({"checkpoint": tiny_llama()}, torch.arange(10), [context], [1], progress=False)
