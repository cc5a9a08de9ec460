"""Ridge regression of o_proj on what the compressed layers really send (METHOD §9).

A composed layer's attention sends other heads than the original's. Its o_proj is fitted again, so that the residual
stream behind the attention comes as close as can be to the original's: the regressors are the heads' outputs in the
compressed model, the target is what is missing to the original's stream, so that errors of earlier layers are corrected
as well. Every token counts relative to the size of its stream (`stream_size`). The penalty pulls towards the old
weight; its strength is the one that does best on sequences that the weight was not fitted to.
"""

from typing import Any

import numpy as np
import torch

from mea_compress.checkpoint import as_array
from mea_compress.heads.composed import Array
from mea_compress.processes import add_up

_FOLDS = 2
_STRENGTHS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Penalties that are tried, as a share of the regressors' mean square."""


class OutputRegression:
    """Accumulate the normal equations of o_proj over batches, and solve them.

    Args:
        regressors: Numbers that o_proj reads, Hq · d.
        targets: Numbers that it makes, D.
    """

    def __init__(self, regressors: int, targets: int) -> None:
        self.gram = np.zeros((_FOLDS, regressors, regressors))  # Z Zᵀ
        self.cross = np.zeros((_FOLDS, targets, regressors))  # Y Zᵀ
        self.whole = 0.0  # ‖Y‖²
        self.rows = 0

    def add(
        self,
        mixed: torch.Tensor,
        missing: torch.Tensor,
        size: torch.Tensor,
        turns: torch.Tensor | None = None,
    ) -> None:
        """Add one batch; sequences go to the folds in turn.

        Args:
            mixed: What o_proj reads in the composed layer, (B, T, Hq * d).
            missing: What it should send, (B, T, D).
            size: Mean square of each token's stream, (B, T, 1).
            turns: Whose turn each sequence is, (B,), where other processes have those between.
        """
        share = size.float().rsqrt()
        mixed, missing = mixed.float() * share, missing.float() * share
        for fold in range(_FOLDS):
            own: Any = slice((fold - self.rows) % _FOLDS, None, _FOLDS)
            if turns is not None:
                own = (turns % _FOLDS == fold).to(mixed.device)
            z, y = mixed[own].flatten(0, 1), missing[own].flatten(0, 1)
            self.gram[fold] += as_array((z.T @ z).cpu())
            self.cross[fold] += as_array((y.T @ z).cpu())
            self.whole += float(y.square().sum())
        self.rows += len(mixed)

    def add_processes(self) -> None:
        """Take the sums of all processes, each of which has added its own sequences."""
        self.gram, self.cross = (add_up(torch.from_numpy(sums)).numpy() for sums in (self.gram, self.cross))
        self.whole, rows = add_up(torch.tensor([self.whole, self.rows], dtype=torch.float64)).tolist()
        self.rows = int(rows)

    def solve(self, weight: Array) -> tuple[Array, float]:
        """Fit the weight.

        Args:
            weight: The old weight, (D, Hq * d), float64.

        Returns:
            The new weight, (D, Hq * d), float64, which is the old one where no regression does better; and its squared
            error on sequences that it was not fitted to, over that of sending nothing.
        """
        gram, cross = self.gram.sum(0), self.cross.sum(0)
        error = self.whole + _added_error(weight, np.zeros_like(weight), gram, cross)
        best, strength = 0.0, None  # errors less that of the old weight
        for tried in _STRENGTHS if self.rows >= _FOLDS and gram.any() else ():
            gained = 0.0
            for own, own_cross in zip(self.gram, self.cross, strict=True):
                change = _change(weight, gram - own, cross - own_cross, tried)
                gained += _added_error(change, weight, own, own_cross)
            if gained < best:
                best, strength = gained, tried
        fitted = weight if strength is None else weight + _change(weight, gram, cross, strength)
        return fitted, (error + best) / max(self.whole, 1e-300)


def _change(weight: Array, gram: Array, cross: Array, strength: float) -> Array:
    """Return the change of the weight that has the least squared error and penalty."""
    penalty = strength * gram.trace() / len(gram)
    residual = cross - weight @ gram
    return np.linalg.solve(gram + penalty * np.eye(len(gram)), residual.T).T


def _added_error(change: Array, weight: Array, gram: Array, cross: Array) -> float:
    """Return the squared error of a changed weight less that of the weight itself."""
    return float((((change + 2 * weight) @ gram - 2 * cross) * change).sum())
