"""The bar of a distillation: steps, the loss of the last one, and the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


class StepBar:
    """What `distil` tells of its steps, on a bar that may stand for several distillations one after the other.

    Args:
        bar: Where it is shown; its total is that of all of them.
    """

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self._before = 0  # steps of the distillations that are through

    def tick(self, loss: float) -> None:
        """Show one step more, and its loss in nats per token."""
        self._bar.set_postfix(kl=f"{loss:.4f}", refresh=False)
        self._bar.update(1)

    def known(self, steps: int, done: int, later: int = 0) -> None:
        """Show how many steps there are, and how many of them were done before this process took them up.

        Args:
            steps: All of this distillation, those of trials among them.
            done: How many of these are behind.
            later: Steps of the distillations that follow.
        """
        if self._bar.disable:  # then it counts nothing
            return
        resumed = self._before + done - int(self._bar.n)
        # Which took no time here: what is left is estimated from the other steps.
        self._bar.initial += resumed
        self._bar.last_print_n += resumed
        self._bar.n += resumed
        self._bar.total = self._before + steps + later
        self._bar.refresh()

    def through(self) -> None:
        """Count from here for the next distillation."""
        self._before = int(self._bar.n)


@contextmanager
def step_bar(expected: int | None, shown: bool) -> Iterator[StepBar]:
    """Show a bar on stderr inside the block; in the end it is full.

    Args:
        expected: Steps, as far as they can be told; None where a time limit decides.
        shown: Whether there is one at all.
    """
    with tqdm(total=expected, desc="healing", unit="step", disable=not shown, file=sys.stderr) as bar:
        yield StepBar(bar)
        bar.total = bar.n  # trials may have been fewer or more
        bar.refresh()


__all__ = ["StepBar", "step_bar"]
