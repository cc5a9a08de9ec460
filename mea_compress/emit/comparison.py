"""How far two results may be apart where a checkpoint is verified."""

import math

import torch

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest number compared, when everything is computed in float32."""
TOKENS = 24
"""Tokens that are looked at."""
DECODED_TOKENS = 8
"""Tokens that are decoded greedily after a prompt, with a cache and without."""


def relative_difference(measured: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected number; infinite where something is not a number."""
    error = float((measured - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error
