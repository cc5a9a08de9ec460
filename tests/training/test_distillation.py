"""Distillation: its loss against the plain one, the step size that it finds, and what it keeps."""

import copy
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from tiny import stock_model

from mea_compress.errors import DiskFullError, RequestError
from mea_compress.training import distillation, head_loss
from mea_compress.training.distillation import (
    MATCH_HIDDEN,
    DistillationSettings,
    _head_alone_makes_logits,
    _sliced_loss,
    _whole_loss,
    distil,
    may_keep,
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


@pytest.fixture(params=[5, 1 << 20])
def positions_at_once(request, monkeypatch):
    """How many positions of a sequence have logits at once, of a vocabulary of 64."""
    monkeypatch.setattr(head_loss, "_SLICE_BYTES", 4 * 64 * request.param)


@pytest.mark.parametrize("options", [(2.0, 0.0), (1.0, 0.3), (0.5, 1.0)])
def test_temperature_and_cross_entropy_are_those_of_plain_autograd(pair, options, positions_at_once):
    student, teacher = pair
    temperature, share = options
    results = []
    for loss_of in (_whole_loss, _sliced_loss):
        loss = sum(loss_of(student, teacher, IDS[:3], *options))
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
        loss_of = distillation._Loss(student, teacher, settings, sliced, mean)
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


def test_the_outputs_of_layers_are_matched_each_token_by_its_own_size(pair):
    student, teacher = pair
    with torch.no_grad():
        found, expected = (model(IDS[:3], output_hidden_states=True).hidden_states for model in pair)
    errors = [((a - b).norm(dim=-1) / b.norm(dim=-1)).square() for a, b in zip(found[1:], expected[1:], strict=True)]
    error = float(torch.stack(errors).double().mean())
    assert error > 0 and torch.equal(found[0], expected[0])
    results = []
    for loss_of in (_whole_loss, _sliced_loss):
        without = sum(loss_of(student, teacher, IDS[:3])).item()
        loss = sum(loss_of(student, teacher, IDS[:3], match_hidden=3.0))
        loss.backward()
        assert loss.item() - without == pytest.approx(3 * error, rel=1e-3)
        results.append(gradients(student))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-6)


def watched_losses(monkeypatch):
    """Return what is to hold the weight of layers' outputs, the loss of predictions and what is added, step by step."""
    seen, sliced = [], distillation._sliced_loss

    def watched(*arguments):
        parts = sliced(*arguments)
        seen.append((arguments[-2], *map(float, parts)))
        return parts

    monkeypatch.setattr(distillation, "_sliced_loss", watched)
    return seen


def test_layers_are_matched_less_and_less_and_the_losses_told_are_of_predictions(pair, monkeypatch):
    seen = watched_losses(monkeypatch)
    done = distil(*pair, IDS[:16], IDS[16:], DistillationSettings(10, 8, rates=(0.01,)))
    weights, losses, added = zip(*seen, strict=True)
    assert weights == tuple(MATCH_HIDDEN * distillation._share_of_peak(10, step) for step in range(10))
    assert weights[1] > 0.9 * MATCH_HIDDEN and 0 < weights[-1] < 0.1 * MATCH_HIDDEN and min(added) > 0
    assert done.losses == pytest.approx(losses)


def test_layers_that_a_model_does_not_tell_are_not_matched(pair, monkeypatch):
    forward = type(pair[1]).forward

    def silent(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.hidden_states = None
        return output

    monkeypatch.setattr(type(pair[1]), "forward", silent)
    seen = watched_losses(monkeypatch)
    distil(*pair, IDS[:16], IDS[16:], DistillationSettings(3, 8, rates=(0.01,)))
    assert [(weight, added) for weight, _, added in seen] == [(0, 0)] * 3


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
    errors = [((a - b).norm(dim=-1) / b.norm(dim=-1)).square() for a, b in zip(found, expected, strict=True)]
    error = float(torch.stack(errors).double().mean())
    assert error > 0
    results, before = [], hooks(*pair)
    for loss_of in (_whole_loss, _sliced_loss):
        without = sum(loss_of(student, teacher, IDS[:4])).item()
        loss = sum(loss_of(student, teacher, IDS[:4], match_attention=3.0))
        loss.backward()
        assert loss.item() - without == pytest.approx(3 * error, rel=1e-3)
        results.append(gradients(student))
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    for micro in (4, 1):  # of four sequences: at once, and one after the other
        for ids in IDS[:4].split(micro):
            (sum(_sliced_loss(student, teacher, ids, match_attention=3.0)) * micro / 4).backward()
        results.append(gradients(student))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, gradient in results[0].items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-6)
    assert hooks(*pair) == before


def test_attention_that_cannot_be_told_is_a_sentence(pair, monkeypatch):
    monkeypatch.setattr(distillation, "_ATTENTION", ("mixer",))
    with pytest.raises(RequestError, match="of a LlamaForCausalLM cannot be told: leave `match_attention`"):
        _sliced_loss(*pair, IDS[:2], match_attention=1.0)


@pytest.mark.parametrize("options", [{"top_logits": 16}, {"match_hidden": 0.5}, {"match_attention": 0.5}])
def test_other_losses_heal_too(pair, options):
    student, teacher = pair
    before = measure(student, teacher, IDS[16:]).kl
    settings = DistillationSettings(20, 8, rates=(0.03,), gradient_checkpointing=True, **options)
    distil(student, teacher, IDS[:16], IDS[16:], settings)
    assert measure(student, teacher, IDS[16:]).kl < 0.8 * before


def gradients(student):
    found = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    return found


def test_the_loss_in_slices_is_the_plain_loss_with_the_same_gradients(pair):
    student, teacher = pair
    results = []
    for loss_of in (_whole_loss, _sliced_loss):
        loss = sum(loss_of(student, teacher, IDS[:3]))
        (3 * loss).backward()
        results.append((loss.item(), gradients(student)))
    (whole, expected), (sliced, found) = results
    assert sliced == pytest.approx(whole, rel=1e-5)
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_a_teacher_that_is_measured_by_again_runs_once(pair, products):
    student, teacher = pair
    counted = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    expected = measure(student, teacher, IDS, products, counted)
    kept = may_keep(teacher, IDS, products)
    runs = []
    hook = teacher.model.register_forward_hook(lambda *_: runs.append(None))
    for _ in range(3):
        assert measure(student, teacher, IDS, products, counted, kept) == expected
    hook.remove()
    assert len(runs) == len(kept) > 0


def test_a_teacher_whose_head_is_not_all_is_not_kept(pair):
    _, teacher = pair
    teacher.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits / 2))
    assert may_keep(teacher, IDS, torch.float32) is None


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
    assert len(losses) == done.all_steps
    assert all(weight.dtype == torch.float32 for weight in student.parameters() if weight.requires_grad)


def test_the_full_run_goes_on_from_the_best_trial(pair, monkeypatch):
    student, teacher = pair
    starts, ends, run = [], [], distillation._run

    def watched(model, *args):
        for states in (starts, ends):
            states.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
            if states is starts:
                run(model, *args)

    monkeypatch.setattr(distillation, "_run", watched)
    done = distil(student, teacher, IDS[:16], IDS[16:], DistillationSettings(20, 8, rates=(1e-6, 0.01, 1e3)))
    assert len(starts) == 3  # in the middle, above it, and the full run
    assert done.rate == pytest.approx(0.01 * math.sqrt(20 / (4 * 3)))
    for name, weight in starts[2].items():
        assert torch.equal(weight, ends[0][name]) and torch.equal(starts[1][name], starts[0][name]), name
    assert any(not torch.equal(starts[0][name], weight) for name, weight in starts[2].items())


@pytest.mark.parametrize(("left", "trials"), [(10**6, 2), (7, 1), (0, 0)])
def test_with_little_time_left_steps_are_not_spent_on_trials(left, trials, pair, monkeypatch):
    student, teacher = pair
    monkeypatch.setattr(distillation, "_steps_left", lambda settings, _: min(settings.steps, left))
    settings = DistillationSettings(20, 8, rates=(0.003, 0.01, 0.02), deadline=math.inf)
    done = distil(student, teacher, IDS[:16], IDS[16:], settings)
    assert done.steps == min(20, left)
    assert done.all_steps == done.steps + trials * settings.trial_steps
    assert (done.curve[-1][1] < done.curve[0][1]) == (left > 0)


def test_a_run_that_was_stopped_behind_its_trials_knows_their_pace(pair, tmp_path, monkeypatch):
    student, teacher = pair
    settings = DistillationSettings(2000, 8, rates=(0.003, 0.01, 0.02), deadline=time.monotonic() + 10**6)
    paces, steps_left, trial = [], distillation._steps_left, settings.trial_steps

    def stopped(settings, pace):
        paces.append(copy.copy(pace))
        if pace.steps == 2 * trial:  # one in the middle and one above it
            raise KeyboardInterrupt
        return steps_left(settings, pace)

    monkeypatch.setattr(distillation, "_steps_left", stopped)
    with pytest.raises(KeyboardInterrupt):
        distil(copy.deepcopy(student), teacher, IDS[:16], IDS[16:], settings, state=tmp_path / "state")
    resumed = []
    monkeypatch.setattr(distillation, "_steps_left", lambda settings, pace: resumed.append(copy.copy(pace)) or 5)
    done = distil(student, teacher, IDS[:16], IDS[16:], settings, state=tmp_path / "state")
    assert resumed == paces[-1:] and resumed[0].in_steps > 0 and resumed[0].looks == 2
    assert done.steps == 5 and done.all_steps == 5 + 2 * trial


@pytest.mark.parametrize(
    ("steps", "rate", "taken"),
    [(12, 0.01, 0.01), (80, 0.01, 0.01), (320, 0.01, 0.02), (720, 0.01, 0.03), (9999, 0.01, 0.03), (720, 0.02, 0.05)],
)
def test_a_longer_run_takes_larger_steps_than_its_trials(steps, rate, taken):
    """As the root of its length in fours of a trial, thrice at most, and never above them all."""
    settings = DistillationSettings(9999, 8, rates=(0.01, 0.02, 0.05))
    assert settings.trial_steps == 20
    assert distillation._rate_of_run(rate, steps, settings) == pytest.approx(taken)
    assert distillation._rate_of_run(rate, steps, DistillationSettings(9999, 8, rates=(rate,))) == rate


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


@pytest.mark.parametrize("at", [5, 11, 21])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights_and_curve(pair, at, tmp_path):
    """Stopped in the trials, before the first checkpoint and behind one."""
    student, teacher = pair
    stopped, settings = copy.deepcopy(student), DistillationSettings(20, 8, seed=3)
    whole = distil(student, teacher, IDS[:16], IDS[16:], settings)
    count = iter(range(100))

    def stop(_):
        if next(count) == at:
            raise KeyboardInterrupt

    begun = copy.deepcopy(stopped)
    with pytest.raises(KeyboardInterrupt):
        distil(begun, teacher, IDS[:16], IDS[16:], settings, stop, tmp_path / "state")
    ticks, told = [], []

    def known(steps, done):
        told.append((steps, done - len(ticks)))

    resumed = distil(stopped, teacher, IDS[:16], IDS[16:], settings, ticks.append, tmp_path / "state", known=known)
    assert resumed == whole and 0 < len(ticks) < settings.all_steps
    assert told == [(whole.all_steps, whole.all_steps - len(ticks))]  # the rest was done by the first
    for (name, weight), same in zip(student.state_dict().items(), stopped.state_dict().values(), strict=True):
        assert torch.equal(weight, same), name


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_full_disk_is_one_sentence_whatever_libraries_call_it(library, pair, tmp_path, monkeypatch):
    student, teacher = pair
    room, settings = [], DistillationSettings(20, 8, seed=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room[0]))

    def refuse(*_, **__):
        if library == "torch":
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    place, name = {"safetensors": (distillation, "save_file"), "torch": (torch, "save")}[library]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, refuse)
        room[:] = [0]
        with pytest.raises(DiskFullError, match=r"state: the disk or quota is full"):
            distil(copy.deepcopy(student), teacher, IDS[:16], IDS[16:], settings, state=tmp_path / "state")
        room[:] = [1 << 30]
        if library == "torch":  # which says nothing of a disk: with room left it is something else
            with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
                distil(copy.deepcopy(student), teacher, IDS[:16], IDS[16:], settings, state=tmp_path / "state")
    resumed = distil(copy.deepcopy(student), teacher, IDS[:16], IDS[16:], settings, state=tmp_path / "state")
    assert resumed == distil(student, teacher, IDS[:16], IDS[16:], settings)


def test_gradient_checkpointing_changes_nothing(pair):
    student, teacher = pair
    other = copy.deepcopy(student)
    found = [
        distil(one, teacher, IDS[:16], IDS[16:], DistillationSettings(6, 8, 1e-3, gradient_checkpointing=checkpointing))
        for one, checkpointing in ((student, False), (other, True))
    ]
    assert found[0].curve[-1][1] == pytest.approx(found[1].curve[-1][1], rel=1e-4) != found[0].curve[0][1]
    assert not other.is_gradient_checkpointing


def test_a_single_step_size_needs_no_trial(pair):
    student, teacher = pair
    losses = []
    before = measure(student, teacher, IDS[16:]).kl
    settings = DistillationSettings(6, 8, rates=(0.03,))
    result = distil(student, teacher, IDS[:16], IDS[16:], settings, losses.append)
    assert len(losses) == result.steps == result.all_steps == settings.all_steps == 6
    assert result.rate == 0.03 and result.losses == tuple(losses) and [step for step, _ in result.curve][-1] == 6
    assert measure(student, teacher, IDS[16:]).kl < before


@pytest.mark.parametrize(
    ("values", "tried", "chosen"),
    [
        ((0.9, 0.8, 0.7, 0.6, 0.5), (3, 4, 5), 5),
        ((0.9, 0.8, 0.7, 0.6, 0.9), (3, 4, 5), 4),
        ((0.9, 0.8, 0.7, 1.1, 0.1), (3, 4), 3),  # a larger one that does worse ends it
        ((0.9, 0.8, 1.2, 0.1, 0.1), (3, 2), 2),
        ((0.9, 1.1, math.inf, 0.1, 0.1), (3, 2, 1), 1),
        ((1.1, 1.2, 1.3, 0.1, 0.1), (3, 2, 1), 1),
    ],
)
def test_step_sizes_are_tried_from_the_middle_on(values, tried, chosen):
    rates, progress, order = (1, 2, 3, 4, 5), SimpleNamespace(curve=[(0, 1.0)], found={}), []
    while (rate := distillation._next_rate(rates, progress)) is not None:
        order.append(rate)
        progress.found[str(rate)] = values[rate - 1]
    assert tuple(order) == tried and distillation._choose_rate(rates, progress) == chosen


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"0.1": 0.8, "0.2": 0.85, "0.3": 1.1}, 0.2),  # the largest that gained as good as the most
        ({"0.1": 0.8, "0.2": 0.95, "0.3": 0.99}, 0.1),
        ({"0.1": 1.3, "0.2": 1.2, "0.3": math.inf}, 0.2),  # none gained: the least bad
        ({"0.1": 0.8}, 0.1),  # there was no time for the others
    ],
)
def test_the_largest_step_size_that_gains_enough_is_taken(found, chosen):
    progress = SimpleNamespace(curve=[(0, 1.0)], found=found)
    assert distillation._choose_rate((0.1, 0.2, 0.3), progress) == chosen
