"""How a model is distilled: steps, step sizes, precision, what counts in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOOKS = 5
"""At the held-out text, in the full run."""
MATCH_HIDDEN = 30.0
"""What the error of the layers' outputs counts when a run begins, where nothing else is asked for
(`benchmarks/NOTES.md`)."""
_RATES = (0.00005, 0.00015, 0.0005, 0.0015, 0.005, 0.015, 0.05)
"""Step sizes to choose from, as a share of a tensor's root mean square: the nearer the original, the smaller."""
_LONG_TRIAL = 50  # so many trials are as long as the full run, where that is more than their usual steps
_TRIALS = 3  # as many as there mostly are
_LOOK_TOKENS = 1 << 13  # with a deadline half of them: looks were a tenth of 40 minutes


@dataclass(frozen=True)
class DistillationSettings:
    """How a model is distilled.

    Attributes:
        steps: Optimiser steps of the full run.
        batch_size: Sequences in a step.
        learning_rate: Peak, the same for all tensors; None tries `rates`.
        rates: Step sizes to choose from, ascending, as a share of a tensor's root mean square; see `next_rate`. One
            alone is taken as it is. The full run goes on from the best that a trial has come to.
        trial_rate: What is best in a trial, as an earlier, no longer distillation found it, in place of trials of this
            one: weights that it has left as its steps grew small lose at first by any step that gains in the end.
        products: What matrix products are computed in; trained weights are float32 all the same.
        seed: Of the order of sequences.
        temperature: By which the logits of both are divided; the loss is multiplied by its square, as usual.
        cross_entropy: Share of the text's own cross-entropy in the loss.
        gradient_checkpointing: Keep a layer's input alone for its gradients, and run it a second time: less memory.
        top_logits: Tokens of the teacher that the loss tells apart, all others being one; None for all of them.
        match_hidden: Weight of the error of every layer's output in the loss, see `_relative_error`, when the run
            begins; it falls as the step size does. None takes `MATCH_HIDDEN` where both models tell these outputs, less
            the share of cross-entropy.
        match_attention: Weight of the error of what every attention block sends to the stream; measured alike, and
            falling alike.
        deadline: When all is to be over, on the clock of `time.monotonic`: there are no more steps than fit, as long
            as those of the trials took; None for whenever. Without trials there are all steps, or with `rates` none
            where it is over already.
    """

    steps: int
    batch_size: int
    learning_rate: float | None = None
    rates: tuple[float, ...] = _RATES
    trial_rate: float | None = None
    products: torch.dtype = torch.float32
    seed: int = 0
    temperature: float = 1.0
    cross_entropy: float = 0.0
    gradient_checkpointing: bool = False
    top_logits: int | None = None
    match_hidden: float | None = None
    match_attention: float = 0.0
    deadline: float | None = None

    @property
    def trial_steps(self) -> int:
        """Optimiser steps of one trial: a deadline may leave few of all the steps, so they are fewer with one.

        A long run has longer ones: what little is left to gain is not seen in 20 steps of all weights.
        """
        if self.deadline is not None:
            return max(3, min(12, self.steps // 20))
        return max(3, min(20, self.steps // 20), self.steps // _LONG_TRIAL)

    @property
    def look_tokens(self) -> int:
        """Tokens of the held-out text in one look."""
        return _LOOK_TOKENS if self.deadline is None else _LOOK_TOKENS // 2

    @property
    def all_steps(self) -> int:
        """Optimiser steps, trials among them, of which there are more or fewer as they turn out."""
        known = self.learning_rate is not None or self.trial_rate is not None or len(self.rates) == 1
        return self.steps + (0 if known else min(_TRIALS, len(self.rates)) * self.trial_steps)


__all__ = ["LOOKS", "MATCH_HIDDEN", "DistillationSettings"]
