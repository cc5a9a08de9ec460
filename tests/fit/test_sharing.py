"""What several processes share out: nothing is lost, and their checkpoint is the one of a single process."""

import json
import os
import pickle
import socket
import subprocess
import sys

import pytest
import torch
from letters import character_tokenizer, tiny_llama
from safetensors.torch import load_file

from mea_compress.architectures import open_checkpoint
from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.fit.sharing import Share
from mea_compress.planning.plans import plan_source
from mea_compress.recipe import make_recipe

SETTINGS = {"kv_ratio": 0.5, "refine": 20, "heal": 12, "sequences": 24, "sequence_length": 32, "device": "cpu"}


@pytest.fixture
def source(tmp_path):
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "src")
    character_tokenizer().save_pretrained(tmp_path / "src")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away again " * 80)
    return tmp_path / "src"


def shares(monkeypatch, count, total, held_out):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for number in range(count):
        monkeypatch.setenv("RANK", str(number))
        yield Share.own(total, held_out)


@pytest.mark.parametrize(("count", "total", "held_out"), [(1, 7, 2), (2, 7, 2), (3, 20, 4), (4, 9, 1)])
def test_every_sequence_is_had_by_one_process_and_those_held_out_come_first(count, total, held_out, monkeypatch):
    found = list(shares(monkeypatch, count, total, held_out))
    assert sorted(torch.cat([share.index for share in found]).tolist()) == list(range(total))
    numbers = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:5]
    seen = []
    for share in found:
        assert share.is_part == (count > 1) and share.index.tolist() == sorted(share.index.tolist())
        assert share.index[: share.place(held_out)].tolist() == [i for i in share.index.tolist() if i < held_out]
        assert all(3 <= i < 6 for i in share.index[share.between(3, 6)])
        seen += share.index[share.places(numbers)].tolist()
        cut = share.reaching([slice(start, start + 1) for start in range(len(share.index))], 4)
        assert [int(share.index[part]) for part in cut] == [i for i in share.index.tolist() if i >= 4]
    assert sorted(seen) == sorted(numbers.tolist())


def test_what_a_plan_decides_can_be_handed_over(source):
    plan = plan_source(open_checkpoint(source), make_recipe(None, SETTINGS))
    assert pickle.loads(pickle.dumps(plan.layers)) == plan.layers
    assert pickle.loads(pickle.dumps((plan.decisions, plan.costs))) == (plan.decisions, plan.costs)


def test_processes_with_nothing_to_share_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="share the calibration, and there is none: start one process"):
        compress(source, tmp_path / "out", kv_ratio=0.5, fit="weights", progress=False)
    assert not (tmp_path / "out").exists()


def launched(count, *command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", count, "--master-addr", "127.0.0.1", "--master-port")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, (*launch, port, "-m", "mea_compress", *command))]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_give_the_checkpoint_of_one(source, tmp_path):
    text = tmp_path / "text.txt"
    compress(source, tmp_path / "alone", text=text, progress=False, **SETTINGS)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | {"text": text}).items()]
    done = launched(2, "compress", source, tmp_path / "both", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both", "src", "text.txt"]
    alone, both = (json.loads((tmp_path / name / "compression.json").read_text()) for name in ("alone", "both"))
    assert both["plan"] == alone["plan"]
    for name in ("kl_before", "kl_after"):
        assert both["fidelity"]["healing"][name] == pytest.approx(alone["fidelity"]["healing"][name], rel=0.01)
    for mine, theirs in zip(both["fidelity"]["layers"].values(), alone["fidelity"]["layers"].values(), strict=True):
        assert mine["refinement"]["before"] == pytest.approx(theirs["refinement"]["before"], rel=1e-4)
        assert mine["refinement"]["after"] == pytest.approx(theirs["refinement"]["after"], rel=1e-2)
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    found = load_file(tmp_path / "both" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.01, atol=0.01 * float(expected[name].abs().max()))
