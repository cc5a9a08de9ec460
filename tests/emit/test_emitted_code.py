"""The code that checkpoints carry, and its refreshing."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import contents, stock_checkpoint

from mea_compress.checkpoint import files
from mea_compress.cli import cli
from mea_compress.compression import compress
from mea_compress.emit import code as emitted_code
from mea_compress.emit.code import CODE_FILES, carried_code, refresh
from mea_compress.errors import DiskFullError, RequestError
from mea_compress.modeling.section_mea import CODE_VERSION
from mea_compress.recipe import Recipe

WRITTEN_BY_010 = Path(__file__).parents[1] / "data" / "checkpoint-0.1.0"


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copytree(WRITTEN_BY_010, tmp_path / "old"))


def test_what_is_written_now_carries_the_code_of_now(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    recipe = Recipe(kv_ratio=0.5, fit="weights", key_composition="head", value_composition="head")
    out = compress(source, tmp_path / "out", recipe=recipe, progress=False).out
    assert carried_code(out).to_json() == {"version": CODE_VERSION, "current": True, "fault": None}
    assert carried_code(source).version is None
    before = contents(out)
    assert not refresh(out).refreshed
    assert contents(out) == before


def test_code_that_is_write_protected_is_replaced(old):
    for name in filter(lambda name: (old / name).exists(), CODE_FILES):
        (old / name).chmod(0o444)
    refresh(old)
    assert carried_code(old).to_json()["current"]
    assert all((old / name).stat().st_mode & 0o200 for name in CODE_FILES)


def test_refreshing_replaces_code_and_nothing_else(old):
    before, inode = contents(old), (old / "model.safetensors").stat().st_ino
    assert carried_code(old).version == "0.1.0" and "5.24" in carried_code(old).fault
    assert not refresh(old, check=True).refreshed and contents(old) == before
    assert refresh(old).refreshed
    after = contents(old)
    assert {name for name in before if after[name] != before[name]} <= {*CODE_FILES, "README.md"}
    assert set(after) == set(before) | set(CODE_FILES) and (old / "model.safetensors").stat().st_ino == inode
    assert carried_code(old).to_json() == {"version": CODE_VERSION, "current": True, "fault": None}
    assert after["README.md"].startswith(before["README.md"].rstrip()) and CODE_VERSION in after["README.md"].decode()
    assert os.listdir(old.parent) == ["old"]


def test_a_second_refresh_leaves_one_note(old):
    refresh(old)
    (old / "section_mea.py").write_text("# of another release\n")
    refresh(old)
    assert (old / "README.md").read_text().count("was replaced by") == 1


def test_links_of_a_download_are_kept(old, tmp_path):
    """A hub's cache keeps files elsewhere and links to them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "attention_mea.py"):
        (old / name).rename(blobs / name)
        (old / name).symlink_to(Path("..") / "blobs" / name)
    code = (blobs / "attention_mea.py").read_bytes()
    with pytest.raises(RequestError):  # links that leave the directory are not trusted
        refresh(old)
    assert (blobs / "attention_mea.py").read_bytes() == code


@pytest.mark.parametrize(
    ("module", "moment"), [(emitted_code, "write_code"), (files, "sync_tree"), (files, "exchange")]
)
def test_an_interrupted_refresh_leaves_the_checkpoint_as_it_was(module, moment, old, monkeypatch):
    before = contents(old)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        refresh(old)
    assert contents(old) == before and os.listdir(old.parent) == ["old"]


def test_a_full_disk_is_one_sentence(old, monkeypatch):
    before = contents(old)

    def full(*_):
        raise OSError(28, "No space left on device", str(old))

    monkeypatch.setattr(emitted_code, "write_code", full)
    with pytest.raises(DiskFullError, match="disk or quota is full; free some space"):
        refresh(old)
    assert contents(old) == before


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(RequestError, match="carries no code of this program"):
        refresh(stock_checkpoint(tmp_path / "source"))


def test_the_commands_say_it(old):
    told = CliRunner().invoke(cli, ["inspect", str(old)])
    assert "0.1.0" in told.stdout and f"mea-compress refresh {old}" in told.stderr
    told = CliRunner().invoke(cli, ["refresh", str(old), "--check", "--json", "-"])
    assert json.loads(told.stdout)["before"] == {
        "version": "0.1.0",
        "current": False,
        "fault": carried_code(old).fault,
    }
    assert "yes" in CliRunner().invoke(cli, ["refresh", str(old)]).stdout
    assert CliRunner().invoke(cli, ["inspect", str(old)]).stderr == ""
