"""Distillation: its loss against the plain one, the step size that it finds, and what it keeps."""

import copy

import pytest
import torch
from tiny import stock_model

from mea_compress.distillation import (
    DistillationSettings,
    _head_alone_makes_logits,
    _sliced_loss,
    _whole_loss,
    distil,
    measure,
)

IDS = torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair():
    """A teacher, and a student whose attention weights were moved."""
    teacher = stock_model("llama").eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(2)
    for name, weight in student.named_parameters():
        if "self_attn" in name:
            weight.data += 0.5 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
            weight.requires_grad_(True)
    return student, teacher


def gradients(student):
    found = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    return found


def test_the_loss_in_slices_is_the_plain_loss_with_the_same_gradients(pair):
    student, teacher = pair
    results = []
    for loss_of in (_whole_loss, _sliced_loss):
        loss = loss_of(student, teacher, IDS[:3])
        (3 * loss).backward()
        results.append((loss.item(), gradients(student)))
    (whole, expected), (sliced, found) = results
    assert sliced == pytest.approx(whole, rel=1e-5)
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-7)


def test_logits_that_the_head_alone_does_not_make_are_made_by_the_model(pair):
    student, _ = pair
    assert _head_alone_makes_logits(student, IDS[:1])
    hook = student.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits / 2))
    assert not _head_alone_makes_logits(student, IDS[:1])
    hook.remove()
    student.lm_head.weight.requires_grad_(True)
    assert not _head_alone_makes_logits(student, IDS[:1])


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_a_step_size_is_found_and_the_best_is_kept(pair, products):
    student, teacher = pair
    training, held_out = IDS[:16], IDS[16:]
    before = measure(student, teacher, held_out, products).kl
    settings = DistillationSettings(40, 8, products=products, rates=(1e-6, 0.05))
    losses = []
    done = distil(student, teacher, training, held_out, settings, losses.append)
    after = measure(student, teacher, held_out, products)
    assert done.rate == 0.05 and after.kl < 0.7 * before
    assert min(value for _, value in done.curve) == pytest.approx(after.kl / after.tokens, rel=1e-3)
    assert done.curve[0] == (0, pytest.approx(before / after.tokens, rel=1e-3)) and done.curve[-1][0] == 40
    assert len(losses) == settings.all_steps == 40 + 2 * 3
    assert all(weight.dtype == torch.float32 for weight in student.parameters() if weight.requires_grad)


@pytest.mark.parametrize("rates", [{"rates": (1e3, 1e30)}, {"learning_rate": 1e3}])
def test_what_only_gets_worse_stays_as_it_was(pair, rates):
    student, teacher = pair
    before = copy.deepcopy(student.state_dict())
    distil(student, teacher, IDS[:16], IDS[16:], DistillationSettings(4, 8, **rates))
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_the_same_seed_gives_the_same_weights(pair):
    student, teacher = pair
    other = copy.deepcopy(student)
    for one in (student, other):
        distil(one, teacher, IDS[:16], IDS[16:], DistillationSettings(4, 8, seed=3))
    for (name, weight), same in zip(student.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(weight, same), name
