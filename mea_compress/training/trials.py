"""Which step size a distillation takes, how many steps a deadline leaves it, and how far it has come."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mea_compress.checkpoint.files import refusal, write_text
from mea_compress.errors import RequestError
from mea_compress.processes import from_first_process, is_first_process, wait_for_all
from mea_compress.training.settings import LOOKS, DistillationSettings
from mea_compress.training.sharding import gathered, part_of

_SHORT = 20
"""Steps of a trial that favours small step sizes; one of 140 favours them no longer (`benchmarks/NOTES.md`)."""
_LONGER, _RAISED, _LARGEST_RAISED = 4, 2, 0.015
"""A run that is four times as long as a short trial takes the step size that is best in one, a longer one more, as the
root of its length, up to twice as much and up to 0.015 (`benchmarks/NOTES.md`)."""
_LAST_LOOKS = 7  # with a deadline: as long as measuring all in the end takes, and writing and checking what was learnt
_SURE = 0.96  # share of the time that is left to count on: steps of the full run are slower by what is kept of them
_PROGRESS = "progress.json"
_LEAST_FREE = 1 << 20  # bytes of a disk that is not full


class Progress:
    """How far a distillation has come: trials, curve, and the best weights so far with the KL that they have.

    Args:
        directory: Where `save` keeps it, or None.
        value: KL at the start.
        weights: At the start, by name.
    """

    def __init__(self, directory: Path | None, value: float, weights: Mapping[str, torch.Tensor]) -> None:
        self.directory = directory
        self.best_value = value if math.isfinite(value) else math.inf
        self.best_weights = dict(weights)
        self.found: dict[str, float] = {}
        self.curve: list[tuple[int, float]] = [(0, value)]
        self.losses: list[float] = []
        self.steps: int | None = None
        self.taken = 0
        self.pace = Pace()
        # The weights that the full run begins with, once that is known, and the file that has them.
        self.begun: Mapping[str, torch.Tensor] | None = None
        self._begun_file: str | None = None
        self._offered = True

    @property
    def gained(self) -> bool:
        """Whether a trial ended below the start."""
        return min(self.found.values(), default=math.inf) < self.curve[0][1]

    @staticmethod
    def resumed(directory: Path | None, like: Mapping[str, torch.Tensor]) -> Progress | None:
        """Return what `save` has kept, None where it has nothing; of several processes the first one looks."""
        if not from_first_process(directory is not None and (directory / _PROGRESS).is_file()):
            return None
        assert directory is not None
        kept = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))

        def stored(name: str) -> dict[str, torch.Tensor]:
            weights = load_file(directory / name)
            return {k: part_of(weights[k], like[k]) for k in like}

        progress = Progress(directory, kept["curve"][0][1], stored(kept["best"]))
        progress._begun_file = kept["begun"]
        progress.begun = None if kept["begun"] is None else stored(kept["begun"])
        progress.best_value, progress.found, progress.steps = kept["best_value"], kept["found"], kept["steps"]
        progress.curve, progress.taken = [(step, value) for step, value in kept["curve"]], kept["taken"]
        progress.losses = kept["losses"]
        progress.pace = Pace(**kept.get("pace", {}))
        progress._offered = False
        wait_for_all()  # before any of them replaces what others still read
        return progress

    def offer(self, value: float, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep weights that are better than the best so far."""
        if value < self.best_value:
            self.best_value, self._offered = value, True
            self.best_weights = {name: weight.detach().clone() for name, weight in parameters.items()}

    def save(self) -> None:
        """Write it down, complete or not at all."""
        if self.directory is None:
            return
        weights = gathered(self.best_weights) if self._offered else {}
        if is_first_process():
            with keeping(self.directory):
                self._write(self.directory, weights)
        self._offered = False

    def _write(self, directory: Path, weights: dict[str, torch.Tensor]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"best-{self.taken + self.curve[-1][0]}.safetensors"
        if not self._offered:
            name = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))["best"]
        else:
            save_file(weights, directory / name)
        if self.begun is not None and self._begun_file is None:
            self._begun_file = name
        record = {
            "best": name,
            "begun": self._begun_file,
            "best_value": self.best_value,
            "found": self.found,
            "curve": self.curve,
            "losses": self.losses,
            "steps": self.steps,
            "taken": self.taken,
            "pace": asdict(self.pace),
        }
        write_text(directory / _PROGRESS, json.dumps(record))  # JSON of Python has infinity
        for old in directory.glob("best-*.safetensors"):
            if old.name not in (name, self._begun_file):
                old.unlink()


@contextmanager
def keeping(directory: Path) -> Iterator[None]:
    """Turn what libraries say of a full disk, each in words of its own and none as OSError, into the sentence for it.

    Raises:
        DiskFullError: The block failed, and there is no room left.
    """
    try:
        yield
    except RequestError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(directory.parent).free < _LEAST_FREE
        if not full:
            raise
        raise refusal(OSError(errno.ENOSPC, ""), directory) from error


def next_rate(rates: Sequence[float], progress: Progress) -> float | None:
    """Return the step size to try next: from the middle up for as long as that ends lower, or down until one gains.

    Args:
        rates: To choose from, ascending.
        progress: What those tried have come to.

    Returns:
        One of `rates`, or None if enough was tried.
    """
    middle, start = len(rates) // 2, progress.curve[0][1]
    if len(rates) == 1:
        return None
    if str(rates[middle]) not in progress.found:
        return rates[middle]
    climbs = progress.found[str(rates[middle])] < start
    order = rates[middle:] if climbs else rates[middle::-1]
    tried = [rate for rate in order if str(rate) in progress.found]
    last = progress.found[str(tried[-1])]
    enough = last > min(progress.found.values()) if climbs else last < start
    return None if enough or len(tried) == len(order) else order[len(tried)]


def best_rate(rates: Sequence[float], progress: Progress) -> float:
    """Return the step size that would have done best in a trial, by the trials that there were.

    A step size r changes KL by -a r + b r²: it gains with r at first, and what it upsets grows with its square. The
    start, the trial that ended lowest and that of the next larger step size say what a and b are, and a / 2b is best.

    Args:
        rates: To choose from, ascending.
        progress: What those tried have come to.

    Returns:
        Nearer to that which ended lowest than to its neighbours, by their ratios; that itself where nothing larger was
        tried or nothing gained.
    """
    start = progress.curve[0][1]
    found = {rate: progress.found[str(rate)] for rate in rates if str(rate) in progress.found}
    if not found:
        return rates[0]
    best = min(found, key=lambda rate: found[rate])
    above = next((rate for rate in found if rate > best), None)
    below = max((rate for rate in rates if rate < best), default=best)
    gain = start - found[best]
    if above is None or not gain > 0 or not math.isfinite(found[above]):
        return best
    # start - KL = a r - b r² at both.
    per_rate, other = gain / best, (start - found[above]) / above
    curvature = (per_rate - other) / (above - best)  # b
    if not curvature > 0:
        return best
    lowest = (per_rate + curvature * best) / (2 * curvature)
    return min(max(lowest, math.sqrt(below * best)), math.sqrt(best * above))


def rate_of_run(rate: float, steps: int, settings: DistillationSettings) -> float:
    """Return the step size of a run of so many steps: what larger steps upset, more of them mend.

    Args:
        rate: What is best in a trial, or the only one there is, which is taken as it is.
        steps: Of the full run.
        settings: With the steps of a trial.
    """
    if len(settings.rates) == 1:
        return rate
    factor = math.sqrt(steps / (_LONGER * settings.trial_steps)) * min(1.0, _SHORT / settings.trial_steps)
    return max(rate, min(rate * min(max(1.0, factor), _RAISED), _LARGEST_RAISED))


@dataclass
class Pace:
    """How long the steps of trials, and looks at held-out text, have taken in seconds."""

    steps: int = 0
    in_steps: float = 0.0
    looks: int = 0
    in_looks: float = 0.0

    @contextmanager
    def of_steps(self, count: int) -> Iterator[None]:
        """Take the time of so many steps."""
        began = time.monotonic()
        yield
        self.steps, self.in_steps = self.steps + count, self.in_steps + time.monotonic() - began

    @contextmanager
    def of_a_look(self) -> Iterator[None]:
        """Take the time of a look."""
        began = time.monotonic()
        yield
        self.looks, self.in_looks = self.looks + 1, self.in_looks + time.monotonic() - began


def steps_left(settings: DistillationSettings, pace: Pace) -> int:
    """Return the steps of the full run that are left the time for, by the clock of the first process.

    Args:
        settings: With the deadline.
        pace: Of the trials.
    """
    if settings.deadline is None:
        return settings.steps
    left = settings.deadline - time.monotonic()
    if not pace.steps:
        return from_first_process(settings.steps if left > 0 else 0)
    left = _SURE * left - (LOOKS + _LAST_LOOKS) * pace.in_looks / max(1, pace.looks)
    return from_first_process(max(0, min(settings.steps, int(left * pace.steps / pace.in_steps))))


__all__ = ["Pace", "Progress", "best_rate", "keeping", "next_rate", "rate_of_run", "steps_left"]
