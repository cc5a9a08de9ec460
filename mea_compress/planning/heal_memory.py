"""What each process of `heal` has in memory: weights, what the optimiser has of them, activations of a step."""

from __future__ import annotations

from math import ceil

_FLOAT32 = 4


def heal_weight_bytes(
    original: int, compressed: int, trained: int, embeddings: int, itemsize: int, processes: int = 1
) -> int:
    """Return the memory of weights, gradients and optimiser.

    Every process has all of both models; see `sharded_heal_weight_bytes` for those that share them out. The original
    stays as it is stored, or is float32 where its products are not made in bfloat16. What is trained is
    float32 with its gradient, Adam's two moments, where it began and the best so far, and once more as products take
    it; all else is the original's, but for embeddings where they have to be float32. While the student is loaded, all
    of it is float32.

    Args:
        original: Weights of the original.
        compressed: Weights of the student.
        trained: Those of them that learn.
        embeddings: Those that no linear map has, of tokens, unless the head is tied to them.
        itemsize: Bytes of a number as it is stored, 2 where products are bfloat16.
        processes: Several have the gradients once more, to send them.
    """
    teacher = itemsize * original
    loading = teacher + _FLOAT32 * compressed
    copies = 6 * _FLOAT32 + (itemsize if itemsize < _FLOAT32 else 0) + (_FLOAT32 if processes > 1 else 0)
    frozen = _FLOAT32 * embeddings if itemsize < _FLOAT32 else 0
    return max(loading, teacher + frozen + copies * trained)


def sharded_heal_weight_bytes(
    original: int,
    compressed: int,
    trained: int,
    embeddings: int,
    head: int,
    layers: int,
    itemsize: int,
    processes: int,
) -> int:
    """Return the memory of weights, gradients and optimiser in each of several processes that shard both models.

    Of the original a process has its part as it is stored, of the student in float32, and of what is trained also that
    of its gradient, Adam's two moments, where it began and the best so far. Whole are what is outside the layers, of
    both models, two layers, the next being fetched, and the gradients of one.

    Args:
        original: Weights of the original.
        compressed: Weights of the student.
        trained: Those of them that learn, in its layers.
        embeddings: Those that no linear map has, of tokens, unless the head is tied to them.
        head: Those of the language-model head.
        layers: Of either model.
        itemsize: Bytes of a number as it is stored, 2 where products are bfloat16.
        processes: Two or more.
    """
    parts = itemsize * original + _FLOAT32 * (compressed + 5 * trained)
    around = itemsize * (2 * head + embeddings) + _FLOAT32 * embeddings
    layer = (max(original, compressed) - embeddings - head) / layers
    gradients = (itemsize + _FLOAT32) * trained / layers
    return ceil(parts / processes + around + 2 * itemsize * layer + gradients)


def heal_step_bytes(
    layers: int,
    hidden: int,
    inner: int,
    vocabulary: int,
    sequences: int,
    length: int,
    itemsize: int,
    checkpointing: bool = False,
) -> int:
    """Return the memory of what a step keeps for its gradients, and of the logits of a sequence.

    The outputs of both models' layers are compared (`match_hidden`), for which the original's are kept.

    Args:
        layers: Of the model.
        hidden: Channels of its stream.
        inner: Channels of its MLP.
        vocabulary: Tokens.
        sequences: That a process runs at once: its part of the batch on a GPU, 1,024 tokens of it on a CPU.
        length: Tokens of a sequence.
        itemsize: Bytes of a number in products.
        checkpointing: Whether a layer keeps its input alone, and is run again.
    """
    tokens = sequences * length
    layer = itemsize * tokens * (18 * hidden + 8 * inner)
    kept = layers * itemsize * tokens * hidden + layer if checkpointing else layers * layer
    compared = layers * _FLOAT32 * tokens * hidden  # or, in its place, the gradients of what they are compared with
    return kept + compared + 5 * _FLOAT32 * length * vocabulary


__all__ = ["heal_step_bytes", "heal_weight_bytes", "sharded_heal_weight_bytes"]
