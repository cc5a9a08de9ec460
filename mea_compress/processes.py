"""The processes that a launcher has started for one piece of work: `torchrun`, or `accelerate launch`."""

from __future__ import annotations

import os
from typing import Any

import torch


def process_count() -> int:
    """Return how many processes do this work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this one writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def join_processes(device: torch.device) -> torch.device:
    """Join the other processes, if there are some; return the device of this one.

    Args:
        device: As asked for; of several GPUs each process gets the one that the launcher gives it.
    """
    if process_count() == 1:
        return device
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def from_first_process(value: Any) -> Any:
    """Return what the first process hands over; the others' argument is not looked at."""
    if process_count() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


__all__ = ["from_first_process", "is_first_process", "join_processes", "process_count"]
