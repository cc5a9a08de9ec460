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


@pytest.mark.process
@pytest.mark.slow
def test_the_best_recipe_is_the_whole_job_in_one_line_and_gives_the_same_bytes_twice(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    small = ("sequences=24", "sequence_length=32", "refine=6", "heal=12")
    files = []
    for name in ("one", "two"):
        out = tmp_path / name / "out"
        command = [sys.executable, "-m", "mea_compress", "run", str(ROOT / "recipes" / "best-50.yaml")]
        for setting in (f"source={source}", f"out={out}", *small):
            command += ["--set", setting]
        subprocess.run(command, capture_output=True, env=environment, check=True)
        files.append({path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()})
    report = json.loads(files[0]["compression.json"])
    assert report["recipe"]["key_composition"] == "joint" and report["fidelity"]["budget"]["measured_kl"] > 0
    assert report["fidelity"]["healing"]["kept"] in ("healed", "unhealed")
    assert files[0].keys() == files[1].keys() and all(files[0][name] == files[1][name] for name in files[0])
