import errno
import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from tiny import stock_checkpoint

from mea_compress.checkpoint.files import refusals
from mea_compress.cli import cli
from mea_compress.errors import DiskFullError, RequestError
from mea_compress.recipe import EvaluateRecipe, HealRecipe, Recipe, builtin_recipes
from mea_compress.report import plots
from mea_compress.report.measurements import evaluation_report
from mea_compress.report.tables import key_value_table

PLAN = {
    "stock_export": {"reason": "this is only a test"},
    "kv_bytes_per_token": {"before": 512, "after": 256},
    "parameters": {"before": 1000, "after": 900},
    "layers": [
        {
            "layer": 0,
            "key_components": 2,
            "value_components": 2,
            "key_composition": "head",
            "value_composition": "head",
            "kv_bytes_per_token": {"before": 512, "after": 256},
        }
    ],
}
EVALUATION = {"tokens": 10, "cross_entropy": 1.0, "perplexity": 2.7, "kl": 0.5, "kv_bytes_per_token": 256.0}


class Calls(list):
    """Stand-ins for the functions that do the work: they note how they were called."""

    def stand_in(self, monkeypatch, module, name, answer):
        def note(*args, **kwargs):
            self.append((name, args, kwargs))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        double = sys.modules.get(f"mea_compress.{module}")
        if not isinstance(double, Double):
            double = Double(f"mea_compress.{module}")
            monkeypatch.setitem(sys.modules, f"mea_compress.{module}", double)
        setattr(double, name, note)


class Double(types.ModuleType):
    pass


def result(data, said="", **more):
    return SimpleNamespace(to_json=lambda *batch: data, report=lambda *batch: said, **more)


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    plan = result(PLAN, "half of it")
    compressed = result({"plan": PLAN, "fidelity": {}}, "Written to OUT", out=Path("OUT"), plan=plan)
    calls.stand_in(
        monkeypatch,
        "planning.plans",
        "inspect_checkpoint",
        result({"family": "llama", "cache_bytes": 2048, "attention": []}, "2 KiB", code=None),
    )
    calls.stand_in(monkeypatch, "planning.plans", "make_plan", plan)
    calls.stand_in(monkeypatch, "compression", "compress", compressed)
    calls.stand_in(monkeypatch, "measure.evaluation", "evaluate", result(EVALUATION, evaluation_report(EVALUATION)))
    calls.stand_in(monkeypatch, "healing", "heal", result({"steps": 3}, key_value_table({"steps": 3})))
    calls.stand_in(monkeypatch, "demo.run", "run_demo", "the table")
    for module in ("healing", "measure.evaluation"):  # of these no call is noted
        sys.modules[f"mea_compress.{module}"].check_settings = lambda **_: None
    return calls


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def done(*arguments):
    outcome = invoke(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def refused(*arguments, status=2):
    outcome = invoke(*arguments)
    assert outcome.exit_code == status, outcome.output
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1, outcome.stderr
    return outcome.stderr


class TestCommands:
    def test_inspect(self, calls, tmp_path):
        assert "2 KiB" in done("inspect", "SRC", "--json", tmp_path / "a.json")
        assert json.loads((tmp_path / "a.json").read_text())["cache_bytes"] == 2048
        assert calls == [("inspect_checkpoint", (Path("SRC"),), {})]

    def test_plan(self, calls):
        text = done("plan", "SRC", "--recipe", "paper-half", "--kv-ratio", "0.25")
        assert text == "half of it\n"
        (_, (source, recipe), _) = calls[0]
        assert source == Path("SRC") and (recipe.kv_ratio, recipe.layers) == (0.25, "half")
        assert json.loads(done("plan", "SRC", "--kv-ratio", "1", "--json", "-")) == PLAN

    def test_compress(self, calls):
        text = done("compress", "SRC", "OUT", "--kv-ratio", 0.5, "--fit", "weights", "--seed", 3, "--resume")
        assert text == "Written to OUT\n"
        recipe = Recipe(kv_ratio=0.5, fit="weights", seed=3)
        assert calls == [("compress", (Path("SRC"), Path("OUT")), {"recipe": recipe, "resume": True})]

    def test_flags_of_earlier_versions(self, calls):
        for words in (["--rotary-budget", "uniform"], ["--rotary-budget=uniform"], ["--rotary-allocation", "uniform"]):
            done("compress", "SRC", "OUT", "--kv-ratio", 0.5, *words)
            assert calls[-1][2]["recipe"] == Recipe(kv_ratio=0.5, rotary_allocation="uniform")

    @pytest.mark.parametrize("command", ["profile", "evaluate", "sweep", "export", "run", "plan"])
    def test_where_a_result_goes_is_looked_at_before_the_work(self, command, calls, tmp_path):
        more = {"evaluate": ["--text", "t.txt"], "sweep": ["--text", "t.txt", "--out", "S"], "export": ["OUT"]}
        message = refused(command, "SRC", *more.get(command, []), "--json", tmp_path / "nowhere" / "result.json")
        assert f"{tmp_path / 'nowhere'} is no directory that this user may write to" in message and calls == []

    def test_a_result_does_not_replace_a_device(self, calls):
        message = refused("inspect", "SRC", "--json", os.devnull)
        assert f"{os.devnull} is no file; name one, or - for standard output" in message and calls == []

    def test_heal(self, calls):
        assert "steps" in done("heal", "OUT", "--teacher", "SRC", "--learning-rate", "1e-4")
        expected = {"steps": HealRecipe().steps, "out": None, "learning_rate": 1e-4, "teacher": Path("SRC")}
        expected |= {"resume": False}
        assert calls == [("heal", (Path("OUT"),), expected)]

    def test_evaluate(self, calls):
        assert "0.5000" in done("evaluate", "CKPT", "--reference", "SRC", "--text", "t.txt", "--batch-size", 4)
        expected = {"text": ("t.txt",), "reference": Path("SRC"), "batch_size": 4}
        assert calls == [("evaluate", (Path("CKPT"),), expected)]
        assert json.loads(done("evaluate", "CKPT", "--text", "t.txt", "--json", "-")) == EVALUATION
        done("evaluate", "A", "B", "--text", "t.txt", "--limit", 2)
        assert calls[-1][1:] == (((Path("A"), Path("B")),), {"text": ("t.txt",), "reference": None, "limit": 2})
        done("evaluate", "A", "--tasks", "arc_easy, piqa", "--task-dir", "D", "--few-shot", 0, "--chat-template")
        tasks = {"tasks": ("arc_easy", "piqa"), "task_dir": Path("D"), "few_shot": 0, "chat_template": True}
        assert calls[-1][2] == {"reference": None, **tasks}
        done("evaluate", "A", "--text", "t.txt", "--retrieval", "512,1024", "--agreement", 8, "--seed", 3)
        more = {"retrieval": (512, 1024), "agreement": 8, "seed": 3}
        assert calls[-1][2] == {"text": ("t.txt",), "reference": None, **more}
        done("evaluate", "CKPT", "--text", "t.txt", "--contexts", "1024,8192", "--batches", 4)
        assert calls[-1][2] == {"text": ("t.txt",), "reference": None, "contexts": (1024, 8192), "batches": (4,)}
        done("evaluate", "CKPT", "--text", "t.txt", "--text", "-", "--bos", "never")
        assert calls[-1][2] == {"text": ("t.txt", "-"), "reference": None, "bos": "never"}

    def test_demo(self, calls):
        assert done("demo", "--steps", 5) == "the table\n"
        assert calls == [("run_demo", (Path("demo"),), {"steps": 5, "device": "auto", "seed": 0})]

    def test_run(self, calls, tmp_path):
        text, source = tmp_path / "t.txt", stock_checkpoint(tmp_path / "SRC")  # whose context is looked at beforehand
        text.write_text("hello")
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            f"source: {source}\nout: A\nkv_ratio: 0.5\nseed: 4\nbos: always\ndevice: cpu\n"
            f"heal: {{steps: 3, text: {text}}}\nevaluate: {{text: {text}, limit: 2}}\n"
        )
        printed = done("run", recipe, "--out", "B", "--json", tmp_path / "all.json")
        assert "KL" in printed
        assert [name for name, _, _ in calls] == ["compress", "heal", "evaluate"]
        assert calls[0][1][:2] == (source, Path("B"))
        shared = {"bos": "always", "device": "cpu", "text": (str(text),), "progress": True}
        healing = {"seed": 4, "steps": 3, "teacher": source, "resume": False} | shared
        assert calls[1][1:] == ((Path("B"),), healing)
        measuring = {"reference": source, "limit": 2} | shared
        assert calls[2][1:] == ((Path("B"),), measuring)
        assert set(json.loads((tmp_path / "all.json").read_text())) == {"plan", "fidelity", "healing", "evaluation"}

    def test_run_looks_before_it_starts(self, calls, tmp_path):
        recipe = tmp_path / "r.yaml"
        recipe.write_text("kv_ratio: 0.5\nevaluate: {text: nowhere.txt}\n")
        assert "--source" in refused("run", recipe)
        assert "nowhere.txt" in refused("run", recipe, "--source", "a", "--out", "b")
        assert calls == []


class TestRecipes:
    def test_list_and_show(self):
        assert done("recipes") == done("recipes", "list")
        for name, path in builtin_recipes().items():
            assert name in done("recipes")
            assert done("recipes", "show", name) == path.read_text()

    def test_copy(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done("recipes", "copy", "paper-half")
        done("recipes", "copy", "paper-half", "sub/mine.yaml")
        original = builtin_recipes()["paper-half"].read_bytes()
        assert Path("paper-half.yaml").read_bytes() == Path("sub/mine.yaml").read_bytes() == original
        assert "exists already" in refused("recipes", "copy", "paper-half")

    def test_a_full_disk_leaves_no_empty_recipe(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        assert "the disk or quota is full" in refused("recipes", "copy", "paper-half", str(tmp_path / "mine.yaml"))
        assert not list(tmp_path.iterdir())

    def test_an_unknown_name(self):
        assert "did you mean paper-half" in refused("recipes", "show", "paper-hlf")


class TestFailures:
    def test_wrong_requests(self, calls):
        assert "'--kv-ratio'" in refused("compress", "A", "B", "--kv-ration", "0.5")
        assert "'compress'" in refused("comprss", "A", "B")
        assert "--kv-ratio" in refused("compress", "A", "B", "--kv-ratio", "half")
        assert "--kv-ratio" in refused("compress", "A", "B", "--kv-ratio", "0")
        assert "--kv-ratio" in refused("compress", "A", "B", "--kv-ratio", "1.5")
        assert "--kv-ratio" in refused("compress", "A", "B")
        assert "--device" in refused("plan", "A", "--kv-ratio", "0.5", "--device", "gpu")
        assert "aligned" in refused("compress", "A", "B", "--kv-ratio", "0.5", "--fit", "best")
        assert "OUT" in refused("compress", "A")
        assert "--teacher" in refused("heal", "A")
        assert "--steps" in refused("heal", "A", "--teacher", "B", "--steps", "0")
        assert "--limit" in refused("evaluate", "A", "--text", "t.txt", "--limit", "-1")
        assert "--text" in refused("evaluate", "A") and "--tasks" in refused("evaluate", "A")
        assert "CKPT" in refused("evaluate", "--text", "t.txt")
        assert "give both" in refused("evaluate", "A", "--text", "t.txt", "--plot", "a.png")
        assert ".png" in refused("evaluate", "A", "--text", "t.txt", "--retrieval", "512", "--plot", "a.txt")
        assert "--retrieval" in refused("evaluate", "A", "--text", "t.txt", "--retrieval", "long")
        assert calls == []

    @pytest.mark.parametrize(
        "error, status, said",
        [
            (RequestError("SRC holds no weights: name another directory"), 2, "holds no weights"),
            (RuntimeError("first line\nsecond line"), 1, "RuntimeError: first line"),
            (OSError(28, "No space left on device"), 1, "No space left"),
            (ZeroDivisionError(), 1, "ZeroDivisionError"),
            (click.Abort(), 130, "interrupted"),
        ],
    )
    def test_errors_of_the_work(self, calls, monkeypatch, error, status, said):
        calls.stand_in(monkeypatch, "planning.plans", "inspect_checkpoint", error)
        assert said in refused("inspect", "SRC", status=status)
        for arguments in (["--debug", "inspect", "SRC"], ["inspect", "SRC", "--debug"]):
            outcome = invoke(*arguments)
            assert outcome.exit_code == status
            assert "Traceback" in outcome.stderr and outcome.stdout == ""

    @pytest.mark.parametrize(
        "message, shown",
        [
            (
                "`sequence_length` 1 leaves nothing: give 2 or more",
                "--sequence-length 1 leaves nothing: give 2 or more",
            ),
            ("`train` all: use attention for `train`", "--train all: use attention for --train"),
            # Neither a flag of this command, nor a parameter: sentences, paths and recipes' keys stay as they are.
            ("`contexts` 1 is too short", "`contexts` 1 is too short"),
            ("write `steps: 3` into steps/sequence_length.yaml", "write `steps: 3` into steps/sequence_length.yaml"),
        ],
    )
    @pytest.mark.parametrize("kind", [RequestError, DiskFullError])
    def test_parameters_are_shown_as_the_flags_of_the_command(self, calls, monkeypatch, message, shown, kind):
        calls.stand_in(monkeypatch, "healing", "heal", kind(message))
        assert refused("heal", "OUT", "--teacher", "SRC") == f"mea-compress: {shown}\n"

    @pytest.mark.parametrize(
        "arguments, shown",
        [
            (["compress", "A"], "mea-compress compress: missing argument 'OUT'; mea-compress compress --help shows"),
            (
                ["heal", "A", "--teacher", "B", "--stepz", "3"],
                "mea-compress heal: no such option '--stepz' (did you mean",
            ),
            (["comprss"], "mea-compress: no such command 'comprss', did you mean 'compress'?; mea-compress --help"),
        ],
    )
    def test_one_style_of_messages(self, calls, arguments, shown):
        said = refused(*arguments)
        assert said.startswith(shown) and not said.rstrip().endswith(".")

    @pytest.mark.parametrize("command", ["evaluate", "profile"])
    def test_a_picture_that_cannot_be_drawn_takes_no_figures_with_it(self, command, calls, monkeypatch, tmp_path):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        def refused_picture(file):
            with refusals(file):
                full()

        more = {"evaluate": ["--text", "t.txt", "--retrieval", "512"], "profile": []}[command]
        found = result(EVALUATION, "all figures", draw_retrieval=refused_picture)
        calls.stand_in(monkeypatch, "measure.evaluation", "evaluate", found)
        calls.stand_in(monkeypatch, "fit.profile", "profile", found)
        monkeypatch.setattr(plots, "draw_profile", full)
        files = ["--plot", tmp_path / "a.png", "--json", tmp_path / "a.json"]
        outcome = invoke(command, "SRC", *more, *files)
        assert outcome.exit_code == 2 and "a.png: the disk or quota is full" in outcome.stderr
        assert outcome.stdout == "all figures\n"
        assert json.loads((tmp_path / "a.json").read_text()) == EVALUATION
        (tmp_path / "b.png").mkdir()
        count = len(calls)
        assert "no file that this user may write" in refused(command, "SRC", *more, "--plot", tmp_path / "b.png")
        assert len(calls) == count

    def test_interrupting(self, calls, monkeypatch):
        calls.stand_in(monkeypatch, "compression", "compress", KeyboardInterrupt())
        outcome = invoke("compress", "A", "B", "--kv-ratio", "1")
        assert outcome.exit_code == 130 and "interrupted" in outcome.stderr
        calls.stand_in(monkeypatch, "compression", "compress", KeyboardInterrupt("go on with --resume"))
        outcome = invoke("compress", "A", "B", "--kv-ratio", "1")
        assert outcome.exit_code == 130 and "--resume" in outcome.stderr and "Traceback" not in outcome.stderr


class TestHelp:
    def test_commands_in_the_order_of_work(self):
        text = done("--help")
        names = ["inspect", "plan", "compress", "heal", "evaluate", "run", "recipes", "demo"]
        places = [text.index(f"\n  {name} ") for name in names]
        assert places == sorted(places)

    def test_every_setting_is_an_option(self):
        for command, settings in [
            ("compress", Recipe),
            ("plan", Recipe),
            ("heal", HealRecipe),
            ("evaluate", EvaluateRecipe),
        ]:
            text = done(command, "--help")
            elsewhere = {"description", "source", "out", "evaluate"} if settings is Recipe else set()
            for name in set(settings.model_fields) - elsewhere:
                assert "--" + name.replace("_", "-") in text
        assert "What to keep:" in done("compress", "--help")

    def test_version(self):
        assert "mea-compress" in done("--version")

    def test_nothing_asked_for(self):
        outcome = invoke()
        assert outcome.exit_code == 2 and "compress" in outcome.output
