"""The help of every command, as it is printed; golden files show in a diff what a change does to it.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/test_help.py
"""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from mea_compress.cli import cli

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 100


def commands(command, words=()):
    """Yield the words that call every command, the program itself among them."""
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


COMMANDS = list(commands(cli))


def golden_file(words):
    return GOLDEN / f"{'-'.join(('help', *words))}.txt"


def help_of(words):
    outcome = CliRunner().invoke(cli, [*words, "--help"], terminal_width=WIDTH)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words) or "program")
def test_help(words):
    text, file = help_of(words), golden_file(words)
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"if {file.name} should change: UPDATE_GOLDEN=1 pytest {__file__}"
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\b" not in text and "\\b" not in text


def test_no_golden_file_is_left_over():
    assert {golden_file(words) for words in COMMANDS} == set(GOLDEN.glob("help*.txt"))


def test_no_short_help_is_cut_off():
    text = " ".join(help_of(()).split())
    for name, command in cli.commands.items():
        sentence, *_ = " ".join(command.help.split("\n\n")[0].split()).partition(". ")
        assert f" {name} {sentence}" in text
    assert text.count("...") == 1  # of [ARGS]...
