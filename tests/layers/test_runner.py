"""A model run layer by layer is the model."""

import pytest
import torch
from tiny import CASES, stock_checkpoint
from transformers import AutoModelForCausalLM

from mea_compress.architectures import open_checkpoint
from mea_compress.layers import runner as streaming
from mea_compress.layers.read import read_heads
from mea_compress.layers.runner import Activations, LayerRunner, batches, embed


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
