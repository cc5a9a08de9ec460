"""The Trainer of the demonstration: order of rows, learning rate, decay, and what it leaves as it was."""

import functools
import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from mea_compress.demo import training
from mea_compress.demo.training import Size, make_trainer, train

ROWS = 10


def model():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def rows():
    return torch.randint(3, 32, (ROWS, 12), generator=torch.Generator().manual_seed(0))


def trainer(tmp_path, **size):
    return make_trainer(model(), rows(), Size(**size), seed=3, scratch=tmp_path, progress=False)


def test_batches_show_every_row_before_any_again(tmp_path, monkeypatch):
    seen = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def recorded(self, **inputs):
        assert not inputs.get("use_cache") and not self.config.use_cache
        seen.extend(map(tuple, inputs["input_ids"].tolist()))
        return forward(self, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", recorded)
    train(model(), rows(), Size(steps=5, batch_size=4), seed=3, progress=False)
    everything = sorted(map(tuple, rows().tolist()))
    first, second = seen[:ROWS], seen[ROWS:]
    assert sorted(first) == everything and len(second) >= 6
    assert len(set(second)) == len(second) and second != first[: len(second)]


def test_learning_rate_warms_up_and_ends_at_a_tenth(tmp_path):
    made = trainer(tmp_path, steps=200)
    made.create_optimizer_and_scheduler(200)
    rates = []
    for _ in range(200):
        rates.append(made.lr_scheduler.get_last_lr()[0] / made.args.learning_rate)
        made.optimizer.step()
        made.lr_scheduler.step()
    assert rates[0] == pytest.approx(1 / 20) and max(rates) == pytest.approx(1) and rates[199] == pytest.approx(0.1)
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_matrices_decay_and_vectors_do_not(tmp_path):
    made = trainer(tmp_path, steps=2)
    for group in made.create_optimizer().param_groups:
        assert group["params"] and group["betas"] == (0.9, 0.95)
        assert all((parameter.dim() > 1) == (group["weight_decay"] == 0.1) for parameter in group["params"])


def test_training_learns_and_the_same_seed_gives_the_same_weights():
    def loss(trained):
        with torch.no_grad():
            return float(trained(rows(), labels=rows()).loss)

    first, second, other = model(), model(), model()
    size = Size(steps=30, batch_size=4)
    for trained, seed in ((first, 3), (second, 3), (other, 4)):
        train(trained, rows(), size, seed, progress=False)
    assert loss(first) < loss(model()) - 0.1
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not all(map(torch.equal, first.state_dict().values(), other.state_dict().values()))
    assert not first.training and first.config.use_cache


def test_random_states_stay_as_they_were():
    set_seed(11)
    expected = random.random(), np.random.random(), torch.rand(1)
    set_seed(11)
    with pytest.raises(KeyboardInterrupt), training._seeded(5, torch.device("cpu")):
        raise KeyboardInterrupt
    assert (random.random(), np.random.random(), torch.rand(1)) == expected


def test_the_bar_shows_the_loss(capsys):
    train(model(), rows(), Size(steps=3, batch_size=4), seed=3, progress=True)
    printed = capsys.readouterr()
    assert "3/3" in printed.err and "loss=3." in printed.err and printed.out == ""
