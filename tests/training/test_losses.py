"""The loss of a distillation: the fast one against the plain one, and both against plain autograd."""

import pytest
import torch

from mea_compress.errors import RequestError
from mea_compress.training import head_loss, losses
from mea_compress.training.distillation import measure
from mea_compress.training.losses import Terms, head_alone_makes_logits, sliced_loss, whole_loss
from mea_compress.training.settings import DistillationSettings

IDS = torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[(5, 2), (5, 64), (256, 3), (256, 256)])
def positions_at_once(request, monkeypatch):
    """How many positions of a sequence have logits at once, and go through softmax, of a vocabulary of 64."""
    positions, block = request.param
    monkeypatch.setattr(head_loss, "_POSITIONS", positions)
    monkeypatch.setattr(head_loss, "_BLOCK_BYTES", 4 * 64 * block)


@pytest.mark.parametrize("options", [(2.0, 0.0), (1.0, 0.3), (0.5, 1.0)])
def test_temperature_and_cross_entropy_are_those_of_plain_autograd(pair, options, positions_at_once):
    student, teacher = pair
    temperature, share = options
    results = []
    for loss_of in (whole_loss, sliced_loss):
        loss = sum(loss_of(student, teacher, IDS[:3], Terms(*options)))
        loss.backward()
        results.append((loss.item(), gradients(student)))
    with torch.no_grad():
        logits, expected = (model(IDS[:3]).logits.double() for model in (student, teacher))
    p, q = ((each / temperature).softmax(-1) for each in (expected, logits))
    kl = (p * (p.log() - q.log())).sum(-1).mean() * temperature**2
    ce = -logits.log_softmax(-1)[:, :-1].gather(2, IDS[:3, 1:, None]).mean()
    (whole, found), (sliced, same) = results
    assert whole == pytest.approx(float((1 - share) * kl + share * ce), rel=1e-4)
    assert sliced == pytest.approx(whole, rel=1e-4)
    for name, gradient in same.items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_what_does_not_count_has_no_part_in_the_loss(pair, share, positions_at_once):
    student, teacher = pair
    counted = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    counted[:, 3] = True
    mean = float(counted[:, 1:].sum()) / len(counted)
    with torch.no_grad():
        q, p = (model(IDS).logits.double().log_softmax(-1) for model in (student, teacher))
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1]
    text = -q[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    expected = ((1 - share) * kl + share * text)[counted[:, 1:]].mean()
    settings = DistillationSettings(1, 24, cross_entropy=share)
    found = []
    for sliced in (True, False):
        loss_of = losses.DistillationLoss(student, teacher, settings, sliced, mean)
        loss, told = loss_of(IDS, counted)
        loss.backward()
        whole = gradients(student)
        # Shared out, whatever counts in a part: the same on average.
        parts = [loss_of(*part)[0] for part in zip(IDS.split(6), counted.split(6), strict=True)]
        (sum(parts) / 4).backward()
        for name, gradient in gradients(student).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-6)
        assert loss.item() == told.item() == pytest.approx(float(expected), rel=1e-4)
        assert sum(part.item() for part in parts) / 4 == pytest.approx(loss.item(), rel=1e-5)
        found.append(whole)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6)
    judged = measure(student, teacher, IDS, counted=counted)
    assert judged.kl == pytest.approx(float(kl[counted[:, 1:]].sum()), rel=1e-4) != 0
    assert judged.tokens == int(counted[:, 1:].sum())


def relative_error(found, expected):
    """Mean squared error of every token over its squared size in either model, where that is larger, in float64."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        a, b = a.double(), b.double()
        errors.append((a - b).norm(dim=-1) / torch.maximum(a.norm(dim=-1), b.norm(dim=-1)))
    return float(torch.stack(errors).square().mean())


def test_the_outputs_of_layers_are_matched_each_token_by_its_own_size(pair):
    student, teacher = pair
    with torch.no_grad():
        found, expected = (model(IDS[:3], output_hidden_states=True).hidden_states for model in pair)
    error = relative_error(found[1:], expected[1:])
    assert error > 0 and torch.equal(found[0], expected[0])
    results = []
    for loss_of in (whole_loss, sliced_loss):
        without = sum(loss_of(student, teacher, IDS[:3])).item()
        loss = sum(loss_of(student, teacher, IDS[:3], Terms(match_hidden=3.0)))
        loss.backward()
        assert loss.item() - without == pytest.approx(3 * error, rel=1e-3)
        results.append(gradients(student))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["match_hidden", "match_attention"])
def test_only_what_counts_is_matched(pair, name):
    """Weights on one sequence's tokens: the errors of the other have no part in it."""
    student, teacher = pair
    weights = torch.zeros(IDS[:2].shape)
    weights[0, 3:9] = 1 / 6
    for loss_of in (whole_loss, sliced_loss):
        alone = loss_of(student, teacher, IDS[:1], Terms(**{name: 3.0}), weights[:1])[1]
        beside = loss_of(student, teacher, IDS[:2], Terms(**{name: 3.0}), weights)[1]
        everywhere = loss_of(student, teacher, IDS[:2], Terms(**{name: 3.0}))[1]
        assert beside.item() == pytest.approx(alone.item(), rel=1e-5) != pytest.approx(everywhere.item(), rel=1e-3)


def attention_outputs(model, ids):
    """What each attention block adds to the stream: its layer's outputs, its MLP taken away, less its inputs."""
    stream, found = model.model.embed_tokens(ids), []
    states = model(ids, output_hidden_states=True).hidden_states
    for index, layer in enumerate(model.model.layers):
        positions = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(stream, positions)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        normed = layer.input_layernorm(states[index])
        found.append(layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0])
        behind = states[index] + found[-1]
        following = behind + layer.mlp(layer.post_attention_layernorm(behind))
        if index + 1 < len(model.model.layers):  # the last state is behind the final norm
            torch.testing.assert_close(following, states[index + 1], rtol=1e-4, atol=1e-5)
    return found


def hooks(*models):
    return sum(len(layer.self_attn._forward_hooks) for model in models for layer in model.model.layers)


def test_the_outputs_of_attention_are_matched_each_token_by_its_own_size(pair):
    student, teacher = pair
    with torch.no_grad():
        found, expected = (attention_outputs(model, IDS[:4]) for model in pair)
    error = relative_error(found, expected)
    assert error > 0
    results, before = [], hooks(*pair)
    for loss_of in (whole_loss, sliced_loss):
        without = sum(loss_of(student, teacher, IDS[:4])).item()
        loss = sum(loss_of(student, teacher, IDS[:4], Terms(match_attention=3.0)))
        loss.backward()
        assert loss.item() - without == pytest.approx(3 * error, rel=1e-3)
        results.append(gradients(student))
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    for micro in (4, 1):  # of four sequences: at once, and one after the other
        for ids in IDS[:4].split(micro):
            (sum(sliced_loss(student, teacher, ids, Terms(match_attention=3.0))) * micro / 4).backward()
        results.append(gradients(student))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, gradient in results[0].items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-6)
    assert hooks(*pair) == before


def test_attention_that_cannot_be_told_is_a_sentence(pair, monkeypatch):
    monkeypatch.setattr(losses, "_ATTENTION", ("mixer",))
    with pytest.raises(RequestError, match="of a LlamaForCausalLM cannot be told: leave `match_attention`"):
        sliced_loss(*pair, IDS[:2], Terms(match_attention=1.0))


def gradients(student):
    found = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    return found


def test_the_loss_in_slices_is_the_plain_loss_with_the_same_gradients(pair):
    student, teacher = pair
    results = []
    for loss_of in (whole_loss, sliced_loss):
        loss = sum(loss_of(student, teacher, IDS[:3]))
        (3 * loss).backward()
        results.append((loss.item(), gradients(student)))
    (whole, expected), (sliced, found) = results
    assert sliced == pytest.approx(whole, rel=1e-5)
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-7)


def test_logits_that_the_head_alone_does_not_make_are_made_by_the_model(pair):
    student, _ = pair
    assert head_alone_makes_logits(student, IDS[:1])
    hook = student.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits / 2))
    assert not head_alone_makes_logits(student, IDS[:1])
    hook.remove()
    student.lm_head.weight.requires_grad_(True)
    assert not head_alone_makes_logits(student, IDS[:1])
