"""The scripts in `recipes` do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from letters import character_tokenizer
from tiny import stock_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.process
def test_several_checkpoints_and_shares_make_one_report(tmp_path):
    sources = [tmp_path / name for name in ("one", "two")]
    for source, case in zip(sources, ("llama", "qwen2"), strict=True):
        stock_checkpoint(source, case)
        character_tokenizer().save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("she sells sea shells by the sea shore. " * 40)
    arguments = ["--text", str(text), "--out", str(tmp_path / "out"), "--share", "0.5", "--share", "0.75"]
    arguments += ["--set", "fit=weights"]
    command = [sys.executable, str(ROOT / "recipes" / "compare_checkpoints.py"), *map(str, sources), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout for _ in range(2)
    )
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["checkpoint"], row["share"]) for row in rows] == [
        (name, share) for name in ("one", "two") for share in (0.5, 0.75)
    ]
    assert all(row["bytes_after"] == row["share"] * row["bytes_before"] for row in rows)
    assert first == second and first.count("\n| ") == 4  # the second run made nothing again
