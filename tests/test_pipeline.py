import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from letters import character_tokenizer, tiny_llama
from tiny import contents, stock_checkpoint

from mea_compress import healing
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.cli import cli
from mea_compress.errors import RequestError
from mea_compress.pipeline import run, validate
from mea_compress.recipe import Recipe

QUICK = "kv_ratio: 0.5\nfit: weights\nkey_composition: head\nvalue_composition: head\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a checkpoint in models/SRC and a quick recipe."""
    (tmp_path / "models").mkdir()
    stock_checkpoint(tmp_path / "models" / "SRC")
    (tmp_path / "quick.yaml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words):
    outcome = CliRunner().invoke(cli, [str(word) for word in words])
    return outcome.exit_code, outcome.stdout, outcome.stderr


class TestWhereTo:
    def test_beside_the_source_and_called_after_the_recipe(self, place):
        status, shown, _ = command("run", "quick.yaml", "--set", "source=models/SRC")
        assert status == 0 and str(place / "models" / "SRC-quick") in shown
        first = contents(place / "models" / "SRC-quick")
        shutil.rmtree(place / "models" / "SRC-quick")
        assert run("quick.yaml", source="models/SRC/", progress=False).compression.out == place / "models" / "SRC-quick"
        assert contents(place / "models" / "SRC-quick") == first

    def test_of_a_recipe_without_a_name(self, place, monkeypatch):
        monkeypatch.chdir(place / "models" / "SRC")
        result = run(Recipe(kv_ratio=0.5, fit="weights"), source=".", progress=False)
        assert result.compression.out == place / "models" / "SRC-compressed"
        with pytest.raises(RequestError, match="already exists"):
            run(Recipe(kv_ratio=0.5, fit="weights"), source=".", progress=False)

    def test_an_out_that_is_named_wins(self, place):
        (place / "r.yaml").write_text("extends: quick.yaml\nout: there\n")
        assert run("r.yaml", source="models/SRC", progress=False).compression.out == place / "there"
        assert run("r.yaml", source="models/SRC", out="here", progress=False).compression.out == place / "here"


def test_changes_win_over_the_recipe(place):
    status, shown, _ = command(
        "run", "quick.yaml", "--source", "models/SRC", "--set", "kv_ratio=0.25", "--set", "out=Q", "--json", "-"
    )
    cache = json.loads(shown)["plan"]["kv_bytes_per_token"]
    assert status == 0 and 4 * cache["after"] == cache["before"] and (place / "Q").is_dir()
    status, _, told = command("run", "quick.yaml", "--source", "models/SRC", "--set", "kv_ration=1")
    assert status == 2 and "--set names the unknown key kv_ration" in told
    status, _, told = command("run", "quick.yaml", "--source", "models/SRC", "--set", "source=b")
    assert status == 2 and "give one" in told


@pytest.mark.slow
def test_an_interrupted_healing_goes_on(tmp_path, monkeypatch):
    """And what comes after it may be asked for otherwise: a mistake there does not cost the work before."""
    tiny_llama(num_key_value_heads=4).save_pretrained(tmp_path / "SRC")
    character_tokenizer().save_pretrained(tmp_path / "SRC")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    measured = f"{{text: {tmp_path / 'text.txt'}, sequence_length: 16}}"
    (tmp_path / "r.yaml").write_text(
        f"{QUICK}heal: {{steps: 2, batch_size: 2, sequence_length: 16, text: {tmp_path / 'text.txt'}}}\n"
        f"evaluate: {measured}\n"
    )

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    places = {"source": tmp_path / "SRC", "out": tmp_path / "OUT", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(healing, "distil", interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(tmp_path / "r.yaml", **places)
    assert not (tmp_path / "OUT" / "healing.json").exists()
    with monkeypatch.context() as patch:  # when all is in place, and what it was made in is still there
        patch.setattr(Workspace, "discard", interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(tmp_path / "r.yaml", resume=True, **places)
    assert json.loads((tmp_path / "OUT" / "healing.json").read_text())["steps"] == 2
    result = run(tmp_path / "r.yaml", resume=True, **places, **{"evaluate.limit": 3})
    assert result.healing is None and result.evaluation.tokens == 3 * 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "SRC", "r.yaml", "text.txt"]
    assert run(tmp_path / "r.yaml", resume=True, **places, **{"heal.seed": 0}).healing is None
    for changes, differ in (
        ({"heal.steps": 3, "heal.train": "compositions, attention"}, "steps, train"),
        ({"heal.seed": 1, "heal.learning_rate": 0.1}, "seed, learning_rate"),
        ({"heal": {"steps": 2, "sequence_length": 16}}, "text"),
    ):
        with pytest.raises(RequestError, match=f"another {differ} than .*another `out`, or .* mea-compress heal"):
            run(tmp_path / "r.yaml", resume=True, **places, **changes)
    with pytest.raises(RequestError, match="made by another recipe"):
        run(tmp_path / "r.yaml", resume=True, seed=7, **places)


def test_a_recipe_in_python_says_how_much_to_keep_too(place):
    with pytest.raises(RequestError, match="nothing says how much of the cache to keep"):
        run(Recipe(fit="weights"), source="models/SRC", progress=False)


class TestValidate:
    def test_a_sentence_for_each_and_the_exit_status(self, place):
        (place / "wrong.yaml").write_text("extends: quick.yaml\nkv_ratio: 3\n")
        status, shown, told = command("validate", "quick.yaml", "paper-half")
        assert (status, told) == (0, "") and shown == "quick.yaml is valid\npaper-half is valid\n"
        status, shown, told = command("validate", "quick.yaml", "wrong.yaml", "nowhere.yaml")
        assert status == 2 and "2 of 3" in told
        good, wrong, missing = shown.splitlines()
        assert good == "quick.yaml is valid" and "kv_ratio in wrong.yaml" in wrong and "nowhere.yaml" in missing

    def test_it_refuses_what_run_would(self, place):
        for lines in ("text: nowhere.txt\n", "layers: 7\n", "source: nowhere\n", "evaluate: {text: nowhere.txt}\n"):
            (place / "r.yaml").write_text(f"extends: quick.yaml\n{lines}")
            settings = {} if "source" in lines else {"source": "models/SRC"}
            (sentence,) = validate("r.yaml", **settings).recipes.values()
            assert validate("r.yaml", **settings).faults == ("r.yaml",)
            with pytest.raises(RequestError) as caught:
                run("r.yaml", progress=False, **settings)
            assert str(caught.value) == sentence
        assert [path.name for path in Path("models").iterdir()] == ["SRC"]

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            ("heal: {train: atention}", "in heal of r.yaml, `train` atention is unknown: use"),
            ("heal: {train: lora}", "`train` lora needs peft"),
            ("heal: {steps: 1, train: 'attention,all'}", "`steps` 1 cannot be shared out to 2 stages"),
            ("heal: {answers_only: true}", "`answers_only` needs conversations"),
            ("heal: {top_logits: 64}", "no part of a vocabulary of 64"),
            ("heal: {sequence_length: 300}", "`sequence_length` 300 is longer than the model's context of 256"),
            ("heal: {batch_size: 4}", "`batch_size` 4 cannot be shared out to 3 processes"),
            ("evaluate: {tasks: piqa}", "in evaluate of r.yaml, `tasks` needs lm-evaluation-harness"),
            ("evaluate: {text: t.txt, task_dir: tasks}", "`task_dir` measures nothing without `tasks`"),
            ("evaluate: {text: t.txt, batches: 2}", "`batches` 2 measures nothing without `contexts`"),
            ("evaluate: {text: t.txt, sequence_length: 300}", "`sequence_length` 300 is longer"),
            ("evaluate: {text: t.txt, retrieval: 300}", "`retrieval` 300 is longer than the model's context of 256"),
            ("evaluate: {text: t.txt, contexts: 300}", "`contexts` 300 cannot be measured"),
        ],
    )
    def test_what_healing_and_measuring_would_refuse_is_refused_before_any_work(self, lines, said, place, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest)
        )
        monkeypatch.setenv("WORLD_SIZE", "3" if "batch_size" in lines else "1")
        (place / "t.txt").write_text("the quick brown fox")
        (place / "r.yaml").write_text(f"extends: quick.yaml\n{lines}\n")
        (sentence,) = validate("r.yaml", source="models/SRC").recipes.values()
        assert said in sentence
        with pytest.raises(RequestError) as caught:
            run("r.yaml", source="models/SRC", progress=False)
        assert str(caught.value) == sentence
        assert [path.name for path in Path("models").iterdir()] == ["SRC"]
        allowed = any(number in said for number in ("64", "300"))  # for all that is known without a checkpoint
        assert (validate("r.yaml").faults == ()) == allowed

    def test_with_a_source_it_says_what_is_kept(self, place):
        status, shown, _ = command(
            "validate", "quick.yaml", "--source", "models/SRC", "--set", "kv_ratio=0.25", "--json", "-"
        )
        assert status == 0
        (one,) = json.loads(shown)["recipes"]
        assert one == {
            "recipe": "quick.yaml",
            "valid": True,
            "sentence": "quick.yaml is valid: 25 % of the cache of models/SRC",
        }
