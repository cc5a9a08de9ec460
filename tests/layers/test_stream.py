"""The size of a token's stream, by which errors are measured, against numpy in float64."""

import numpy as np
import torch

from mea_compress.layers.stream import stream_size


def test_the_size_is_that_of_the_larger_of_both_streams():
    original, compressed = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    compressed[1, 2] *= 100  # a token that the compressed model alone makes large
    original[0, 0] *= 100  # and one that the original alone does
    squares = [np.square(stream.double().numpy()).mean(-1, keepdims=True) for stream in (original, compressed)]
    np.testing.assert_allclose(stream_size(original, compressed).numpy(), np.maximum(*squares), rtol=1e-6)


def test_whatever_is_lost_of_a_token_counts_no_more_than_four_of_its_size():
    original, compressed = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()
    for factor in (1e-3, 1.0, 1e3, -1.0):
        error = (original * factor - compressed).square().mean(-1, keepdim=True)
        assert (error / stream_size(original * factor, compressed) <= 4).all()


def test_tokens_without_a_stream_have_a_size():
    nothing = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert (stream_size(nothing, nothing) > 0).all() and stream_size(nothing, nothing).dtype == torch.float32
