import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from letters import character_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

from mea_compress import healing
from mea_compress.checkpoint import CheckpointReader, workspace
from mea_compress.compression import compress
from mea_compress.emit.healed import names_in_model, publish_healed
from mea_compress.errors import DiskFullError, RequestError
from mea_compress.healing import HealingResult, heal
from mea_compress.layers import runner
from mea_compress.measure.evaluation import evaluate
from mea_compress.training import losses, trainer
from mea_compress.training.settings import MATCH_HIDDEN, DistillationSettings
from mea_compress.training.trials import rate_of_run


@pytest.fixture
def teacher(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "teacher")
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def publish(student: Path, out: Path, changed: dict[str, torch.Tensor], result: HealingResult) -> None:
    reader = CheckpointReader(student)
    publish_healed(reader, out, names_in_model(reader), changed, result.to_json())


def make_student(directory: Path, dtype=torch.float32, **how) -> Path:
    """The teacher with damaged key and value projections, and files of other kinds beside the weights."""
    model = tiny_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight += 0.3 * torch.randn_like(projection.weight)
    model.to(dtype).save_pretrained(directory, **how)
    character_tokenizer().save_pretrained(directory)
    (directory / "compression.json").write_text("{}")
    (directory / "code").mkdir()
    (directory / "code/modeling.py").write_text("pass\n")
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


CURVE = {"steps": 20, "batch_size": 4, "learning_rate": None}
SETTINGS = {"steps": 40, "batch_size": 8, "device": "cpu", "progress": False, "learning_rate": 1e-2}


def test_healing_in_place_lowers_the_divergence(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    before, original = files(student), files(teacher)
    result = heal(student, teacher=teacher, **SETTINGS)

    assert result.kept == "healed" and result.kl_after < 0.7 * result.kl_before
    after = files(student)
    assert set(after) == set(before) | {"healing.json", "healing.png"} and after["healing.png"].startswith(b"\x89PNG")
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    assert files(teacher) == original
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]

    record = json.loads(after["healing.json"])
    assert len(record["losses"]) == 40 and min(record["losses"][20:]) < record["losses"][0]
    assert record["tokens"] == 40 * 8 * 32 and record["kl_after"] == result.kl_after
    assert record["versions"]["torch"] and "out" not in record

    damaged, healed = tiny_llama().state_dict(), weights(student)
    for name, tensor in healed.items():
        assert torch.equal(tensor, damaged[name]) != ("self_attn" in name), name

    # Measured by the other road, on text that healing has not seen.
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 5)
    make_student(tmp_path / "unhealed")
    kl = [
        evaluate(tmp_path / name, text=tmp_path / "text.txt", reference=teacher, device="cpu", progress=False).kl
        for name in ("unhealed", "student")
    ]
    assert kl[1] < kl[0]


def test_logits_are_made_of_a_sequence_at_a_time(tmp_path, teacher, monkeypatch):
    student, seen = make_student(tmp_path / "student"), []
    sliced = losses.sliced_loss
    monkeypatch.setattr(losses, "sliced_loss", lambda *a: (seen.append(a[3]), sliced(*a))[1])
    monkeypatch.setattr(losses, "whole_loss", lambda *a: pytest.fail("of all of them at once"))
    heal(student, teacher=teacher, match_attention=0.5, top_logits=8, **SETTINGS | {"steps": 2})
    assert [terms.top_logits for terms in seen] == [8, 8]
    assert [terms.match_attention / terms.match_hidden for terms in seen] == pytest.approx([0.5 / MATCH_HIDDEN] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_a_teacher_is_not_run_in_products_that_a_processor_imitates(dtype, products, tmp_path, teacher, monkeypatch):
    """In 16 bits on a CPU that is made for float32 alone, a teacher's pass takes several times as long."""
    tiny_llama().to(dtype).save_pretrained(tmp_path / "half")
    character_tokenizer().save_pretrained(tmp_path / "half")
    student, seen, distil = make_student(tmp_path / "student", dtype), [], healing.distil

    def watched(model, original, *args):
        assert original.model.rotary_emb.inv_freq.dtype == torch.float32
        seen.append((original.dtype, args[2].products))
        return distil(model, original, *args)

    for module in (healing, runner):
        monkeypatch.setattr(
            module, "fast_products", lambda stored, device: products if stored == torch.bfloat16 else torch.float32
        )
    monkeypatch.setattr(healing, "distil", watched)
    heal(student, teacher=tmp_path / "half", **SETTINGS | {"steps": 2})
    taken = products if dtype == torch.bfloat16 else torch.float32
    assert seen == [(taken, taken)]


def test_tokens_are_those_that_were_trained_on(tmp_path, teacher, monkeypatch):
    """The last step of every pass over the text has what is left of it, and so has a step of more than all of it."""
    seen, forward = [], losses.DistillationLoss.forward
    monkeypatch.setattr(
        losses.DistillationLoss,
        "forward",
        lambda self, **given: (seen.append(given["input_ids"].numel()), forward(self, **given))[1],
    )
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    for batch, rate in ((4, 1e-2), (4, None), (64, 1e-2)):
        seen.clear()
        options = {"text": tmp_path / "text.txt", "batch_size": batch, "steps": 7, "learning_rate": rate}
        student = make_student(tmp_path / f"student-{batch}-{rate}")
        result = heal(student, teacher=teacher, **SETTINGS | options)
        steps = result.stages[0].all_steps
        assert result.tokens == sum(seen) < steps * batch * 32


def test_a_large_seed_is_a_seed(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    assert heal(student, teacher=teacher, **SETTINGS | {"steps": 2, "seed": (1 << 63) - 1}).steps == 2


@pytest.mark.parametrize("in_place", [True, False])
def test_a_stop_behind_the_last_step_is_taken_up_to_what_is_there(in_place, tmp_path, teacher, monkeypatch):
    student = make_student(tmp_path / "student")
    out = None if in_place else tmp_path / "out"
    place, discard = out or student, workspace.Workspace.discard

    def stop(self):
        shutil.rmtree(self.work / "text")
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace.Workspace, "discard", stop)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        heal(student, teacher=teacher, out=out, **SETTINGS | CURVE)
    monkeypatch.setattr(workspace.Workspace, "discard", discard)
    before = files(place)
    with monkeypatch.context() as nothing_to_do:
        nothing_to_do.setattr(healing, "load_model", lambda *_: pytest.fail("it is done"))
        result = heal(student, teacher=teacher, out=out, resume=True, **SETTINGS | CURVE)
    assert files(place) == before and not place.with_name(place.name + ".partial").exists()
    record = json.loads((place / "healing.json").read_text())
    assert json.loads(json.dumps(result.to_json())) == {n: v for n, v in record.items() if n != "versions"} | {
        "out": str(place)
    }
    assert isinstance(result.stages[0], healing.HealingStage) and result.report()
    assert heal(place, teacher=teacher, resume=True, **SETTINGS | {"steps": 1}).steps == 1  # which is another


def test_same_seed_same_bytes_elsewhere(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    untouched = files(student)
    state = torch.get_rng_state()
    short = SETTINGS | {"steps": 4}
    heal(student, teacher=teacher, out=tmp_path / "one", **short)
    heal(student, teacher=teacher, out=tmp_path / "two", **short)
    heal(student, teacher=teacher, out=tmp_path / "three", seed=1, **short)
    assert torch.equal(torch.get_rng_state(), state)
    assert files(student) == untouched
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_shards_names_and_dtypes_stay(tmp_path, teacher):
    student = make_student(tmp_path / "student", torch.bfloat16, max_shard_size="6KB")
    before, names = weights(student), sorted(path.name for path in student.iterdir())
    assert len(list(student.glob("*.safetensors"))) > 1
    heal(student, teacher=teacher, **SETTINGS)
    after = weights(student)
    assert sorted(path.name for path in student.iterdir()) == sorted([*names, "healing.json", "healing.png"])
    assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(before, torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(student).dtype == torch.bfloat16
    assert not torch.equal(
        after["model.layers.1.self_attn.k_proj.weight"], before["model.layers.1.self_attn.k_proj.weight"]
    )


def test_everything_can_be_trained_on_given_text(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    before = weights(student)
    result = heal(student, teacher=teacher, text=tmp_path / "text.txt", train="all", sequence_length=16, **SETTINGS)
    assert result.text == "text.txt" and result.kl_after < result.kl_before
    changed = [name for name, tensor in weights(student).items() if not torch.equal(tensor, before[name])]
    assert "lm_head.weight" in changed and "model.layers.0.mlp.up_proj.weight" in changed


def composed_student(directory: Path, teacher: Path) -> Path:
    settings = {"kv_ratio": 0.5, "fit": "weights", "key_composition": "head", "value_composition": "head"}
    compress(teacher, directory, progress=False, **settings)
    return directory


def changed_between(before: dict, after: dict) -> set[str]:
    return {".".join(name.split(".")[3:]) for name in after if not torch.equal(before[name], after[name])}


COMPOSITIONS = {"self_attn.key_composition.weight", "self_attn.value_composition.weight"}


@pytest.mark.parametrize(
    ("train", "learnt"),
    [
        ("compositions", COMPOSITIONS),
        (["compositions", "components"], COMPOSITIONS | {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}),
    ],
)
def test_stages_train_few_weights_first(train, learnt, tmp_path, teacher):
    student = composed_student(tmp_path / "student", teacher)
    before = weights(student)
    result = heal(student, teacher=teacher, out=tmp_path / "out", train=train, **SETTINGS | {"steps": 21})
    assert result.kl_after < result.kl_before
    assert changed_between(before, weights(tmp_path / "out")) == learnt
    stages = json.loads((tmp_path / "out" / "healing.json").read_text())["stages"]
    assert ",".join(stage["train"] for stage in stages) == result.train
    assert sum(stage["steps"] for stage in stages) == 21 == result.curve[-1][0]
    assert [step for step, _ in result.curve] == sorted({step for step, _ in result.curve})
    assert result.tokens == 21 * 8 * 32


def test_a_stage_with_adapters_changes_the_rest_and_leaves_nothing_of_them(tmp_path, teacher):
    pytest.importorskip("peft")
    student = composed_student(tmp_path / "student", teacher)
    before = weights(student)
    result = heal(student, teacher=teacher, out=tmp_path / "out", train="attention,lora", **SETTINGS)
    after = weights(tmp_path / "out")
    assert result.kl_after < result.kl_before and before.keys() == after.keys()
    changed = changed_between(before, after)
    assert {"mlp.up_proj.weight", "mlp.down_proj.weight", "self_attn.q_proj.weight"} <= changed
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & changed
    assert result.trained_parameters > sum(w.numel() for name, w in after.items() if "self_attn" in name)
    # What was merged is what was measured.
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 5)
    found = evaluate(tmp_path / "out", text=tmp_path / "text.txt", reference=teacher, device="cpu", progress=False)
    other = evaluate(student, text=tmp_path / "text.txt", reference=teacher, device="cpu", progress=False)
    assert found.kl < other.kl


def test_stages_go_on_where_they_were_stopped(tmp_path, teacher, monkeypatch):
    student = composed_student(tmp_path / "student", teacher)
    options = SETTINGS | {"teacher": teacher, "train": "compositions,attention", "steps": 20}
    whole = heal(student, out=tmp_path / "whole", **options)
    step, count = trainer._Callback.on_step_end, iter(range(100))

    def stop(self, *arguments, **more):
        if next(count) == 15:
            raise KeyboardInterrupt
        return step(self, *arguments, **more)

    monkeypatch.setattr(trainer._Callback, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        heal(student, out=tmp_path / "out", **options)
    taken = []
    monkeypatch.setattr(
        trainer._Callback, "on_step_end", lambda *args, **more: (taken.append(1), step(*args, **more))[1]
    )
    resumed = heal(student, out=tmp_path / "out", resume=True, **options)
    assert len(taken) < 10 and resumed.curve == whole.curve and resumed.losses == whole.losses
    assert resumed.stages == whole.stages and len(whole.losses) == 20
    assert all(torch.equal(w, weights(tmp_path / "whole")[name]) for name, w in weights(tmp_path / "out").items())


def test_stages_that_cannot_be(tmp_path, teacher, monkeypatch):
    student = make_student(tmp_path / "student")  # a stock one
    before = files(student)
    for train, said in [
        ("compositions", "no weights that compositions would train: use attention"),
        ("attention,most", "`train` most is unknown"),
        ("", "`train`  is unknown"),
    ]:
        with pytest.raises(RequestError, match=said):
            heal(student, teacher=teacher, train=train, **SETTINGS)
    with pytest.raises(RequestError, match="`steps` 1 cannot be shared out to 2 stages"):
        heal(student, teacher=teacher, train="attention,all", **SETTINGS | {"steps": 1})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"`train` lora needs peft, .*pip install 'mea-compress\[peft\]'"):
        heal(student, teacher=teacher, train="lora", **SETTINGS)
    monkeypatch.undo()
    assert files(student) == before


def test_the_card_says_what_the_last_healing_did(tmp_path, teacher, monkeypatch):
    student = composed_student(tmp_path / "student", teacher)
    short = SETTINGS | {"steps": 8}
    first = heal(student, teacher=teacher, **short)
    card = (student / "README.md").read_text()
    assert card.index("## Load it") < card.index("## How it was healed") < card.index("## How it was made")
    assert f"{first.kl_before:.4g}" in card and f"{first.kl_after:.4g}" in card and "sampled from the teacher" in card
    monkeypatch.setattr("mea_compress.emit.healed.has_matplotlib", lambda: False)
    second = heal(student, teacher=teacher, seed=1, **short)
    again = (student / "README.md").read_text()
    assert f"{second.kl_after:.4g}" in again and f"{first.kl_before:.4g}" not in again
    assert again.count("How it was healed") == 1 and not (student / "healing.png").exists()
    section = again.index("## How it was healed")
    assert again[:section] == card[: card.index("## How it was healed")]
    assert again[again.index("## How it was made") :] == card[card.index("## How it was made") :]


@pytest.mark.parametrize("record", ["healing.json", "compression.json"])
def test_what_was_healed_before_takes_the_step_size_that_was_found_then(record, tmp_path, teacher):
    student = make_student(tmp_path / "student")
    quick = {"teacher": teacher, "batch_size": 4, "sequence_length": 24, "progress": False}
    first = heal(student, steps=30, **quick)
    assert first.kept == "healed" and first.stages[0].all_steps > 30  # trials
    if record == "compression.json":
        kept = json.loads((student / "healing.json").read_text())
        (student / "compression.json").write_text(json.dumps({"fidelity": {"healing": kept}}))
        (student / "healing.json").unlink()
    again = heal(student, steps=30, out=tmp_path / "again", **quick)
    assert again.stages[0].all_steps == 30 and again.trial_rate == first.trial_rate
    assert again.relative_rate == rate_of_run(first.trial_rate, 30, DistillationSettings(30, 4))
    shorter = heal(student, steps=20, out=tmp_path / "shorter", **quick)
    assert shorter.stages[0].all_steps > 20
    stages = heal(student, steps=60, out=tmp_path / "stages", train="components,attention", **quick)
    assert all(stage.all_steps > 30 for stage in stages.stages)
    found = '"trial_rate": 0.0005, "steps": 3}'
    adapters = '{"kept": "healed", "train": "lora", ' + found
    for text in ('{"kept": "healed"}', "[]", "{", '{"kept": "unhealed", ' + found, adapters):
        (student / record).write_text(text if record == "healing.json" else f'{{"fidelity": {{"healing": {text}}}}}')
        assert healing._former_healing(student) is None


def test_several_texts_and_what_stands_in_front(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    (tmp_path / "b.jsonl").write_text('"lorem ipsum dolor sit amet"\n' * 40)
    texts = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    result = heal(student, teacher=teacher, text=texts, bos="never", sequence_length=16, **SETTINGS)
    assert result.text == "a.txt, b.jsonl" and result.prefix_ids == () and result.kl_after < result.kl_before
    assert json.loads((student / "healing.json").read_text())["prefix_ids"] == []


CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a ' }}{% endif %}"
)


def test_answers_alone_are_learnt_from(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(student)
    text = tmp_path / "talk.jsonl"
    asked = ["what is it", "who are you", "where to", "how much"]
    talks = [
        [{"role": "user", "content": asked[i % 4]}, {"role": "assistant", "content": "abcdefgh"[i % 5 :]}]
        for i in range(40)
    ]
    text.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    options = SETTINGS | {"text": text, "sequence_length": 24}
    whole = heal(student, teacher=teacher, out=tmp_path / "whole", **options)
    result = heal(student, teacher=teacher, out=tmp_path / "out", answers_only=True, **options)
    assert result.answers_only and result.kl_after < 0.7 * result.kl_before
    assert result.held_out_tokens < 0.7 * whole.held_out_tokens
    assert json.loads((tmp_path / "out" / "healing.json").read_text())["answers_only"] is True
    with pytest.raises(RequestError, match="`answers_only` needs conversations"):
        heal(student, teacher=teacher, answers_only=True, **SETTINGS)
    (tmp_path / "plain.txt").write_text("the quick brown fox " * 40)
    with pytest.raises(RequestError, match="text without messages"):
        heal(student, teacher=teacher, answers_only=True, **options | {"text": tmp_path / "plain.txt"})


def test_text_of_the_teacher_is_sampled_once(tmp_path, teacher, monkeypatch):
    monkeypatch.setenv("MEA_COMPRESS_CACHE", str(tmp_path / "kept"))
    student, short = make_student(tmp_path / "student"), SETTINGS | {"steps": 2}
    first = heal(student, teacher=teacher, out=tmp_path / "one", **short)
    monkeypatch.setattr("mea_compress.healing.sample_sequences", lambda *_, **__: pytest.fail("sampled again"))
    second = heal(student, teacher=teacher, out=tmp_path / "two", **short)
    assert second.curve == first.curve and len(list((tmp_path / "kept").iterdir())) == 1
    assert weights(tmp_path / "one").keys() == weights(tmp_path / "two").keys()
    assert all(torch.equal(w, weights(tmp_path / "two")[name]) for name, w in weights(tmp_path / "one").items())


def test_it_never_ends_worse(tmp_path, teacher, capsys):
    student = make_student(tmp_path / "student")
    before = files(student)
    result = heal(student, teacher=teacher, **SETTINGS | {"steps": 3, "learning_rate": 50.0})
    assert result.kept == "unhealed" and result.kl_after == result.kl_before
    assert weights(student).keys() == weights(teacher).keys()
    after = files(student)
    del after["healing.json"], after["healing.png"]
    assert after == before
    assert "did not help" in capsys.readouterr().err


def test_nothing_on_stdout_and_a_bar_on_stderr(tmp_path, teacher, capsys):
    heal(make_student(tmp_path / "student"), teacher=teacher, **SETTINGS | {"steps": 2, "progress": True})
    captured = capsys.readouterr()
    assert captured.out == "" and "healing" in captured.err and "kl=" in captured.err


def test_a_failure_leaves_the_student_as_it_was(tmp_path, teacher, monkeypatch):
    student = make_student(tmp_path / "student")
    before = files(student)

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("mea_compress.emit.healed.write_shard", fail)
        with pytest.raises(RequestError, match=r"disk full.*student\.partial keeps what is finished"):
            heal(student, teacher=teacher, **SETTINGS | {"steps": 1})
    assert files(student) == before
    assert heal(student, teacher=teacher, resume=True, **SETTINGS | {"steps": 1}).steps == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


@pytest.mark.parametrize("call", ["pwrite", "allocate", "copyfile", "mkdtemp"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_full_disk_is_one_sentence_and_leaves_the_student(call, in_place, tmp_path, teacher, monkeypatch):
    student = make_student(tmp_path / "student")
    before = files(student)
    result = HealingResult(
        student, 1, 1, 1.0, None, "attention", "text", 0, 1, 1, 1.0, 1.0, 1.0, 1.0, (), "healed", 1.0
    )
    name = "model.layers.0.self_attn.k_proj.weight"
    changed = {name: weights(student)[name] + 1}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "allocate":
        monkeypatch.setattr("mea_compress.checkpoint.writer.allocate", lambda *_: errno.ENOSPC)
        monkeypatch.setattr("mea_compress.checkpoint.writer.share_page", lambda *_: False)
    else:
        module = {"pwrite": os, "copyfile": shutil, "mkdtemp": tempfile}[call]
        monkeypatch.setattr(module, call, full)
    out = student if in_place else tmp_path / "out"
    with pytest.raises(DiskFullError, match="disk or quota is full") as refusal:
        publish(student, out, changed, result)
    monkeypatch.undo()
    assert "\n" not in str(refusal.value) and files(student) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]
    publish(student, out, changed, result)
    assert torch.equal(weights(out)[name], changed[name])


def test_what_is_not_trained_is_copied_into_files_of_the_same_names(tmp_path):
    """No index, names and metadata of their own, a dtype that nothing computes with, and other files of all kinds."""
    student, out = tmp_path / "student", tmp_path / "out"
    student.mkdir()
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.float64),
        "a": torch.randn(7).bfloat16(),
        "c": torch.randint(0, 9, (4,), dtype=torch.uint8),
    }
    save_file({"b": tensors["b"], "a": tensors["a"]}, student / "first.safetensors", metadata={"made": "by hand"})
    save_file({"c": tensors["c"]}, student / "second.safetensors")
    for name in (".git/config", "original/model.bin", "config.json", "code/__pycache__/old.pyc"):
        (student / name).parent.mkdir(parents=True, exist_ok=True)
        (student / name).write_text("{}" if name == "config.json" else name)
    before = files(student)
    reader = CheckpointReader(student)
    result = HealingResult(out, 1, 1, 1.0, None, "all", "text", 0, 1, 1, math.inf, 1.0, 1.0, 1.0, (), "healed", 1.0)
    publish(student, out, {"a": torch.arange(7.0).requires_grad_()}, result)
    assert files(student) == before
    after = files(out)
    assert set(after) == set(before) - {"code/__pycache__/old.pyc"} | {"healing.json"}
    assert all(after[name] == before[name] for name in after if name not in ("first.safetensors", "healing.json"))
    healed = CheckpointReader(out)
    assert healed.metadata == reader.metadata
    for name, info in reader.tensors.items():
        assert (healed.info(name).dtype, healed.info(name).shape) == (info.dtype, info.shape)
        assert healed.info(name).file.name == info.file.name
    assert torch.equal(healed.read("b"), tensors["b"])
    assert torch.equal(healed.read("a"), torch.arange(7.0).bfloat16())
    assert json.loads(after["healing.json"])["versions"]["safetensors"]


def test_wrong_requests(tmp_path, teacher, monkeypatch):
    student = make_student(tmp_path / "student")
    with pytest.raises(RequestError, match="own teacher: give the original as `teacher`"):
        heal(student, teacher=student, **SETTINGS)
    with pytest.raises(RequestError, match="exists already"):
        heal(student, teacher=teacher, out=teacher, **SETTINGS)
    with pytest.raises(RequestError, match="choose another place"):
        heal(student, teacher=teacher, out=teacher / "healed", **SETTINGS)
    with pytest.raises(RequestError, match="`steps` 0 with `batch_size` 8 trains nothing"):
        heal(student, teacher=teacher, **SETTINGS | {"steps": 0})
    with pytest.raises(RequestError, match=r"`learning_rate` -1\.0 is not"):
        heal(student, teacher=teacher, **SETTINGS | {"learning_rate": -1.0})
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        with pytest.raises(RequestError, match="`batch_size` 8 cannot be shared out to 3 processes"):
            heal(student, teacher=teacher, **SETTINGS)
    (tmp_path / "short.txt").write_text("a" * 40)
    with pytest.raises(RequestError, match="holds one out"):
        heal(student, teacher=teacher, text=tmp_path / "short.txt", **SETTINGS)
    tiny_llama(vocab_size=40).save_pretrained(tmp_path / "other")
    with pytest.raises(RequestError, match="vocabulary"):
        heal(student, teacher=tmp_path / "other", **SETTINGS)


def test_heads_that_were_kept_stay_kept(tmp_path, teacher):
    settings = {"kv_ratio": 0.5, "fit": "weights", "key_composition": "prune", "value_composition": "share"}
    compress(teacher, tmp_path / "student", progress=False, **settings)
    before = weights(tmp_path / "student")
    assert heal(tmp_path / "student", teacher=teacher, **SETTINGS).kept == "healed"
    after, attention = weights(tmp_path / "student"), "model.layers.0.self_attn."
    changed = {name.removeprefix(attention) for name in after if not torch.equal(before[name], after[name])}
    assert "k_proj.weight" not in changed and "value_composition.weight" not in changed
    assert {"q_proj.weight", "o_proj.weight"} <= changed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "has 3 layers"),
        ({"hidden_size": 32}, "has 32 channels"),
        ({"vocab_size": 40}, "has 40 tokens in its vocabulary"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(changes, said, tmp_path, teacher):
    student = make_student(tmp_path / "student")
    before = files(student)
    tiny_llama(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(RequestError, match=said) as refusal:
        heal(student, teacher=tmp_path / "other", **SETTINGS)
    assert "\n" not in str(refusal.value) and files(student) == before


def test_a_teacher_of_another_family_is_refused(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    for directory, family in ((student, "mistral"), (teacher, "qwen2")):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"model_type": family}))
    with pytest.raises(RequestError, match=r"is a qwen2 and .* a mistral"):
        heal(student, teacher=teacher, **SETTINGS)


KILLED = Path(__file__).with_name("killed_heal.py")


def in_a_process(*command) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.process
def test_what_was_killed_goes_on_to_the_same_curve_and_weights(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    whole = heal(student, teacher=teacher, out=tmp_path / "whole", **SETTINGS | CURVE)
    for kill in (5, 23):  # in the trials, and in the run, behind a checkpoint
        out = tmp_path / f"killed-{kill}"
        stopped = in_a_process(KILLED, student, teacher, out, kill)
        assert stopped.returncode == -9, stopped.stderr[-2000:]
        assert not out.exists() and out.with_name(out.name + ".partial").is_dir()
        with pytest.raises(RequestError, match="--resume"):
            heal(student, teacher=teacher, out=out, **SETTINGS | CURVE)
        with pytest.raises(RequestError, match="the request changed"):
            heal(student, teacher=teacher, out=out, resume=True, **SETTINGS | CURVE | {"steps": 21})
        resumed = in_a_process(KILLED, student, teacher, out, 1000, "--resume")
        assert resumed.returncode == 0, resumed.stderr[-2000:]
        record = json.loads((out / "healing.json").read_text())
        assert [tuple(point) for point in record["curve"]] == [pytest.approx(point) for point in whole.curve]
        assert record["losses"] == [pytest.approx(loss, rel=1e-4) for loss in whole.losses]
        assert record["tokens"] == whole.tokens and record["kept"] == whole.kept == "healed"
        healed, expected = weights(out), weights(tmp_path / "whole")
        for name, tensor in healed.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
        assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_give_the_curve_of_one(tmp_path, teacher):
    student = make_student(tmp_path / "student")
    alone = heal(student, teacher=teacher, out=tmp_path / "alone", **SETTINGS | CURVE)
    launch = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        port(),
    )
    command = (
        "-m",
        "mea_compress",
        "heal",
        student,
        "--teacher",
        teacher,
        "--out",
        tmp_path / "both",
        "--device",
        "cpu",
    )
    done = in_a_process(*launch, *command, "--steps", CURVE["steps"], "--batch-size", CURVE["batch_size"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kl after") == 1  # one of them prints
    record = json.loads((tmp_path / "both" / "healing.json").read_text())
    assert [step for step, _ in record["curve"]] == [step for step, _ in alone.curve]
    for (_, value), (_, expected) in zip(record["curve"], alone.curve, strict=True):
        assert value == pytest.approx(expected, rel=1e-3)
    assert record["kl_after"] == pytest.approx(alone.kl_after, rel=1e-3) and record["tokens"] == alone.tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both", "student", "teacher"]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_what_is_composed_at_its_cache_is_healed_with_its_encoders(tmp_path):
    torch.manual_seed(0)
    sizes = {name: getattr(tiny_llama().config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = Olmo2Config(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Olmo2ForCausalLM(config).save_pretrained(tmp_path / "source")
    character_tokenizer().save_pretrained(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a little model that read one story after another " * 30)
    options = {"text": str(text), "sequences": 16, "sequence_length": 32, "progress": False}
    compress(tmp_path / "source", tmp_path / "half", kv_ratio=0.5, refine=0, **options)
    before = weights(tmp_path / "half")
    result = heal(tmp_path / "half", teacher=tmp_path / "source", out=tmp_path / "healed", text=str(text), **SETTINGS)
    assert result.kept == "healed" and result.kl_after < 0.9 * result.kl_before
    after = weights(tmp_path / "healed")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attn." in name}
    assert {"encoder", "weight"} == {name.rpartition(".")[2] for name in changed if "_composition." in name}
