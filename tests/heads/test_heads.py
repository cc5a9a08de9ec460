import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stock_checkpoint, stock_model

from mea_compress.architectures import open_checkpoint
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.heads.composed import FactoredHeads
from mea_compress.heads.types import ComposedLayer
from mea_compress.layers.read import read_composed, read_heads, read_projection, read_side
from mea_compress.layers.store import store_layer
from mea_compress.modeling.section_mea import HEADS, LOW_RANK, POOLED, REAL
from mea_compress.recipe import Recipe

PREFIX = "model.layers.1.self_attn."


@pytest.mark.parametrize("case", ["llama-rope-bias-wide-tied", "qwen2", "qwen3", "phi3-partial"])
def test_heads_are_the_projections_in_float64_with_the_bias_as_last_column(case, tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "source", case))
    attention = stock_model(case).model.layers[1].self_attn
    heads = read_heads(source, 1)
    x = torch.randn(5, source.config.hidden_size, dtype=torch.float64)
    ones = torch.cat((x, torch.ones(5, 1, dtype=torch.float64)), 1)
    attention = attention.double()
    if case == "phi3-partial":
        width = attention.o_proj.in_features
        query, key, value = attention.qkv_proj(x).split([width, width // 2, width // 2], dim=-1)
    else:
        query, key, value = (getattr(attention, f"{name}_proj")(x) for name in "qkv")
    for found, expected in ((heads.query, query), (heads.key, key), (heads.value, value)):
        assert found.dtype == np.float64
        torch.testing.assert_close(torch.einsum("hdx,tx->thd", torch.from_numpy(found), ones).flatten(1), expected)
    sent = torch.randn(5, *heads.query.shape[:2], dtype=torch.float64)
    out = torch.einsum("hDd,thd->tD", torch.from_numpy(heads.output), sent)
    bias = f"{PREFIX}o_proj.bias"
    out = out + torch.from_numpy(source.reader.read_array(bias)) if source.reader.has(bias) else out
    torch.testing.assert_close(out, attention.o_proj(sent.flatten(1)))
    assert (heads.key_norm is not None) == (case == "qwen3")
    assert heads.group == 2
    first, second = heads.pairs
    assert sorted([*first, *second]) == list(range(source.head_dim))


def test_a_layer_survives_being_stored(tmp_path):
    source = stock_checkpoint(tmp_path / "source", "qwen2", torch.float64)
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition="frequency", value_composition="latent")
    compress(source, tmp_path / "out", recipe=recipe, progress=False)
    opened = open_checkpoint(tmp_path / "out")
    composed = {side: read_composed(opened, 1, side) for side in ("key", "value")}
    stored = store_layer(ComposedLayer(**composed), opened.config.mea["bias"], "F64")
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in stored.tensors.items():
        assert np.array_equal(array, on_disk[PREFIX + name].numpy()), name
    assert {k: v for k, v in opened.config.mea["layers"][1].items() if v is not None} == stored.section
    for side in ("key", "value"):
        assert np.array_equal(read_side(opened, 1, side), composed[side].reconstruct())


def test_composed_heads_are_the_expansion_of_the_projection():
    heads, head_dim, size = 4, 6, 7
    generator = np.random.default_rng(0)
    weights = {
        HEADS: (24, None),
        POOLED: (12, None),
        REAL: (12, generator.standard_normal((2, 4))),
        LOW_RANK: (12, generator.standard_normal((24, 12))),
    }
    for form, (width, weight) in weights.items():
        composed = FactoredHeads(form, heads, head_dim, generator.standard_normal((width, size)), weight)
        found = composed.reconstruct()
        assert found.shape == (heads, head_dim, size)
        np.testing.assert_allclose(found.reshape(-1, size), composed.expansion() @ composed.projection, atol=1e-12)


def test_numbers_that_are_not_finite_are_named(tmp_path):
    directory = stock_checkpoint(tmp_path / "source")
    tensors = load_file(directory / "model.safetensors")
    tensors[PREFIX + "q_proj.weight"][0, 0] = float("inf")
    save_file(tensors, directory / "model.safetensors")
    source = open_checkpoint(directory)
    read_projection(source, 1, "key")
    with pytest.raises(RequestError, match=r"q_proj\.weight holds NaN or infinite"):
        read_projection(source, 1, "query")


def test_numbers_that_the_dtype_cannot_hold_are_refused():
    rows = np.full((4, 5), 7e4)  # float16 ends at 65504
    side = FactoredHeads(HEADS, 2, 2, rows)
    bias = {"query": False, "key": True, "value": False}
    assert np.isfinite(store_layer(ComposedLayer(side, side), bias, "BF16").tensors["k_proj.bias"]).all()
    with pytest.raises(RequestError, match=r"k_proj\.weight .* that float16 cannot hold; choose `dtype` bfloat16"):
        store_layer(ComposedLayer(side, side), bias, "F16")
