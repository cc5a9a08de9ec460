"""Which sequences a process has of those that several share: every so manieth of those held out, and of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mea_compress.processes import process_count, process_number


@dataclass(frozen=True)
class Share:
    """The sequences of this process among all.

    Attributes:
        index: Their numbers among all, ascending, (n,), int64.
        held_out: Sequences at the front, of all, that are for choosing.
        total: Sequences of all processes.
        is_part: Whether other processes have the others; otherwise these are all.
    """

    index: torch.Tensor
    held_out: int
    total: int
    is_part: bool

    @staticmethod
    def whole(total: int, held_out: int) -> Share:
        """Return all sequences."""
        return Share(torch.arange(total), held_out, total, False)

    @staticmethod
    def own(total: int, held_out: int) -> Share:
        """Return what this process has, all of it where it is the only one."""
        every = torch.arange(total)
        parts = [part[process_number() :: process_count()] for part in (every[:held_out], every[held_out:])]
        return Share(torch.cat(parts), held_out, total, process_count() > 1)

    def place(self, number: int) -> int:
        """Return how many of this process's sequences have smaller numbers."""
        return int((self.index < number).sum())

    def between(self, first: int, end: int) -> slice:
        """Return where in this process those with numbers from `first` to below `end` are."""
        return slice(self.place(first), self.place(end))

    def places(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return where in this process those of some numbers are that it has, in their order."""
        where = torch.full((self.total,), -1)
        where[self.index] = torch.arange(len(self.index))
        found = where[numbers]
        return found[found >= 0]

    def reaching(self, parts: Sequence[slice], number: int) -> list[slice]:
        """Return batches of this process without what is before a number."""
        first = self.place(number)
        return [slice(max(part.start, first), part.stop) for part in parts if part.stop > first]


__all__ = ["Share"]
