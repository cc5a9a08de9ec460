"""How far a model is from text and from its original: cross-entropy, KL divergence and top-1 agreement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mea_compress.errors import RequestError
from mea_compress.loading import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_LOGITS = 2**26
_MAX_COMPARED_LOGITS = 2**23


@dataclass(frozen=True)
class Comparison:
    """Sums over the predicted tokens of some sequences, losses in nats (float64).

    Attributes:
        tokens: Predictions compared.
        cross_entropy: Of the model.
        kl: KL(reference ‖ model).
        reference_cross_entropy: Of the reference.
        agreements: Predictions whose likeliest token is the same in both.
    """

    tokens: int
    cross_entropy: float
    kl: float
    reference_cross_entropy: float
    agreements: int

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.tokens + other.tokens,
            self.cross_entropy + other.cross_entropy,
            self.kl + other.kl,
            self.reference_cross_entropy + other.reference_cross_entropy,
            self.agreements + other.agreements,
        )


NOTHING = Comparison(0, 0.0, 0.0, 0.0, 0)


def max_batch_size(length: int, vocabulary: int) -> int:
    """Return how many sequences have logits of at most 256 MiB in float32, at least one."""
    return max(1, _MAX_LOGITS // (length * vocabulary))


@torch.no_grad()
def compare_logits(
    logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor, mask: torch.Tensor
) -> Comparison:
    """Sum cross-entropy, KL(reference ‖ model) and top-1 agreement over logits, some positions at a time.

    Computed in float64 where the device has it.

    Args:
        logits: (B, T, V), any floating dtype.
        reference: (B, T, V) or None.
        ids: (B, T), int64; the prediction at t is judged by ids[t + 1].
        mask: (B, T), bool, False where ids are padding.

    Returns:
        Sums over the predictions whose target is not padding; what needs a reference is 0 without one.
    """
    is_target = mask[:, 1:].flatten()
    positions = is_target.nonzero().squeeze(1)
    targets = ids[:, 1:].flatten()[positions]
    batch, length, vocabulary = logits.shape
    positions = positions // (length - 1) * length + positions % (length - 1)
    flat = logits.reshape(batch * length, vocabulary)
    flat_reference = None if reference is None else reference.reshape(batch * length, vocabulary).to(flat.device)
    step = max(1, _MAX_COMPARED_LOGITS // vocabulary)
    total = NOTHING
    exact = torch.float32 if flat.device.type == "mps" else torch.float64
    for start in range(0, len(positions), step):
        chunk, target = positions[start : start + step], targets[start : start + step, None]
        log_p = flat[chunk].to(exact).log_softmax(-1)
        loss, kl, reference_loss, agreements = -log_p.gather(1, target).sum().item(), 0.0, 0.0, 0
        if flat_reference is not None:
            log_r = flat_reference[chunk].to(exact).log_softmax(-1)
            reference_loss = -log_r.gather(1, target).sum().item()
            # 0 · (−∞ − x) is 0: a token the reference rules out adds nothing.
            kl = torch.where(log_r == -torch.inf, 0.0, log_r.exp() * (log_r - log_p)).sum().item()
            agreements = int((log_r.argmax(-1) == log_p.argmax(-1)).sum())
        total += Comparison(len(chunk), loss, kl, reference_loss, agreements)
    return total


@torch.no_grad()
def compare_models(
    model: PreTrainedModel, reference: PreTrainedModel | None, ids: torch.Tensor, mask: torch.Tensor
) -> Comparison:
    """Compare one batch with `compare_logits`: a forward pass of each model, padding masked, nothing cached.

    Args:
        model: Causal language model.
        reference: Causal language model of the same vocabulary, or None.
        ids: (B, T), int64.
        mask: (B, T), bool, False where ids are padding.
    """
    logits = _logits(model, ids, mask)
    reference_logits = None if reference is None else _logits(reference, ids, mask)
    return compare_logits(logits, reference_logits, ids.to(logits.device), mask.to(logits.device))


def _logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    attention_mask = None if bool(mask.all()) else mask.long().to(device)
    return model(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False).logits


def check_same_vocabulary(
    model: PreTrainedModel, reference: PreTrainedModel, names: tuple[Path | str, Path | str]
) -> None:
    """Check that two models predict the same tokens.

    Args:
        model: Causal language model.
        reference: The model it is compared with.
        names: What the message calls them.

    Raises:
        RequestError: Their vocabularies differ in size.
    """
    size, reference_size = vocabulary_size(model), vocabulary_size(reference)
    if size != reference_size:
        raise RequestError(
            f"{names[0]} has a vocabulary of {size} and {names[1]} one of {reference_size}: "
            "give the original it was made from"
        )


__all__ = ["NOTHING", "Comparison", "check_same_vocabulary", "compare_logits", "compare_models", "max_batch_size"]
