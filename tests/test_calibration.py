"""Statistics against a plain forward pass of the whole model, summed token by token."""

import pytest
import torch
from tiny import stock_checkpoint
from transformers import AutoModelForCausalLM

from mea_compress.architectures import open_source
from mea_compress.calibration import StatisticsAccumulator, check_tokens
from mea_compress.errors import RequestError
from mea_compress.streaming import LayerRunner, batches, embed


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "phi3-partial", "qwen3_moe"])
def test_statistics_are_those_of_the_stock_model(case, tmp_path):
    source = open_source(stock_checkpoint(tmp_path / "src", case))
    ids = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(1))
    hidden, accumulator = embed(source, ids), None
    for part in batches(3, 2):
        runner = LayerRunner(source, 0)
        accumulator = accumulator or StatisticsAccumulator(runner.attention)
        accumulator.add(runner.run(hidden[part])[1])
    found = accumulator.finish()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src", attn_implementation="eager").eval()
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0].double()  # (B, Hq, T, T)
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).double()
    x = torch.cat((x, torch.ones(3, 10, 1, dtype=torch.float64)), -1)
    size = x.shape[-1]
    moment, attended = torch.zeros(size, size).double(), torch.zeros(size, size).double()
    for b in range(3):
        for t in range(10):
            moment += torch.outer(x[b, t], x[b, t]) / 30
            for head in range(8):
                average = weights[b, head, t] @ x[b]
                attended += torch.outer(average, average) / (30 * 8)
    assert found.tokens == 30
    torch.testing.assert_close(found.moment, moment, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.attended, attended, rtol=1e-4, atol=1e-5)


def test_query_energy_is_the_mean_over_the_group(tmp_path):
    source = open_source(stock_checkpoint(tmp_path / "src", "qwen3"))
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    runner = LayerRunner(source, 0)
    accumulator = StatisticsAccumulator(runner.attention)
    _, trace = runner.run(embed(source, ids)[:])
    accumulator.add(trace)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src").eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        queries = attention.q_norm(attention.q_proj(trace.inputs).view(2, 6, 8, 8)).double()
    for head in range(4):
        for pair in range(4):
            both = queries[:, :, 2 * head : 2 * head + 2]
            expected = (both[..., pair].square() + both[..., pair + 4].square()).mean()
            assert accumulator.finish().query_energy[head, pair] == pytest.approx(float(expected), rel=1e-5)


def test_too_few_tokens_says_how_many_are_needed():
    with pytest.raises(RequestError, match="at least 64"):
        check_tokens(torch.zeros(3, 21, dtype=torch.long), 32)
    check_tokens(torch.zeros(2, 32, dtype=torch.long), 32)


def test_statistics_with_nan_are_refused(tmp_path):
    source = open_source(stock_checkpoint(tmp_path / "src"))
    runner = LayerRunner(source, 0)
    accumulator = StatisticsAccumulator(runner.attention)
    hidden = embed(source, torch.randint(3, 64, (2, 6)))[:]
    hidden[0, 3] = torch.nan
    accumulator.add(runner.run(hidden)[1])
    with pytest.raises(RequestError, match="NaN or infinite activations"):
        accumulator.finish()
