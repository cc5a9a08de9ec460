"""A model run layer by layer is the model."""

import errno

import pytest
import torch
from tiny import CASES, stock_checkpoint, store_another_head
from transformers import AutoModelForCausalLM

from mea_compress.architectures import open_checkpoint
from mea_compress.errors import DiskFullError
from mea_compress.layers import runner as streaming
from mea_compress.layers.read import read_heads
from mea_compress.layers.runner import (
    Activations,
    HeadRunner,
    LayerRunner,
    batches,
    embed,
    fast_products,
    reading_dtype,
)


@pytest.mark.parametrize("case", CASES)
def test_layers_in_turn_are_the_stock_model(case, tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "src", case))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src").eval()
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    hidden = embed(source, ids)
    for layer in range(source.config.num_hidden_layers):
        runner = LayerRunner(source, layer)
        for part in batches(3, 2):
            hidden[part] = runner.run(hidden[part])[0]
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        torch.testing.assert_close(model.model.norm(hidden[:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_head_is_the_one_that_the_loader_takes(case, stored, tmp_path):
    """The embedding where config.json ties the head to it, unless another is stored."""
    source = stock_checkpoint(tmp_path / "src", case, tie_word_embeddings=True)
    if stored:
        store_another_head(source)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    assert (model.lm_head.weight is not model.model.embed_tokens.weight) == stored
    hidden = torch.randn(7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(hidden)).log_softmax(-1)
    found = HeadRunner(open_checkpoint(source)).log_probabilities(hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_trace_is_what_the_attention_saw_and_sent(tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "src", "qwen3"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src").eval()
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    _, trace = LayerRunner(source, 0).run(embed(source, ids)[:])
    with torch.no_grad():
        layer = model.model.layers[0]
        inputs = layer.input_layernorm(model.model.embed_tokens(ids))
        outputs = model(ids, output_hidden_states=True).hidden_states[1]
        rest = layer.mlp(layer.post_attention_layernorm(model.model.embed_tokens(ids) + trace.outputs))
    torch.testing.assert_close(trace.inputs, inputs)
    torch.testing.assert_close(model.model.embed_tokens(ids) + trace.outputs + rest, outputs, rtol=1e-4, atol=1e-5)
    assert read_heads(source, 0).key_norm is not None


def test_a_full_disk_is_met_before_anything_is_spilled(monkeypatch):
    monkeypatch.setattr(streaming, "SPILL_BYTES", 8)
    monkeypatch.setattr(streaming, "allocate", lambda *_: errno.ENOSPC)
    with pytest.raises(DiskFullError, match="this file needs 96 bytes"):
        Activations((4, 3, 2), torch.float32)


def test_activations_spill_to_a_file_and_stay_the_same(monkeypatch):
    numbers = torch.randn(4, 3, 2)
    monkeypatch.setattr(streaming, "SPILL_BYTES", 8)
    spilled = Activations((4, 3, 2), torch.float32)
    spilled[slice(0, 4)] = numbers
    assert torch.equal(spilled[:], numbers)
    other = spilled.copy()
    other[slice(0, 1)] = torch.zeros(1, 3, 2)
    assert torch.equal(spilled[:], numbers)
    assert torch.equal(other[torch.tensor([1, 3])], numbers[[1, 3]])


@pytest.mark.parametrize("case", CASES)
def test_a_layer_in_two_halves_is_the_layer(case, tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "src", case))
    hidden = embed(source, torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0)))[:]
    runner = LayerRunner(source, 1)
    attention = runner.attention
    whole, captured = runner.run(hidden)
    half = runner.attend(hidden)
    torch.testing.assert_close(half.outputs, captured.outputs)
    torch.testing.assert_close(runner.output_of(half.mixed), captured.outputs)
    torch.testing.assert_close(runner.finish(hidden, half.outputs), whole)
    assert runner.model.layers[0].self_attn is attention
    other = runner.finish(hidden, torch.zeros_like(half.outputs))
    assert not torch.allclose(other, whole)


def test_what_attention_sends_has_the_gradients_of_the_layer(tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "src"))
    hidden = embed(source, torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0)))[:]
    runner = LayerRunner(source, 0)
    weight = runner.attention.v_proj.weight.requires_grad_(True)
    runner.send(hidden).square().sum().backward()
    cos, sin = runner.attend(hidden).position_embeddings
    inputs = runner.model.layers[0].input_layernorm(hidden)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    expected = torch.autograd.grad(runner.attention(inputs, (cos, sin), mask)[0].square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_products_in_bfloat16_keep_the_stream_in_float32(tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "src"))
    hidden = embed(source, torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0)))[:]
    exact, _ = LayerRunner(source, 0).run(hidden)
    runner = LayerRunner(source, 0, products=torch.bfloat16)
    rounded, captured = runner.run(hidden)
    assert rounded.dtype == torch.float32 and captured.mixed.dtype == torch.bfloat16
    assert runner.attention.q_proj.weight.dtype == torch.float32
    error = (rounded - exact).square().sum() / (exact - hidden).square().sum()
    assert 0 < error < 1e-3  # eight bits: a relative error of 2 ** -9 in each product


@pytest.mark.parametrize(
    ("dtype", "capabilities", "products"),
    [
        (torch.bfloat16, {"amx_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"avx512_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"avx2": True}, torch.float32),
        (torch.float32, {"amx_bf16": True}, torch.float32),
        (torch.float16, {"amx_bf16": True}, torch.float32),
        (torch.float64, {"amx_bf16": True}, torch.float32),
    ],
)
def test_products_are_bfloat16_where_model_and_processor_are_made_for_it(dtype, capabilities, products, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_products(dtype, torch.device("cpu")) == products
    assert reading_dtype(dtype, torch.device("cpu")) == (torch.float64 if dtype == torch.float64 else products)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fast_products(dtype, torch.device("cpu")) == torch.float32


def test_pytorch_says_what_the_processor_has():
    """The names that `fast_products` relies on, where this release of PyTorch can say so."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        pytest.skip("this release of PyTorch does not say what the processor has")
    if capabilities()["architecture"] != "x86_64":
        pytest.skip("the names are those of x86")
    assert {"amx_bf16", "avx512_bf16"} <= capabilities().keys()
