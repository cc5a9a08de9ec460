"""The loss by the teacher's largest logits: against plain autograd, and against the loss over the whole vocabulary."""

from functools import partial

import pytest
import torch
from torch import nn

from mea_compress.training import top_logits
from mea_compress.training.head_loss import HeadLoss
from mea_compress.training.top_logits import top_divergence, top_row

B, T, D, V = 3, 6, 8, 50


@pytest.fixture(params=["peaked", "flat"])
def models(request):
    generator = torch.Generator().manual_seed(0)
    scale = 3.0 if request.param == "peaked" else 0.3
    heads = []
    for _ in range(2):
        head = nn.Linear(D, V)
        for weight in head.parameters():
            weight.data = scale * torch.randn(weight.shape, generator=generator)
            weight.requires_grad_(False)
        heads.append(head)
    heads[1].weight.data = heads[0].weight + 0.1 * heads[1].weight
    hidden = torch.randn(B, T, D, generator=generator)
    target = hidden + 0.1 * torch.randn(B, T, D, generator=generator)
    ids = torch.randint(0, V, (B, T), generator=generator)
    return hidden.requires_grad_(True), target, *heads, ids


def plain(hidden, target, head, expected, ids, of_kl, of_text, temperature, count):
    """The same of whole logits in float64, by autograd."""
    logits, wanted = (
        x.double() @ h.weight.double().T + h.bias.double() for x, h in ((hidden, head), (target, expected))
    )
    log_q, log_p = ((each / temperature).log_softmax(-1) for each in (logits, wanted))
    text = -logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    divergence = whole if count is None else top_divergence(log_p, log_q, count)
    return (of_kl * divergence).sum() + (of_text[:, :-1] * text).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(("slice_size", "count"), [(7, 5), (7, 20), (64, 49), (64, 1)])
def test_slices_of_the_vocabulary_give_what_whole_logits_give(
    models, temperature, share, slice_size, count, monkeypatch
):
    monkeypatch.setattr(top_logits, "SLICE", slice_size)
    generator = torch.Generator().manual_seed(1)
    of_kl, of_text = torch.rand(B, T, generator=generator), share * torch.rand(B, T, generator=generator)
    of_kl[0, 2:5] = of_text[0, 2:5] = of_text[:, -1] = 0
    expected = plain(*models, of_kl, of_text, temperature, count)
    (gradient,) = torch.autograd.grad(expected, models[0])
    text = of_text if share else None
    loss = HeadLoss.apply(*models, of_kl + of_text, of_kl, text, temperature, partial(top_row, count=count))
    (found,) = torch.autograd.grad(2 * loss, models[0])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(found, 2 * gradient, rtol=1e-3, atol=2e-5)


def test_a_part_is_never_more_and_of_peaked_logits_within_a_hundredth(models):
    ones = torch.ones(B, T) / (B * T)
    zeros = torch.zeros(B, T)
    whole = plain(*models, ones, zeros, 1.0, None).item()
    found = [
        HeadLoss.apply(*models, None, ones, None, 1.0, partial(top_row, count=count)).item() for count in (1, 4, 16, 32)
    ]
    assert found == sorted(found) and found[-1] <= whole * (1 + 1e-5)
    if models[2].weight.std() > 1:
        assert found[2] == pytest.approx(whole, rel=0.01) and whole > 0.05
