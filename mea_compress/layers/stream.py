"""How large a token's residual stream is: what its errors are measured by (METHOD §9)."""

import torch


def stream_size(original: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each token's stream, of the model where it is larger: (..., 1), float32.

    A norm follows wherever the stream is read, so that an error counts by the size of what it is part of. Models make a
    few tokens, mostly a sequence's first, a hundred times as large as all others, and a compressed model may make one
    of a token that is ordinary in the original. By the original's size alone its error would be ten thousand times
    any other's, and whatever is fitted would be fitted to that token.

    Args:
        original: The original's residual stream, (..., D).
        compressed: The compressed model's, of the same tokens, (..., D).

    Example:
        >>> stream_size(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 3.0]]))
        tensor([[9.]])
    """
    sizes = [stream.float().square().mean(-1, keepdim=True) for stream in (original, compressed)]
    return torch.maximum(*sizes).clamp(min=1e-12)


__all__ = ["stream_size"]
