"""Every release of transformers in the tested range: the same tokens with a cache as without, and as elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from compat.releases import NEWEST, OLDEST, RELEASES, release_directory
from published import LAYOUTS, PROBE, publish
from tiny import stock_checkpoint
from transformers import AutoTokenizer

from mea_compress.compression import compress
from mea_compress.emit.code import carried_code, refresh
from mea_compress.recipe import Recipe

TESTS = Path(__file__).parents[1]
WRITTEN_BY_010 = TESTS / "data" / "checkpoint-0.1.0"
FORMS = {
    "frequency-latent": ("llama", "frequency", "latent"),
    "head": ("qwen3", "head", "head"),
    "latent": ("qwen2", "latent", "latent"),
    "pool": ("mistral-full", "pool", "pool"),
}
pytestmark = [pytest.mark.slow, pytest.mark.process]


def run(version, script, *arguments, package=True, cwd=None):
    """Runs a script of this directory under a release, in a process of its own; its JSON."""
    directory = release_directory(version)
    path = [str(directory)] if directory else []
    if package:
        path += [str(TESTS.parent), str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    if cwd is not None:
        environment["HF_MODULES_CACHE"] = str(cwd / "modules")
    command = [sys.executable, Path(__file__).with_name(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What 0.1.0 wrote, as it is and with its code refreshed, and every kind of form as it is written now."""
    place = tmp_path_factory.mktemp("releases")
    shutil.copytree(WRITTEN_BY_010, place / "refreshed")
    refresh(place / "refreshed")
    found = {"0.1.0": WRITTEN_BY_010, "refreshed": place / "refreshed"}
    for name, (case, keys, values) in FORMS.items():
        traits = {"head_dim": 8} if case == "llama" else {}
        source = stock_checkpoint(place / f"{name}-source", case, **traits)
        recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition=keys, value_composition=values)
        compress(source, place / name, recipe=recipe, progress=False)
        found[name] = place / name
    return found


def check(found):
    for name, result in found.items():
        assert result["cached"] < 1e-4, (name, result)
        assert result["padded"] < 1e-4, (name, result)
        assert result["dynamic"] == result["static"] == result["uncached"], name
        assert "no cache holds what came before" in result["withheld"], name
        assert "continuous batching" in result["batched"], name


@pytest.fixture(scope="module")
def expected(checkpoints):
    """Greedy tokens under the installed release."""
    found = run(transformers.__version__, "attempt.py", "package", *checkpoints.values())["found"]
    return {place: result["dynamic"] for place, result in found.items()}


@pytest.mark.parametrize("version", RELEASES)
def test_generation_with_the_package(version, checkpoints, expected):
    told = run(version, "attempt.py", "package", *checkpoints.values())
    assert told["transformers"] == version and not told["untested"]
    check(told["found"])
    assert {place: result["dynamic"] for place, result in told["found"].items()} == expected


@pytest.mark.parametrize("version", RELEASES)
def test_generation_with_the_code_that_checkpoints_carry(version, checkpoints, expected, tmp_path):
    places = [place for name, place in checkpoints.items() if name != "0.1.0"]
    told = run(version, "attempt.py", "remote", *places, package=False, cwd=tmp_path)
    assert told["transformers"] == version and not told["untested"]
    check(told["found"])
    assert {place: result["dynamic"] for place, result in told["found"].items()} == {
        str(place): expected[str(place)] for place in places
    }


@pytest.mark.parametrize("version", RELEASES)
def test_compressing_and_exporting(version, tmp_path):
    for name, result in run(version, "compress_here.py", tmp_path).items():
        assert result["decoding" if name != "stock" else "decoding_difference"] < 1e-4
        if name != "stock":
            assert result["planned"] == result["measured"]
            assert result["saved"] == 0


@pytest.mark.parametrize("version", RELEASES)
def test_components_at_the_cache_are_read_as_they_lie(version):
    told = run(version, "at_cache.py")
    assert told["transformers"] == version
    for name, result in told["found"].items():
        assert result["absorbed"] == 5, name  # the prompt, which has a mask, and four steps
        assert result["difference"] < 3e-6, name


@pytest.mark.parametrize("version", RELEASES)
def test_texts_become_the_same_sequences(version, tmp_path):
    told = run(version, "text_here.py", tmp_path)
    assert told["transformers"] == version and told["prefix"] == [1]
    fox = [tuple(3 + ord(letter) - 97 if letter != " " else 29 for letter in part) for part in ("the qui", "ck brow")]
    assert [tuple(row) for row in told["text"][:2]] == [(1, *letters) for letters in fox]
    plain, with_tools = told["chats"]
    assert plain[0] == 1 and plain.count(2) == 2 and len(with_tools) > len([token for token in plain if token])
    opening = [1, 23, 21, 7, 20, 29]  # of a user's turn
    turns = [row[:6] == opening for row in told["sampled"]]
    assert sum(turns) == 8 and all(row[0] == 1 and len(row) == 32 for row in told["sampled"])
    assert not any(2 in row for row, turn in zip(told["sampled"], turns, strict=True) if not turn)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """Checkpoints with the tokenizers that families publish, and what those of their sources make of a text."""
    place, found = tmp_path_factory.mktemp("tokenizers"), {}
    for index, (case, name) in enumerate(LAYOUTS):
        source = publish(stock_checkpoint(place / f"{index}-source", case, vocab_size=640), case, name)
        compress(source, place / str(index), recipe=Recipe(kv_ratio=0.5, fit="weights"), progress=False)
        found[str(place / str(index))] = AutoTokenizer.from_pretrained(source)(PROBE)["input_ids"]
    return found


@pytest.mark.parametrize("version", RELEASES)
def test_tokenizers_are_those_of_the_sources(version, tokenized, tmp_path):
    assert run(version, "tokenize_text.py", "package", PROBE, *tokenized) == tokenized
    remote = run(version, "tokenize_text.py", "remote", PROBE, *tokenized, package=False, cwd=tmp_path)
    assert remote == tokenized


def test_the_code_of_010_fails_under_the_newest_release_and_inspect_says_so(tmp_path):
    """The fault that `refresh` repairs: should it vanish, the table of known faults is out of date."""
    place = shutil.copytree(WRITTEN_BY_010, tmp_path / "old")
    told = run(NEWEST, "attempt.py", "remote", place, package=False, cwd=tmp_path)["found"][str(place)]
    assert told["dynamic"] != told["uncached"] and told["held"] == 0 and told["withheld"] == "answered"
    assert "transformers 5.24" in carried_code(place).fault


def test_another_release_than_the_tested_ones_is_named_once(checkpoints, tmp_path):
    shutil.copytree(checkpoints["head"], tmp_path / "head")
    section = tmp_path / "head" / "section_mea.py"
    section.write_text(section.read_text().replace(f'"{OLDEST}", "{NEWEST}"', '"5.16.1", "5.17.0"'))
    told = run(transformers.__version__, "attempt.py", "remote", tmp_path / "head", package=False, cwd=tmp_path)
    assert len(told["untested"]) == 1 and transformers.__version__ in told["untested"][0]
