"""The processes that a launcher has started for one piece of work: `torchrun`, or `accelerate launch`."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mea_compress.errors import RequestError

if TYPE_CHECKING:
    import torch

_LONGEST_WAIT = timedelta(days=7)
"""For what one process does alone while the others wait for it: sampling text, measuring a budget, writing weights."""


# What `accelerate launch` sets.
_SHARDED = {"ACCELERATE_USE_FSDP": "--use_fsdp", "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed"}


def process_count() -> int:
    """Return how many processes do this work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Return which of them this one is, from 0 on."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_first_process() -> bool:
    """Return whether this one writes files and prints."""
    return process_number() == 0


def join_processes(device: torch.device) -> torch.device:
    """Join the other processes, if there are some; return the device of this one.

    Args:
        device: As asked for; of several GPUs each process gets the one that the launcher gives it.

    Raises:
        RequestError: The launcher is to shard models, and nobody has taken that over; see `sharding_asked_for`.
    """
    for variable, what in _SHARDED.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise RequestError(f"{what} would shard the models, of which every process needs all here: leave it out")
    if process_count() == 1:
        return device
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=_LONGEST_WAIT)
    if device.type == "cpu":
        # Gloo's threads would abort an interpreter that ends while they are still connected.
        atexit.register(state.destroy_process_group)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def from_first_process(value: Any) -> Any:
    """Return what the first process hands over; the others' argument is not looked at."""
    if process_count() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all() -> None:
    """Return when every process has come here."""
    import torch

    add_up(torch.zeros(1))


def add_up(sums: torch.Tensor) -> torch.Tensor:
    """Return the sum of all processes' tensors, which have one shape and dtype; of a single one, its own.

    The sum is the same to the last bit in all of them.
    """
    if process_count() == 1:
        return sums
    import torch

    numbers = torch.view_as_real(sums) if sums.is_complex() else sums
    # What communicates between GPUs takes nothing else.
    on_gpu = torch.distributed.get_backend() == "nccl"
    total = numbers.detach().to("cuda" if on_gpu else "cpu", copy=True).contiguous()
    torch.distributed.all_reduce(total)
    total = total.to(sums.device)
    return torch.view_as_complex(total) if sums.is_complex() else total


__all__ = [
    "add_up",
    "from_first_process",
    "is_first_process",
    "join_processes",
    "process_count",
    "process_number",
    "wait_for_all",
]
