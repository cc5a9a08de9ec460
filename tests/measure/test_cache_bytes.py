import pytest
import torch
from letters import tiny_llama
from test_every_family import load, stock_family, tokens

import mea_compress as mc
from mea_compress.errors import RequestError
from mea_compress.measure import cache as cache_module
from mea_compress.measure.cache import cache_bytes, measure_cache_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cache_bytes_are_those_of_the_tensors(dtype):
    model = tiny_llama().to(dtype)
    # keys and values of 2 layers × 2 heads × 4
    assert measure_cache_bytes(model) == 2 * 2 * 2 * 4 * dtype.itemsize
    assert measure_cache_bytes(model, torch.ones(3, 5, dtype=torch.int64)) == 2 * 2 * 2 * 4 * dtype.itemsize


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "granitemoehybrid", "lfm2", "qwen3_next"])
def test_states_that_do_not_grow_are_no_bytes_of_a_token(name, tmp_path):
    source = stock_family(name, tmp_path / "SRC")
    model, whole = load(source), mc.plan(source, kv_ratio=1).bytes_before
    # keys and values of 2 heads × 8 in float32, in both layers or in the one that has attention
    assert whole == 2 * 2 * 8 * 4 * (2 if name == "gemma3_text" else 1)
    for batch, length in ((1, 1), (1, 2), (2, 7), (1, 64)):
        assert measure_cache_bytes(model, tokens(batch, length)) == whole


def test_a_cache_of_constant_states_alone_is_none_of_keys_and_values(monkeypatch):
    monkeypatch.setattr(cache_module, "run_cached", lambda *_: (None, {"conv_states": torch.zeros(1, 8, 4)}))
    with pytest.raises(RequestError, match="keeps no KV cache"):
        measure_cache_bytes(tiny_llama())


def test_cache_bytes_see_everything_a_layer_holds():
    class Layer:
        def __init__(self):
            storage = torch.zeros(2, 8)
            self.keys, self.values = storage[:, :4], storage[:, 4:]  # one storage of 64 bytes
            self.scalars = {"norm": [torch.zeros(2, 3)]}  # 24 bytes
            self.length = torch.tensor(3)  # a counter

    class Cache:
        def __init__(self):
            self.layers = [Layer(), Layer()]
            self.owner = self

    assert cache_bytes(Cache()) == 2 * (64 + 24)
