"""Greedy agreement, held against transformers' own generation."""

import pytest
import torch
from letters import tiny_llama

from mea_compress.errors import RequestError
from mea_compress.measure.agreement import choose_prompts, continue_greedily, measure_agreement

TOKENS = 9


def generated(model, prompts, tokens=TOKENS):
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
    )[:, prompts.shape[1] :]


@pytest.fixture
def prompts():
    return torch.randint(3, 30, (7, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_counts_are_those_of_two_generations(prompts, batch_size):
    reference = tiny_llama(0)
    model = tiny_llama(0)
    with torch.no_grad():  # near enough to differ late in some rows, and never in others
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    expected, own = generated(reference, prompts), generated(model, prompts)
    counts = [next((i for i in range(TOKENS) if a[i] != b[i]), TOKENS) for a, b in zip(expected, own, strict=True)]
    assert len(set(counts)) > 2 and TOKENS in counts  # a test that could not fail otherwise

    decoded = continue_greedily(reference, prompts, TOKENS, batch_size)
    assert torch.equal(decoded, expected)
    agreement = measure_agreement(model, prompts, decoded, batch_size)
    assert agreement.mean == pytest.approx(sum(counts) / 7)
    assert agreement.median == sorted(counts)[3]
    assert agreement.never_differs == pytest.approx(counts.count(TOKENS) / 7)
    assert (agreement.tokens, agreement.prompts, agreement.prompt_tokens) == (TOKENS, 7, 5)


def test_a_model_never_leaves_itself(prompts):
    model = tiny_llama(0).bfloat16()
    agreement = measure_agreement(model, prompts, continue_greedily(model, prompts, TOKENS))
    assert agreement.never_differs == 1 and agreement.mean == agreement.median == TOKENS


def test_decoding_ends_where_every_row_has_differed(prompts):
    model, calls = tiny_llama(0), []
    model.register_forward_hook(lambda *_: calls.append(1))
    never = torch.full((7, TOKENS), 0)
    assert measure_agreement(model, prompts, never).mean == 0
    assert len(calls) == 1


def test_prompts_are_spread_over_long_enough_sequences():
    ids = torch.arange(100 * 10).reshape(100, 10)
    mask = torch.ones(100, 10, dtype=torch.bool)
    mask[3, 2:] = False
    prompts = choose_prompts(ids, mask, 4, None)
    assert prompts.shape == (32, 5)
    assert torch.equal(prompts[0], ids[0, :5]) and torch.equal(prompts[-1], ids[-1, :5])
    assert not (prompts[:, 0] == ids[3, 0]).any()
    assert choose_prompts(ids, mask, 4, 7).shape == (32, 3)
    assert choose_prompts(ids[:2], mask[:2], 4, None).shape == (2, 5)
    with pytest.raises(RequestError, match="`agreement` 7 leaves no room"):
        choose_prompts(ids, mask, 7, 7)
