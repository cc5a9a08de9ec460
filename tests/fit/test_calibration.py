"""Statistics against a plain forward pass of the whole model, summed token by token."""

import pytest
import torch
from tiny import SIZES, save, scatter, stock_checkpoint
from transformers import AutoModelForCausalLM

from mea_compress.architectures import open_checkpoint
from mea_compress.errors import RequestError
from mea_compress.fit.calibration import StatisticsAccumulator, check_tokens
from mea_compress.layers.runner import LayerRunner, batches, embed
from mea_compress.modeling.attention_mea import rotary_pairs, rotate_heads
from mea_compress.modeling.configuration_mea import MeaLlamaConfig
from mea_compress.modeling.modeling_mea import MeaLlamaForCausalLM


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "phi3-partial", "qwen3_moe"])
def test_statistics_are_those_of_the_stock_model(case, tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "src", case))
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
    torch.testing.assert_close(torch.from_numpy(found.moment), moment, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(found.attention_weighted_moment), attended, rtol=1e-4, atol=1e-5)


def attention_of(case, tmp_path):
    """An accumulator that saw two sequences, and A, queries, keys and values of every query head, float64."""
    if case == "head norm":
        torch.manual_seed(0)
        model = MeaLlamaForCausalLM(MeaLlamaConfig(**SIZES, head_dim=8, mea={"head_norm": True}))
        source = open_checkpoint(save(scatter(model), tmp_path / "src"))
    else:
        source = open_checkpoint(stock_checkpoint(tmp_path / "src", case))
    runner = LayerRunner(source, 0)
    attention = runner.attention
    hidden = embed(source, torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1)))[:]
    _, trace = runner.run(hidden)
    accumulator = StatisticsAccumulator(attention)
    accumulator.add(trace)
    with torch.no_grad():
        cos, sin = trace.position_embeddings
        queries = attention.q_proj(trace.inputs).unflatten(-1, (-1, attention.head_dim))
        queries = rotate_heads(attention.q_norm(queries) if attention.qk_norm else queries, cos, sin).transpose(1, 2)
        keys, values = attention.expand(*attention.project(trace.inputs, cos, sin), (cos, sin))
        keys, values = (side.repeat_interleave(8 // side.shape[1], 1).double() for side in (keys, values))
        queries = queries.double()
        logits = queries @ keys.mT * attention.scaling
        weights = logits.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf).softmax(-1)
    return attention, accumulator, weights, queries, keys, values


def leverage_of(accumulator, weights, values):
    """The leverage of every query, (B, Hq, S), for weights (B, Hq, S, T) and each query head's values (B, Hq, T, d)."""
    grouped = [
        accumulator._leverage(sequence.float().unflatten(0, (4, 2)), rows.float()[::2])
        for sequence, rows in zip(weights, values, strict=True)
    ]
    return torch.stack(grouped).flatten(1, 2).double()


@pytest.mark.parametrize("case", ["llama", "qwen3", "head norm"])
def test_leverage_is_the_derivative_of_the_output_by_the_logits(case, tmp_path):
    """Behind head norm and o_proj, by automatic differentiation of one query head at a time."""
    attention, accumulator, weights, _, _, values = attention_of(case, tmp_path)
    found = leverage_of(accumulator, weights, values)
    output = attention.o_proj.weight.double().unflatten(1, (8, -1))  # (D, Hq, d)
    for head, query in ((0, 3), (2, 6), (7, 5)):

        def send(errors, head=head, query=query):
            seen = (weights[1, head, query].log() + errors).softmax(-1) @ values[1, head]
            if attention.has_head_norm:
                seen = attention.head_norm.double()(seen)
            return output[:, head] @ seen

        derivative = torch.autograd.functional.jacobian(send, torch.zeros(7, dtype=torch.float64))  # (D, T)
        attention.float()
        spread = 1 - weights[1, head, query].square().sum()
        expected = float(derivative.square().sum() / spread)
        assert found[1, head, query].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen3", "phi3-partial", "head norm"])
def test_key_statistics_are_sums_over_queries_and_tokens(case, tmp_path):
    attention, accumulator, weights, queries, keys, values = attention_of(case, tmp_path)
    statistics = accumulator.finish()
    leverage = leverage_of(accumulator, weights, values)
    first, second = rotary_pairs(attention.head_dim, attention.rotary_dim)
    q, k = (torch.complex(x[..., first], x[..., second]) for x in (queries, keys))
    pairs = len(first)
    cost = torch.zeros(4, pairs, dtype=torch.float64)
    covariance = torch.zeros(pairs, 4, 4, dtype=torch.complex128)
    for b in range(2):
        for s in range(7):
            stakes = leverage[b, :, s, None] * q[b, :, s].abs().square()  # (Hq, P)
            for i in range(8):
                mean = weights[b, i, s].to(k.dtype) @ k[b, i]  # (P,)
                variance = weights[b, i, s] @ (k[b, i] - mean).abs().square()
                cost[i // 2] += stakes[i] * variance
            shares = stakes.sum(1)
            average = (shares[:, None] * weights[b, :, s]).sum(0) / shares.sum().clamp(min=1e-30)  # (T,)
            own = k[b, ::2]  # (H, T, P)
            own = own - torch.einsum("t,htp->hp", average.to(k.dtype), own)[:, None]
            covariance += shares.sum() * torch.einsum("t,gtp,htp->pgh", average.to(k.dtype), own, own.conj())
    covariance = covariance / 14
    scale = float(covariance.abs().max())
    found = torch.from_numpy(statistics.key_covariance)
    torch.testing.assert_close(found, covariance, rtol=1e-3, atol=1e-5 * scale)
    found = torch.from_numpy(statistics.key_sensitivity) * found.diagonal(dim1=1, dim2=2).real.T
    torch.testing.assert_close(found, cost / 14, rtol=1e-3, atol=1e-5 * float(cost.max()))


def test_what_all_keys_have_in_common_costs_nothing_however_large(tmp_path):
    attention, *_ = attention_of("llama", tmp_path)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 2, 64, attention.head_dim, generator=generator)
    keys, values = torch.randn(2, 4, 64, attention.head_dim, generator=generator)
    weights = torch.rand(4, 2, 64, 64, generator=generator).softmax(-1)
    first, second = rotary_pairs(attention.head_dim, attention.rotary_dim)
    keys[..., [first[0], second[0]]] = 0.0
    found = []
    for common in (0.0, 1000.0):
        moved = keys.clone()
        moved[..., first[0]] = common
        accumulator = StatisticsAccumulator(attention)
        accumulator.accumulate_key_sensitivity(weights, queries, moved, values)
        found.append((accumulator.sensitivity, accumulator.key_covariance))
    torch.testing.assert_close(found[1], found[0])
    assert found[0][0][:, 1].min() > 0


def test_statistics_of_some_heads_are_theirs(tmp_path):
    _, accumulator, *_ = attention_of("llama", tmp_path)
    whole = accumulator.finish()
    part = whole.of_heads([2, 0])
    assert part.key_sensitivity.tolist() == [whole.key_sensitivity[2].tolist(), whole.key_sensitivity[0].tolist()]
    assert part.key_covariance[1, 0, 1] == whole.key_covariance[1, 2, 0]
    assert part.moment is whole.moment


def test_too_few_tokens_says_how_many_are_needed():
    with pytest.raises(RequestError, match="at least 64"):
        check_tokens(torch.zeros(3, 21, dtype=torch.long), 32)
    check_tokens(torch.zeros(2, 32, dtype=torch.long), 32)


def test_statistics_with_nan_are_refused(tmp_path):
    source = open_checkpoint(stock_checkpoint(tmp_path / "src"))
    runner = LayerRunner(source, 0)
    accumulator = StatisticsAccumulator(runner.attention)
    hidden = embed(source, torch.randint(3, 64, (2, 6)))[:]
    hidden[0, 3] = torch.nan
    accumulator.add(runner.run(hidden)[1])
    with pytest.raises(RequestError, match="NaN or infinite activations"):
        accumulator.finish()
