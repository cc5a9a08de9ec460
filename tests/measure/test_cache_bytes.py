import pytest
import torch
from letters import tiny_llama

from mea_compress.measure.cache import cache_bytes, measure_cache_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cache_bytes_are_those_of_the_tensors(dtype):
    model = tiny_llama().to(dtype)
    # keys and values of 2 layers × 2 heads × 4
    assert measure_cache_bytes(model) == 2 * 2 * 2 * 4 * dtype.itemsize
    assert measure_cache_bytes(model, torch.ones(3, 5, dtype=torch.int64)) == 2 * 2 * 2 * 4 * dtype.itemsize


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
