"""Distillation: what it gains, keeps and goes on from."""

import copy
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from mea_compress.errors import DiskFullError
from mea_compress.training import distillation, losses, trials
from mea_compress.training.distillation import distil, may_keep, measure
from mea_compress.training.settings import MATCH_HIDDEN, DistillationSettings

IDS = torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(1))


def watched_losses(monkeypatch):
    """Return what is to hold the weight of layers' outputs, the loss of predictions and what is added, step by step."""
    seen, sliced = [], losses.sliced_loss

    def watched(*arguments):
        parts = sliced(*arguments)
        seen.append((arguments[3].match_hidden, *(part.item() for part in parts)))
        return parts

    monkeypatch.setattr(losses, "sliced_loss", watched)
    return seen


def test_layers_are_matched_less_and_less_and_the_losses_told_are_of_predictions(pair, monkeypatch):
    seen = watched_losses(monkeypatch)
    done = distil(*pair, IDS[:16], IDS[16:], DistillationSettings(10, 8, rates=(0.01,)))
    weights, losses, added = zip(*seen, strict=True)
    falling = [MATCH_HIDDEN * (0.05 + 0.475 * (1 + math.cos(math.pi * step / 10))) for step in range(10)]
    assert weights == pytest.approx(falling) and weights[0] == MATCH_HIDDEN and min(added) > 0
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


@pytest.mark.parametrize("options", [{"top_logits": 16}, {"match_hidden": 0.5}, {"match_attention": 0.5}])
def test_other_losses_heal_too(pair, options):
    student, teacher = pair
    before = measure(student, teacher, IDS[16:]).kl
    settings = DistillationSettings(20, 8, rates=(0.03,), gradient_checkpointing=True, **options)
    distil(student, teacher, IDS[:16], IDS[16:], settings)
    assert measure(student, teacher, IDS[16:]).kl < 0.8 * before


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
    starts, ends, run = [], [], distillation.train_student
    settings = DistillationSettings(20, 8, rates=(0.001, 0.01, 1.0))

    def watched(model, *args):
        for states in (starts, ends):
            states.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
            if states is starts:
                run(model, *args)

    monkeypatch.setattr(distillation, "train_student", watched)
    done = distil(student, teacher, IDS[:16], IDS[16:], settings)
    assert len(starts) == 3  # in the middle, above it, and the full run
    assert 0.003 < done.trial_rate <= 0.1001 and done.rate == trials.rate_of_run(done.trial_rate, 20, settings)
    for name, weight in starts[2].items():
        assert torch.equal(weight, ends[0][name]) and torch.equal(starts[1][name], starts[0][name]), name
    assert any(not torch.equal(starts[0][name], weight) for name, weight in starts[2].items())


@pytest.mark.parametrize(("left", "trials"), [(10**6, 2), (7, 1), (0, 0)])
def test_with_little_time_left_steps_are_not_spent_on_trials(left, trials, pair, monkeypatch):
    student, teacher = pair
    monkeypatch.setattr(distillation, "steps_left", lambda settings, _: min(settings.steps, left))
    settings = DistillationSettings(20, 8, rates=(0.003, 0.01, 0.02), deadline=math.inf)
    done = distil(student, teacher, IDS[:16], IDS[16:], settings)
    assert done.steps == min(20, left)
    assert done.all_steps == done.steps + trials * settings.trial_steps
    assert (done.curve[-1][1] < done.curve[0][1]) == (left > 0)


def test_a_run_that_was_stopped_behind_its_trials_knows_their_pace(pair, tmp_path, monkeypatch):
    student, teacher = pair
    settings = DistillationSettings(2000, 8, rates=(0.003, 0.01, 0.02), deadline=time.monotonic() + 10**6)
    paces, steps_left, trial = [], distillation.steps_left, settings.trial_steps

    def stopped(settings, pace):
        paces.append(copy.copy(pace))
        if pace.steps == 2 * trial:  # one in the middle and one above it
            raise KeyboardInterrupt
        return steps_left(settings, pace)

    monkeypatch.setattr(distillation, "steps_left", stopped)
    with pytest.raises(KeyboardInterrupt):
        distil(copy.deepcopy(student), teacher, IDS[:16], IDS[16:], settings, state=tmp_path / "state")
    resumed = []
    monkeypatch.setattr(distillation, "steps_left", lambda settings, pace: resumed.append(copy.copy(pace)) or 5)
    done = distil(student, teacher, IDS[:16], IDS[16:], settings, state=tmp_path / "state")
    assert resumed == paces[-1:] and resumed[0].in_steps > 0 and resumed[0].looks == 2
    assert done.steps == 5 and done.all_steps == 5 + 2 * trial


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
    assert resumed == whole and 0 < len(ticks) < whole.all_steps
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

    place, name = {"safetensors": (trials, "save_file"), "torch": (torch, "save")}[library]
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
