"""Speed and memory of models that run: caches are counted as they are, and models stay as they were."""

import mmap
import sys

import pytest
import torch
from letters import tiny_llama

from mea_compress.errors import RequestError
from mea_compress.measure import speed
from mea_compress.measure.speed import _peak_memory, measure_decode_speed, measure_speed
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
    with _peak_memory(torch.device("cpu")) as peak:
        pass
    available = bool(peak)
    expected = [(name, context, batch) for context in (5, 20) for batch in (1, 3) for name in names]
    assert [(timing.model, timing.context, timing.batch) for timing in timings] == expected
    for timing in timings:
        heads = 2 if timing.model == "reference" else 1
        # keys and values of 2 layers, head_dim 4, float32
        assert timing.cache_bytes == timing.context * timing.batch * 2 * 2 * heads * 4 * 4
        assert timing.prefill_seconds > 0 and timing.decode_milliseconds > 0
        assert (timing.peak_bytes is None) != available
    assert "decode" not in models["checkpoint"].config.mea


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no counter that can be reset")
def test_the_peak_is_that_of_the_block():
    with _peak_memory(torch.device("cpu")) as peak, mmap.mmap(-1, 1 << 26) as block:
        for _ in range(64):  # what an allocator has left from tests before would not be new
            block.write(bytes(1 << 20))
    with _peak_memory(torch.device("cpu")) as later:
        pass
    if not peak:
        pytest.skip("this system does not let the counter be reset")
    assert peak[0] > 60 << 20 > 8 << 20 > later[0]


@pytest.mark.parametrize("missing", ["_STATUS", "_REFERENCES"])
def test_no_peak_without_a_counter(missing, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, missing, tmp_path / "nowhere" / "file")
    with _peak_memory(torch.device("cpu")) as peak:
        torch.ones(8)
    assert peak == []


def test_decoding_is_timed_without_prefill_and_warm_up(monkeypatch):
    """A clock that ticks at every call of the model sees the timed steps alone."""
    model, calls = tiny_llama(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(len(calls)))
    assert measure_decode_speed(model, torch.ones(1, 5, dtype=torch.int64), 7) == 1.0
    assert len(calls) == 1 + speed.WARM_UP_TOKENS + 7


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
