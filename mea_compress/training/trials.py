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
from dataclasses import asdict, dataclass, replace
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

_LEAST_GAIN = 0.5
"""Share of the best trial's gain that one of a larger step size must have to be chosen, where trials are short."""
_SHORT = 20
"""Steps of a trial that favours small step sizes; one of 140 favours them no longer (`benchmarks/NOTES.md`)."""
_LONGER, _RAISED, _LARGEST_RAISED = 4, 3, 0.015
"""A run that is four times as long as a short trial takes the step size that it found, a longer one more, as the root
of its length, up to three times as much and up to 0.015 (`benchmarks/NOTES.md`)."""
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


def next_rate(rates: Sequence[float], progress: Progress, trial: int) -> float | None:
    """Return the step size to try next: from the middle up for as long as that is good enough, or down until one gains.

    Args:
        rates: To choose from, ascending.
        progress: What those tried have come to.
        trial: Optimiser steps of a trial.

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
    last = tried[-1]
    enough = choose_rate(rates, progress, trial) != last if climbs else progress.found[str(last)] < start
    return None if enough or len(tried) == len(order) else order[len(tried)]


def choose_rate(rates: Sequence[float], progress: Progress, trial: int) -> float:
    """Return the largest step size whose trial gained at least half of the best one's, or the one that ended lowest.

    A short run favours small steps: on babyllama105 at half of its cache 0.003 is ahead of 0.01 after 12 of 60 steps,
    and behind it at their end (KL 0.0317 and 0.0272). The longer a trial is, the more of the best one's gain it takes.

    Args:
        rates: To choose from.
        progress: What those tried have come to.
        trial: Optimiser steps of a trial.
    """
    start = progress.curve[0][1]
    found = {rate: progress.found.get(str(rate), math.inf) for rate in rates}
    best = min(rates, key=lambda rate: found[rate])
    gain = start - found[best]
    if not gain > 0:
        return best
    return max(rate for rate, value in found.items() if start - value >= (1 - _LEAST_GAIN * _shortness(trial)) * gain)


def _shortness(trial: int) -> float:
    """Return how far a trial favours small step sizes, 1 for the shortest."""
    return min(1.0, _SHORT / trial)


def rate_of_run(rate: float, steps: int, settings: DistillationSettings) -> float:
    """Return the step size of a run of so many steps where trials have chosen one: what larger steps upset, more mend.

    Args:
        rate: What was chosen, or the only one there is, which is taken as it is.
        steps: Of the full run.
        settings: With the steps of a trial.
    """
    if len(settings.rates) == 1:
        return rate
    factor = math.sqrt(steps / (_LONGER * settings.trial_steps)) * _shortness(settings.trial_steps)
    return max(rate, min(rate * min(max(1.0, factor), _RAISED), _LARGEST_RAISED))


def rates_after(rate: float, steps: int, settings: DistillationSettings) -> tuple[float, ...]:
    """Return the step sizes to choose from where an earlier distillation, at least as short, has found its own.

    Weights that it has left as its steps grew small lose at first by any step that gains in the end, so that trials
    would take the smallest: the step size that its trials chose is taken again, for the longer run.

    Args:
        rate: What it came to take.
        steps: Of its full run.
        settings: Of the new one.

    Returns:
        One, or those of the settings where the new run is shorter or the old one's choice is not known.
    """
    if steps > settings.steps or len(settings.rates) == 1:
        return settings.rates
    for deadline in (None, math.inf):  # trials are shorter with one
        old = replace(settings, steps=steps, deadline=deadline)
        for chosen in settings.rates:
            if math.isclose(rate_of_run(chosen, steps, old), rate, rel_tol=0.02):
                return (rate_of_run(chosen, settings.steps, settings),)
    return settings.rates


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


__all__ = ["Pace", "Progress", "choose_rate", "keeping", "next_rate", "rate_of_run", "rates_after", "steps_left"]
