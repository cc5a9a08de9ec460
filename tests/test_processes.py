"""What several processes hand to one another, and what a launcher may not ask for."""

import subprocess
import sys

import pytest
import torch

from mea_compress.errors import RequestError
from mea_compress.processes import add_up, from_first_process, join_processes

BOTH = """
import os, sys
import torch
import torch.multiprocessing as multiprocessing

def work(number, file):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(number)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    from mea_compress.processes import add_up, from_first_process, is_first_process
    assert is_first_process() == (number == 0)
    for value in (torch.arange(3.0), torch.ones(2, 2, dtype=torch.complex128) * 1j, torch.tensor(4), torch.ones(())):
        own = value * (number + 1)
        total = add_up(own)
        assert total.dtype == value.dtype and torch.equal(total, 3 * value) and torch.equal(own, value * (number + 1))
    assert from_first_process({"number": number}) == {"number": 0}
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), 2)
"""


def test_one_process_keeps_what_it_has():
    value = torch.arange(3.0)
    assert add_up(value) is value and from_first_process(value) is value
    assert join_processes(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("flag", ["fsdp", "deepspeed"])
def test_models_are_not_sharded(flag, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{flag.upper()}", "true")
    with pytest.raises(RequestError, match=f"--use_{flag} would shard the models.*leave it out"):
        join_processes(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.process
def test_two_add_up_and_hand_over(tmp_path):
    (tmp_path / "both.py").write_text(BOTH)
    command = [sys.executable, tmp_path / "both.py", tmp_path / "meeting"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path), "HOME": "/"})
    assert done.returncode == 0, done.stderr[-2000:]
