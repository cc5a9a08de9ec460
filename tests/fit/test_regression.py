"""Regression of o_proj against least squares on the rows themselves, in float64."""

import numpy as np
import pytest
import torch

from mea_compress.fit.regression import OutputRegression
from mea_compress.layers.stream import stream_size

SEQUENCES, LENGTH, WIDTH, HIDDEN = 12, 10, 6, 4


def rows(noise, seed=0):
    """What o_proj reads, the stream, and what is missing to it from a true weight, with some noise; and that weight."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
    stream = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator) * (
        1 + 50 * (torch.arange(LENGTH) == 0)[:, None]
    )
    weight = torch.randn(HIDDEN, WIDTH, generator=generator)
    missing = mixed @ weight.T + noise * stream * torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator)
    return mixed, missing, stream, weight.double().numpy()


def regression_of(mixed, missing, stream, batch=5):
    regression = OutputRegression(WIDTH, HIDDEN)
    size = stream_size(stream, stream)
    for part in zip(mixed.split(batch), missing.split(batch), size.split(batch), strict=True):
        regression.add(*part)
    return regression


def error(weight, mixed, missing, stream):
    """Squared error relative to the size of each token's stream, over that of sending nothing."""
    size = stream.double().square().mean(-1, keepdim=True)
    left = missing.double() - mixed.double() @ torch.from_numpy(weight).T
    return float((left.square() / size).sum() / (missing.double().square() / size).sum())


def test_the_weight_solves_ridge_regression_towards_the_old_one():
    mixed, missing, stream, true = rows(0.3)
    old = true + np.random.default_rng(1).normal(size=true.shape)
    found, left = regression_of(mixed, missing, stream).solve(old)
    size = stream.square().mean(-1, keepdim=True).sqrt()
    z = (mixed / size).double().reshape(-1, WIDTH).numpy()
    y = (missing / size).double().reshape(-1, HIDDEN).numpy()
    expected = []
    for strength in (0.3, 0.1, 0.03, 0.01, 0.003):  # rows for the penalty, and plain least squares
        penalty = np.sqrt(strength * np.square(z).sum() / WIDTH)
        stacked = np.concatenate((z, penalty * np.eye(WIDTH)))
        goal = np.concatenate((y, penalty * old.T))
        expected.append(np.linalg.lstsq(stacked, goal, rcond=None)[0].T)
    assert min(np.abs(found - one).max() for one in expected) < 1e-4
    own = error(found, mixed, missing, stream)
    assert own < left < 1.5 * own
    assert error(found, mixed, missing, stream) < 0.5 * error(old, mixed, missing, stream)


def test_an_old_weight_that_does_best_elsewhere_stays():
    mixed, missing, stream, true = rows(3.0)
    found, left = regression_of(mixed, missing, stream).solve(true)
    assert found is true
    assert left == pytest.approx(error(true, mixed, missing, stream), rel=1e-4)


def test_batches_of_any_size_give_the_same_folds():
    task = rows(1.0)  # with less noise the error is a small difference of sums, which every processor rounds otherwise
    old = np.zeros((HIDDEN, WIDTH))
    one, other = (regression_of(*task[:3], batch=batch).solve(old) for batch in (12, 1))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert one[1] == pytest.approx(other[1], rel=1e-5)


def test_one_sequence_and_heads_that_send_nothing_change_nothing():
    mixed, missing, stream, true = rows(0.3)
    assert regression_of(mixed[:1], missing[:1], stream[:1]).solve(true)[0] is true
    assert regression_of(torch.zeros_like(mixed), missing, stream).solve(true)[0] is true


def test_a_token_that_only_the_compressed_model_makes_large_decides_nothing():
    """Models make a few tokens a hundred times as large; a compressed one may do so with one that is ordinary."""
    mixed, _, stream, true = rows(0.0)
    compressed = stream - mixed @ torch.from_numpy(true).float().T
    compressed[3, 5] += 1e3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(7))
    old = true + np.random.default_rng(1).normal(size=true.shape)
    regression = OutputRegression(WIDTH, HIDDEN)
    regression.add(mixed, stream - compressed, stream_size(stream, compressed))
    found, _ = regression.solve(old)
    ordinary, _ = regression_of(mixed, mixed @ torch.from_numpy(true).float().T, stream).solve(old)
    assert np.abs(found - true).max() < 2 * np.abs(ordinary - true).max() < 0.2 * np.abs(old - true).max()
