"""What stands in a checkpoint directory besides its weights."""

import json
import math
import os
from importlib import import_module
from pathlib import Path

import pytest
from tiny import stock_checkpoint

from mea_compress.architectures.families import Family
from mea_compress.checkpoint import CheckpointReader
from mea_compress.emit.code import CODE_FILES, carried_code
from mea_compress.emit.directory import (
    auto_map,
    copy_other_files,
    fingerprint,
    other_bytes,
    versions,
    write_config,
)
from mea_compress.errors import RequestError


@pytest.fixture
def source(tmp_path):
    directory = stock_checkpoint(tmp_path / "source")
    for name in ("README.md", "export.json", "sub/export.json", "sub/attention_mea.py", "pytorch_model.bin", ".git/x"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{name} é\n")
    return directory


def paths(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_everything_is_copied_but_weights_configuration_code_and_what_is_left_out(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    reader = CheckpointReader(source)
    copy_other_files(reader, target, ("export.json",), {"README.md": "kept/README.original.md"})
    expected = {str(path) for path in reader.other_files()} - {"README.md", "export.json", "sub/attention_mea.py"}
    assert paths(target) == expected | {"kept/README.original.md"}
    assert (target / "kept" / "README.original.md").read_text() == "README.md é\n"
    assert "sub/export.json" in paths(target)
    assert other_bytes(reader) == sum((source / path).stat().st_size for path in reader.other_files())


def test_a_link_that_leaves_the_checkpoint_is_not_followed(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "target").mkdir()
    with pytest.raises(RequestError, match="leaves the checkpoint directory"):
        copy_other_files(CheckpointReader(source), tmp_path / "target")


def test_a_fingerprint_is_the_same_however_the_directory_is_named(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    named = [CheckpointReader(path) for path in (source, Path("source"), Path("source/../source"))]
    assert len({fingerprint(reader, reader.config()) for reader in named}) == 1


def test_a_configuration_keeps_its_infinity(source):
    write_config(source, {"time_step_limit": [0.0, math.inf]})
    assert CheckpointReader(source).config() == {"time_step_limit": [0.0, math.inf]}


def test_a_fingerprint_changes_with_files_and_configuration(source):
    def current(**more):
        reader = CheckpointReader(source)
        return fingerprint(reader, reader.config() | more)

    first = current()
    assert current() == first
    assert current(rope_theta=7) != first
    os.utime(source / "model.safetensors", (1, 1))
    second = current()
    assert second != first
    (source / "README.md").write_text("more")
    third = current()
    assert third not in (first, second)
    (source / "pytorch_model.bin").write_text("nobody reads this")
    assert current() == third


def test_the_configuration_brings_its_code_along(tmp_path):
    write_config(tmp_path / "stock", {"model_type": "llama"})
    assert paths(tmp_path / "stock") == {"config.json"}
    write_config(tmp_path / "ours", {"auto_map": auto_map(Family("qwen3", "Qwen3"))})
    assert paths(tmp_path / "ours") == {"config.json", *CODE_FILES}
    assert carried_code(tmp_path / "ours").changed == ()
    for place in json.loads((tmp_path / "ours" / "config.json").read_text())["auto_map"].values():
        module, name = place.split(".")
        assert name.startswith("MeaQwen3")
        assert (tmp_path / "ours" / f"{module}.py").is_file()  # this release's, as is said above
        assert getattr(import_module(f"mea_compress.modeling.{module}"), name).__name__ == name
    assert {"torch", "mea-compress", "python"} <= set(versions())
