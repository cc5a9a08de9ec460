"""Distillation behind the fit: what it gains, what it leaves alone, what it shares, and that a stop changes nothing."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from letters import character_tokenizer, tiny_llama
from safetensors.torch import load_file
from tiny import CASES, contents, stock_checkpoint
from transformers import AutoModelForCausalLM

from mea_compress.checkpoint.workspace import open_workspace
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.fit import healing, layers
from mea_compress.loading import load_model
from mea_compress.planning import decisions
from mea_compress.planning.plans import make_plan
from mea_compress.recipe import Recipe
from mea_compress.text.sampling import sample_sequences
from mea_compress.training.settings import DistillationSettings

QUICK = {"sequence_length": 32, "sequences": 24, "kv_ratio": 0.5, "budget": "uniform", "refine": 0}


def run(source, out, **changes):
    return compress(source, out, recipe=Recipe(**{**QUICK, **changes}), progress=False)


def kl(source, out):
    """KL(original ‖ compressed) on text that the original says and nobody was trained on, in plain PyTorch."""
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, out)]
    ids = sample_sequences(models[0], None, 48, 32, seed=9, progress=False)
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
def test_it_lowers_the_divergence_and_says_by_how_much(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    run(source, tmp_path / "closed", sequences=128, heal=0)
    result = run(source, tmp_path / "healed", sequences=128)
    assert kl(source, tmp_path / "healed") < 0.9 * kl(source, tmp_path / "closed")
    told = json.loads((tmp_path / "healed" / "compression.json").read_text())["fidelity"]["healing"]
    assert told == result.fidelity["healing"] and told["kept"] == "healed" and told["sequences"] == 128
    assert told["kl_after"] < told["kl_before"] == pytest.approx(told["curve"][0][1], rel=1e-4)
    assert told["steps"] == told["curve"][-1][0] == 3 * 128 // 16 == result.plan.decisions.healing_steps
    for shown in ((tmp_path / "healed" / "README.md").read_text(), result.report()):
        assert "healing kl after" in shown
    assert "healing" not in json.loads((tmp_path / "closed" / "compression.json").read_text())["fidelity"]


def test_the_rest_of_the_model_stays_as_it_was(tmp_path):
    source = stock_checkpoint(tmp_path / "src", "qwen3")
    before = load_file(source / "model.safetensors")
    for name, heal in (("closed", 0), ("healed", 6)):
        run(source, tmp_path / name, layers="1", heal=heal)
    closed, healed = (load_file(tmp_path / name / "model.safetensors") for name in ("closed", "healed"))
    changed = {name for name in healed if not torch.equal(healed[name], closed[name])}
    attention = "model.layers.1.self_attn."
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "key_composition", "value_composition")
    assert changed == {f"{attention}{part}.weight" for part in parts}
    assert all(torch.equal(healed[name], tensor) for name, tensor in before.items() if attention not in name)


def test_kept_heads_and_groups_stay(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    pruned = {"key_composition": "prune", "value_composition": "share", "split": "even"}
    for name, heal in (("closed", 0), ("healed", 6)):
        run(source, tmp_path / name, **pruned, heal=heal)
        run(source, tmp_path / f"{name}-groups", kv_groups=2, heal=heal)
    closed, healed = (load_file(tmp_path / name / "model.safetensors") for name in ("closed", "healed"))
    kept = "model.layers.0.self_attn."
    for name in ("k_proj.weight", "value_composition.weight"):
        assert torch.equal(closed[kept + name], healed[kept + name])
    assert not torch.equal(closed[kept + "key_composition.weight"], healed[kept + "key_composition.weight"])
    closed, healed = (load_file(tmp_path / f"{name}-groups" / "model.safetensors") for name in ("closed", "healed"))
    blocks = {  # which groups of heads a component is read by
        "key_composition.weight": lambda weight: weight.ne(0).any(0).unflatten(-1, (2, 2)).any(-1),
        "value_composition.weight": lambda weight: weight.ne(0).unflatten(0, (2, -1)).any(1).mT,
    }
    for name, read_by in blocks.items():
        before, after = closed[kept + name], healed[kept + name]
        assert not torch.equal(before, after) and torch.equal(read_by(before), read_by(after))
        assert set(read_by(after).sum(-1).tolist()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["aligned", "weights"])
@pytest.mark.parametrize("case", CASES)
def test_the_student_is_the_checkpoint_to_be_and_shares_the_rest(case, fit, tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src", case)
    seen = []

    def stop(student, teacher, training, held_out, *_, **__):
        ids = torch.arange(3, 27).view(2, 12)
        with torch.no_grad():
            seen.append((student(ids, use_cache=False).logits, teacher(ids, use_cache=False).logits, ids))
        for name, weight in teacher.named_parameters():
            if "self_attn" not in name:
                assert student.get_parameter(name) is weight and not weight.requires_grad
        trained = {name.rpartition("self_attn.")[2] for name, w in student.named_parameters() if w.requires_grad}
        assert {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"} <= trained
        raise KeyboardInterrupt

    monkeypatch.setattr(healing, "distil", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "stopped", fit=fit, heal=4)
    run(source, tmp_path / "out", fit=fit, heal=0)
    ((student, teacher, ids),) = seen
    with torch.no_grad():
        emitted, original = (load_model(path, None, "cpu")(ids).logits for path in (tmp_path / "out", source))
    torch.testing.assert_close(student, emitted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher, original, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(student, teacher, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["distil", "measure", "write_checkpoint", "write_weights"])
def test_the_same_bytes_after_an_interruption(at, tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src")
    run(source, tmp_path / "whole")
    place = healing if at != "write_weights" else __import__("mea_compress.compression", fromlist=["_"])
    real, calls = getattr(place, at), []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 1 + (at in ("measure", "write_checkpoint")):  # once it was done already
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, at, interrupt)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(source, tmp_path / "out")
    if at == "write_weights":  # what was healed is not healed again
        monkeypatch.setattr(healing, "distil", None)
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", recipe=Recipe(**QUICK), resume=True, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "whole"]


def test_what_does_not_help_is_not_kept(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src")
    run(source, tmp_path / "closed", heal=0)
    monkeypatch.setattr(healing, "DistillationSettings", partial(DistillationSettings, rates=(1e3,)))
    told = run(source, tmp_path / "out", heal=3).fidelity["healing"]
    assert told["kept"] == "unhealed" and told["kl_after"] == told["kl_before"]
    closed, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("closed", "out"))
    assert closed.keys() == kept.keys() and all(torch.equal(closed[name], kept[name]) for name in closed)


def test_time_that_is_over_leaves_the_closed_form(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    run(source, tmp_path / "closed", heal=0)
    assert "healing" not in run(source, tmp_path / "out", heal=1000, time_limit=1e-6).fidelity
    closed, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("closed", "out"))
    assert closed.keys() == kept.keys() and all(torch.equal(closed[name], kept[name]) for name in closed)


def test_when_it_happens_by_itself(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src")

    def steps(**changes):
        return make_plan(source, Recipe(**{**QUICK, "sequences": 10_000, **changes})).decisions.healing_steps

    assert steps(effort="fast") == 0 < steps() < steps(effort="best")
    assert steps(fit="weights") == 0 and steps(kv_ratio=1.0, key_composition="head") > 0
    assert steps(heal=0) == 0 and steps(heal=7, effort="fast") == steps(heal="7", fit="weights") == 7
    assert steps(heal={"steps": 5}) == 0  # by `run`, behind compress
    monkeypatch.setattr(decisions, "memory_bytes", lambda: 1 << 20)
    assert steps() == 0 and steps(heal=7) == 7
    monkeypatch.setattr(decisions, "memory_bytes", lambda: None)
    assert steps() > 0


def test_a_gpu_that_is_too_small_is_not_healed_on(tmp_path, monkeypatch):
    source = stock_checkpoint(tmp_path / "src")
    monkeypatch.setattr(decisions, "memory_bytes", lambda: 1 << 40)
    monkeypatch.setattr(
        decisions, "gpu_bytes", lambda device: {"cpu": None, "auto": 1 << 20, "cuda:0": 1 << 40}[device]
    )
    steps = {
        device: make_plan(source, Recipe(**QUICK, device=device)).decisions.healing_steps
        for device in ("cpu", "auto", "cuda:0")
    }
    assert steps["cpu"] == steps["cuda:0"] > 0 == steps["auto"]


def test_memory_that_runs_out_costs_the_healing_alone(tmp_path, monkeypatch, capsys):
    source = stock_checkpoint(tmp_path / "src")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(healing, "distil", fail)
    fidelity = run(source, tmp_path / "out").fidelity
    assert "healing" not in fidelity and "stays unhealed" in capsys.readouterr().err
    monkeypatch.undo()
    run(source, tmp_path / "closed", heal=0)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "closed"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("left", [-1.0, 0.0, 1e-3])
def test_without_time_no_model_is_loaded(left, tmp_path, monkeypatch, capsys):
    source = stock_checkpoint(tmp_path / "src")
    plan = make_plan(source, Recipe(**QUICK, time_limit=1))
    monkeypatch.setattr(healing, "load_model", lambda *_: pytest.fail("for nothing"))
    with open_workspace(tmp_path / "out", {}, resume=False) as workspace:
        healing.heal_layers(plan, workspace, False, time.monotonic() + left)
        assert "no time is left of 1 minutes to heal in" in capsys.readouterr().err
        (workspace.work / "healing").mkdir()  # what was begun is ended
        with pytest.raises(pytest.fail.Exception):
            healing.heal_layers(plan, workspace, False, time.monotonic() + left)


@pytest.mark.slow
def test_weights_alone_are_healed_where_that_is_asked_for(tmp_path):
    source = stock_checkpoint(tmp_path / "src")
    paper = {"fit": "weights", "key_composition": "head", "value_composition": "head", "sequences": 64}
    assert "healing" not in run(source, tmp_path / "paper", **paper).fidelity
    run(source, tmp_path / "healed", **paper, heal=20)
    assert kl(source, tmp_path / "healed") < 0.7 * kl(source, tmp_path / "paper")


def letters(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "src")
    character_tokenizer().save_pretrained(tmp_path / "src")
    return tmp_path / "src"


def test_text_of_the_recipe_gives_other_sequences_than_calibrate(tmp_path):
    source = letters(tmp_path)
    words = "the quick brown fox jumps over the lazy dog and runs away with seven spoons of sugar in its pockets "
    (tmp_path / "text.txt").write_text("".join(words[i:] + words[:i] for i in range(len(words))) * 2)
    recipe = Recipe(**{**QUICK, "sequences": 20, "text": (str(tmp_path / "text.txt"),), "heal": 4})
    plan = make_plan(source, recipe)
    with open_workspace(tmp_path / "out", {}, False) as workspace:
        tokens = layers.stored_tokens(plan, workspace, False)
    assert len(tokens) == 20 + layers.healing_sequences(plan)
    held_out = layers.held_out_sequences(len(tokens), 32)
    training = healing._training(plan, tokens[:-held_out])
    assert len(training) == 4 * 16 and torch.equal(training, tokens[20:-held_out])
    scarce = make_plan(source, recipe.model_copy(update={"heal": "4000"}))
    with open_workspace(tmp_path / "more", {}, False) as workspace:
        everything = layers.stored_tokens(scarce, workspace, False)
    found = healing._training(scarce, everything[:-5])
    assert len(found) == len(everything) - 5 and torch.equal(found[-20:], everything[:20])


@pytest.mark.slow
def test_what_each_of_several_texts_lost_is_told(tmp_path, capsys):
    source = letters(tmp_path)
    words = "the quick brown fox jumps over the lazy dog and runs away with seven spoons of sugar in its pockets "
    texts = {
        "words.txt": words,
        "letters.txt": "zyxw vuts rqpo nmlk jihg fedc ba ",
        "more.txt": "a bc def ghij klmno pq ",
    }
    for name, line in texts.items():
        (tmp_path / name).write_text("".join(line[i:] + line[:i] for i in range(len(line))) * 3)
    names = tuple(str(tmp_path / name) for name in texts)
    result = run(source, tmp_path / "out", text=names, heal=20)
    told = result.fidelity["healing"]
    by_text = {row["text"]: row for row in told["texts"]}
    assert set(by_text) == set(names) and "warning: all text" not in capsys.readouterr().err
    assert sum(row["tokens"] for row in told["texts"]) == told["held_out_tokens"]
    for moment in ("kl_before", "kl_after"):
        whole = sum(row[moment] * row["tokens"] for row in told["texts"]) / told["held_out_tokens"]
        assert whole == pytest.approx(told[moment], rel=1e-9)
    furthest, closest = (by_text[pick(names, key=lambda name: by_text[name]["kl_after"])] for pick in (max, min))
    times = furthest["kl_after"] / closest["kl_after"]
    assert f"{furthest['text']} loses {times:.1f} times what {closest['text']} does" in result.report()
    # Each text's is what its own sequences give, measured by the emitted checkpoint.
    plan = make_plan(source, result.plan.recipe)
    with open_workspace(tmp_path / "again", {}, False) as workspace:
        tokens, origins = layers.stored_tokens(plan, workspace, False), layers.shared_origins(plan, workspace)
    held_out = layers.held_out_sequences(len(tokens), 32)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "out")]
    ids = tokens[-held_out:][origins[-held_out:] == names.index(furthest["text"])]
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in models)
    assert furthest["kl_after"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_single_text_is_warned_of(tmp_path, capsys):
    source = letters(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    recipe = Recipe(**{**QUICK, "text": (str(tmp_path / "text.txt"),), "heal": 0})
    layers.calibration_tokens(make_plan(source, recipe), False)
    assert f"warning: all text is {tmp_path / 'text.txt'}" in capsys.readouterr().err


def test_one_sequence_holds_none_out(tmp_path):
    source = letters(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog")
    text = {"text": (str(tmp_path / "text.txt"),), "sequences": 1}
    with pytest.raises(RequestError, match="`heal` 0"):
        run(source, tmp_path / "out", **text, heal=3, fit="weights")
    assert "healing" not in run(source, tmp_path / "out", **text, sequence_length=32).fidelity
