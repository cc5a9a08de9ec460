import csv
import json
import os
import shlex

import pytest
from click.testing import CliRunner
from letters import VOCABULARY, character_tokenizer, tiny_llama
from test_every_family import stock_family
from tiny import contents

import mea_compress.sweeping.run as run_module
from mea_compress.cli import cli
from mea_compress.errors import RequestError
from mea_compress.fit import profile as profiling
from mea_compress.measure import evaluation as evaluation_module
from mea_compress.recipe import Recipe
from mea_compress.sweeping.results import SweepPoint, mark_front
from mea_compress.sweeping.run import sweep

QUICK = {"fit": "weights", "evaluate.sequence_length": 32, "evaluate.limit": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a checkpoint in SRC and a text."""
    home = tmp_path_factory.mktemp("sweep")
    tiny_llama(num_attention_heads=8, num_key_value_heads=4, hidden_size=32).save_pretrained(home / "SRC")
    character_tokenizer().save_pretrained(home / "SRC")
    (home / "held out.txt").write_text("".join(chr(97 + i * i * 7 % 26) for i in range(2000)))
    return home


@pytest.fixture
def place(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


@pytest.fixture(scope="module")
def whole(home):
    """A sweep whose points were measured together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return swept("WHOLE")


def swept(out, **settings):
    asked = {"methods": ["head", "prune"], "shares": [0.5], **QUICK, **settings}
    return sweep("SRC", out, text="held out.txt", progress=False, **asked)


def command(*words):
    outcome = CliRunner().invoke(cli, [str(word) for word in words])
    return outcome.exit_code, outcome.stdout, outcome.stderr


def timeless(data):
    points = [{**point, "seconds": None, "decode_tokens_per_second": None} for point in data["points"]]
    return {**data, "points": points, "command": None}


@pytest.mark.slow
def test_the_commands_of_a_point_make_it_again_and_measure_the_same(place, whole):
    assert {path.name for path in whole.out.iterdir()} == {"index.html", "sweep.csv", "sweep.json", "sweep.png"}
    assert not (place / "WHOLE.partial").exists()
    point = whole.points[1]
    make, measure = (shlex.split(line) for line in point.commands)
    assert make[0] == measure[0] == "mea-compress" and command(*make[1:])[0] == 0
    status, shown, _ = command(*measure[1:], "--json", "-")
    measured = json.loads(shown)
    assert status == 0
    for name in ("kl", "cross_entropy", "perplexity", "top1_agreement", "kv_bytes_per_token"):
        assert measured[name] == pytest.approx(getattr(point, name), rel=1e-9), name
    reference = {name: whole.reference[name] for name in ("cross_entropy", "perplexity", "kv_bytes_per_token")}
    assert measured["reference"] == pytest.approx(reference)
    assert point.widths == [[2, 2], [2, 2]] and whole.tokens == measured["tokens"]


@pytest.mark.slow
def test_the_files_say_the_same(whole):
    data = json.loads((whole.out / "sweep.json").read_text())
    assert data == json.loads(json.dumps(whole.to_json()))
    rows = list(csv.DictReader((whole.out / "sweep.csv").open()))
    assert [row["name"] for row in rows] == [point.name for point in whole.points] == ["head-0.5", "prune-0.5"]
    assert [float(row["kl"]) for row in rows] == [point.kl for point in whole.points]
    assert [row["compress_command"] for row in rows] == [point.commands[0] for point in whole.points]
    assert len(data["heads"]) == 2 and "held out.txt" in (whole.out / "index.html").read_text()
    assert "head-0.5" in str(whole) and str(whole.out / "index.html") in str(whole)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_stopped(place, whole, monkeypatch):
    monkeypatch.setattr(run_module, "_AT_ONCE", 1)  # which measures what is measured together as well
    made, measure = [], evaluation_module.evaluate

    def compress(source, out, **options):
        made.append(out.name)
        return original(source, out, **options)

    def evaluate(checkpoint, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        return measure(checkpoint, **options)

    original = run_module.compress
    monkeypatch.setattr(run_module, "compress", compress)
    monkeypatch.setattr(evaluation_module, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        swept("SWEEP")
    assert made == ["head-0.5", "prune-0.5"] and not (place / "SWEEP").exists()
    with pytest.raises(RequestError, match="--resume"):
        swept("SWEEP")
    with pytest.raises(RequestError, match="the sweep changed"):
        swept("SWEEP", resume=True, shares=[0.25])
    monkeypatch.setattr(evaluation_module, "evaluate", measure)
    made.clear()
    resumed = swept("SWEEP", resume=True)
    assert made == []  # both were compressed, and the first was measured
    assert timeless(resumed.to_json()) == timeless(whole.to_json())
    assert not (place / "SWEEP.partial").exists()
    before = contents(place / "SWEEP")
    assert swept("SWEEP", resume=True).to_json() == resumed.to_json() and contents(place / "SWEEP") == before
    with pytest.raises(RequestError, match="asked for otherwise"):
        swept("SWEEP", resume=True, shares=[0.25])


@pytest.mark.slow
def test_what_cannot_be_made_has_a_reason_and_the_rest_is_made(place):
    found = swept("POOL", methods=["pool"], shares=[0.5, 0.75])
    possible, impossible = found.points
    assert possible.reason is None and possible.kl > 0 and possible.pareto
    assert "divides the 4" in impossible.reason and impossible.kl is None and not impossible.pareto
    assert impossible.reason in str(found) and "Cannot be made" in (found.out / "index.html").read_text()
    with pytest.raises(RequestError, match="nothing of the sweep can be made"):
        swept("OTHER", methods=["pool"], shares=[0.75])
    assert not (place / "OTHER").exists() and not (place / "OTHER.partial").exists()


@pytest.mark.slow
def test_measured_budgets_are_profiled_once_for_all_shares_of_a_method(place, monkeypatch):
    profiled = []

    def profile(source, **options):
        profiled.append(options["out"].name)
        return measure(source, **options)

    measure = profiling.profile
    monkeypatch.setattr(profiling, "profile", profile)
    fit = {"fit": "aligned", "refine": 0, "heal": "0", "effort": "fast", "sequences": 16, "sequence_length": 24}
    found = swept("MEASURED", methods=["head"], shares=[0.25, 0.5], budgets=["measured"], **fit)
    assert profiled == ["head.json"]
    file = found.out / "profiles" / "head.json"
    kept = json.loads(file.read_text())
    assert json.loads(json.dumps(found.profiles)) == [kept]
    alone = measure("SRC", key_composition="head", value_composition="head", progress=False, **fit).to_json()
    assert [point["components"] for point in kept["points"]] == [point["components"] for point in alone["points"]]
    assert [point["kl"] for point in kept["points"]] == pytest.approx([point["kl"] for point in alone["points"]])
    assert [point.name for point in found.points] == ["head-measured-0.25", "head-measured-0.5"]
    for point in found.points:
        assert sum(map(sum, point.widths)) == point.share * 2 * 2 * 4 and point.predicted_kl > 0
        make, measured = (shlex.split(line) for line in point.commands)
        assert str(file) in make and command(*make[1:])[0] == 0
        layers = json.loads((place / point.name / "config.json").read_text())["mea"]["layers"]
        assert [[layer["key_components"], layer["value_components"]] for layer in layers] == point.widths
        assert json.loads(command(*measured[1:], "--json", "-")[1])["kl"] == pytest.approx(point.kl, rel=1e-9)
    assert profiled == ["head.json"]


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"kv_ratio": 0.5}, "`kv_ratio` is what a sweep varies"),
        ({"recipe": Recipe(kv_ratio=0.5, heal={"steps": 3})}, "does not heal what was written"),
        ({"key_composition": {"method": "prune", "by": "pivot"}}, "options of its own"),
        ({"shares": []}, "shares"),
        ({"evaluate.limit": 0}, "limit"),
        ({"methods": ["haed"]}, "haed"),
        ({"calibration": "nowhere.txt"}, "nowhere.txt"),
        ({"evaluate.sequence_length": 64}, "context"),
        ({"retrieval": [1000]}, "retrieval"),
        ({"calibration": "-"}, "standard input (-) can be read once: name a file"),
        ({"evaluate.agreement": 4}, "`evaluate.agreement` has no place in a sweep"),
        ({"evaluate.tasks": "piqa"}, "mea-compress evaluate"),
        ({"evaluate.contexts": "8", "evaluate.batches": "2"}, "`evaluate.contexts` has no place in a sweep"),
        ({"evaluate.batches": "2"}, "`evaluate.batches` has no place in a sweep"),
    ],
)
def test_wrong_requests_leave_nothing_behind(place, settings, told):
    before = sorted(place.iterdir())
    with pytest.raises(RequestError) as caught:
        swept("WRONG", **settings)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(place.iterdir()) == before


def test_a_text_that_can_be_read_once_is_refused(place):
    os.mkfifo(place / "pipe")
    before = sorted(place.iterdir())
    for text in ("-", ["held out.txt", "-"], "pipe"):
        with pytest.raises(RequestError, match="reads its texts more than once"):
            sweep("SRC", "WRONG", text=text, progress=False, **QUICK)
    assert sorted(place.iterdir()) == before


@pytest.mark.slow
def test_the_command_that_measures_has_what_the_recipe_says_of_it(place):
    point = swept("NEVER", methods=["head"], bos="never", seed=3, device="cpu").points[0]
    make, measure = (shlex.split(line) for line in point.commands)
    make[3] = measure[2] = "NEVER-again"  # where no other test has made it
    assert command(*make[1:])[0] == 0
    measured = json.loads(command(*measure[1:], "--json", "-")[1])
    assert measured["prefix_ids"] == [] and measured["kl"] == pytest.approx(point.kl, rel=1e-9)
    assert measured["cross_entropy"] == pytest.approx(point.cross_entropy, rel=1e-9)
    assert all(flag in point.commands[1] for flag in ("--bos never", "--seed 3", "--device cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layers"), [("gpt2", [0, 1]), ("lfm2", [1])])
def test_a_family_that_is_composed_at_its_cache(family, layers, place):
    source = stock_family(family, place / family, vocab_size=len(VOCABULARY))
    character_tokenizer().save_pretrained(source)
    fit = {"fit": "activations", "refine": 0, "heal": "0", "sequences": 8, "sequence_length": 24}
    asked = {"text": "held out.txt", "calibration": "held out.txt", "shares": [0.5], **QUICK, **fit}
    found = sweep(source, f"{family}-SWEEP", progress=False, **asked)
    (point,) = found.points
    assert point.reason is None and point.kl > 0
    assert point.kv_bytes_per_token == found.reference["kv_bytes_per_token"] / 2
    assert [layer["layer"] for layer in found.heads] == layers
    assert json.loads((found.out / "sweep.json").read_text())["heads"] == list(found.heads)
    assert "default-0.5" in (found.out / "index.html").read_text()


@pytest.mark.slow
def test_the_command_line(place):
    status, shown, told = command(
        *("sweep", "SRC", "--text", "held out.txt", "--out", "S", "--methods", "prune", "--shares", "0.5"),
        *("--set", "fit=weights", "--set", "evaluate.limit=4", "--set", "evaluate.sequence_length=32"),
    )
    assert status == 0, told
    assert "[1/1] prune-0.5" in told and "Written to" in shown
    data = json.loads((place / "S" / "sweep.json").read_text())
    status, shown, _ = command(*shlex.split(data["command"])[1:], "--resume", "--json", "-")  # exactly what was asked
    assert status == 0 and json.loads(shown) == data
    assert "shares such as" in command("sweep", "SRC", "--text", "a", "--out", "T", "--shares", "half")[2]
    assert "whole numbers" in command("sweep", "SRC", "--text", "a", "--out", "T", "--retrieval", "x")[2]


def test_the_front_is_what_no_other_beats():
    sizes, losses = [100, 100, 200, 200, 300, 300], [0.5, 0.4, 0.4, 0.3, 0.35, 0.1]
    points = [
        SweepPoint(str(index), "m", None, None, 0.5, None, (), kv_bytes_per_token=size, kl=loss)
        for index, (size, loss) in enumerate(zip(sizes, losses, strict=True))
    ]
    missing = SweepPoint("x", "m", None, None, 0.5, None, (), reason="no")
    assert [point.name for point in mark_front([*points, missing]) if point.pareto] == ["1", "3", "5"]
    twins = [points[0], points[0]]
    assert all(point.pareto for point in mark_front(twins))
