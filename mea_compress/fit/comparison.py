"""Compare what models say next, from the hidden states that their last layers send."""

from __future__ import annotations

import torch

from mea_compress.layers.runner import HeadRunner, batches

# Tokens whose distributions over the vocabulary are in memory at once; of fewer more stays in a processor's caches.
_TOKENS, _TOKENS_ON_CPU = 512, 128


def compare_streams(
    head: HeadRunner, tokens: torch.Tensor, original: torch.Tensor, others: torch.Tensor
) -> tuple[float, list[tuple[float, float]]]:
    """Compare next-token distributions behind the last layer.

    Args:
        head: Makes distributions of hidden states.
        tokens: The sequences, (M, T), int64.
        original: What the original's last layer sends, (M, T, D).
        others: The same of C compressed models, (C, M, T, D).

    Returns:
        The original's cross-entropy; KL(original ‖ other) and cross-entropy of each of the others, in nats per token.
    """
    labels = tokens[:, 1:].flatten()
    streams = [one[:, :-1].flatten(0, 1) for one in (original, *others)]  # (N, D) each
    sums = torch.zeros(len(streams), 2, dtype=torch.float64)
    for part in batches(len(labels), _TOKENS_ON_CPU if head.device.type == "cpu" else _TOKENS):
        expected = head.log_probabilities(streams[0][part])  # (N, V)
        probabilities, chosen = expected.exp(), labels[part, None].to(expected.device)
        for index, stream in enumerate(streams):
            found = head.log_probabilities(stream[part]) if index else expected
            sums[index, 0] += float((probabilities * (expected - found)).sum())
            sums[index, 1] -= float(found.gather(1, chosen).sum())
    means = (sums / len(labels)).tolist()
    return means[0][1], [(kl, cross_entropy) for kl, cross_entropy in means[1:]]
