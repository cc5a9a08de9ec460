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
_SLICE, _SLICE_ON_CPU = 2**23, 2**19


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


@dataclass(frozen=True)
class Predictions:
    """What one model predicts in one batch: its logits as they are, and what comparing asks of each of N targets.

    Attributes:
        logits: (B·T, V), any floating dtype, not copied.
        positions: (N,), int64, the rows of `logits` whose next token is not padding.
        maxima: (N, 1), the largest logit of each; float32, or float64 where the logits are.
        log_sums: (N,), float64 on the CPU, log Σ exp(logit − maximum) over the vocabulary.
        losses: (N,), float64 on the CPU, nats.
        likeliest: (N,), int64, the first of the likeliest tokens.
    """

    logits: torch.Tensor
    positions: torch.Tensor
    maxima: torch.Tensor
    log_sums: torch.Tensor
    losses: torch.Tensor
    likeliest: torch.Tensor


@torch.no_grad()
def predictions(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Predictions:
    """Return what logits predict, a slice of positions at a time: softmax in float32, sums of tokens in float64.

    Logits in float64 stay in it.

    Args:
        logits: (B, T, V), any floating dtype.
        ids: (B, T), int64; the prediction at t is judged by ids[t + 1].
        mask: (B, T), bool, False where ids are padding.
    """
    batch, length, vocabulary = logits.shape
    positions = mask[:, 1:].flatten().nonzero().squeeze(1)
    targets = ids[:, 1:].flatten()[positions, None]
    positions = positions // (length - 1) * length + positions % (length - 1)
    flat = logits.reshape(batch * length, vocabulary)
    computed = torch.promote_types(flat.dtype, torch.float32)
    found: list[tuple[torch.Tensor, ...]] = [(flat.new_empty(0, dtype=computed),) * 3 + (positions[:0],)]
    for rows, target in zip(_slices(positions, flat), _slices(targets, flat), strict=True):
        chunk = flat[rows].to(computed)
        maximum, likeliest = chunk.amax(-1, keepdim=True), chunk.argmax(-1)
        chunk -= maximum
        of_target = chunk.gather(1, target).squeeze(1)
        found.append((maximum.squeeze(1), chunk.exp_().sum(-1), of_target, likeliest))
    maxima, sums, of_targets, likeliest = (torch.cat(parts) for parts in zip(*found, strict=True))
    log_sums = sums.cpu().double().log()
    return Predictions(flat, positions, maxima[:, None], log_sums, log_sums - of_targets.cpu().double(), likeliest)


def _slices(rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split rows (N, …) so that the logits of a part stay in the cache of a processor."""
    largest = _SLICE_ON_CPU if logits.device.type == "cpu" else _SLICE
    return rows.split(max(1, largest // logits.shape[1]))


@torch.no_grad()
def compare(model: Predictions, reference: Predictions | None) -> Comparison:
    """Sum cross-entropy, KL(reference ‖ model) and top-1 agreement.

    With logits shifted by their maximum, a of the reference and b of the model, and Z their sums of exponentials,
    KL = Σ exp(a)(a − b) / Z_a − log Z_a + log Z_b: only the first term is taken from float32, where nothing cancels.

    Args:
        model: Of `predictions`.
        reference: The same targets predicted by the reference, or None.

    Returns:
        Sums over the targets; what needs a reference is 0 without one.
    """
    tokens, loss = len(model.positions), model.losses.sum().item()
    if reference is None:
        return Comparison(tokens, loss, 0.0, 0.0, 0)
    divergence = model.log_sums - reference.log_sums + _mean_difference(model, reference)
    likeliest = reference.likeliest.to(model.likeliest.device)
    return Comparison(
        tokens=tokens,
        cross_entropy=loss,
        kl=divergence.sum().item(),
        reference_cross_entropy=reference.losses.sum().item(),
        agreements=int((likeliest == model.likeliest).sum()),
    )


def _mean_difference(model: Predictions, reference: Predictions) -> torch.Tensor:
    """Return Σ exp(a)(a − b) / Z_a of every target, (N,), float64 on the CPU."""
    computed = torch.promote_types(model.maxima.dtype, reference.maxima.dtype)
    found = [model.maxima.new_empty(0, dtype=computed)]
    parts = (
        (model.positions, model),
        (model.maxima, model),
        (reference.positions, reference),
        (reference.maxima, reference),
    )
    for rows, maxima, reference_rows, reference_maxima in zip(
        *(_slices(part, whole.logits) for part, whole in parts), strict=True
    ):
        a = reference.logits[reference_rows].to(computed).sub_(reference_maxima)
        b = model.logits[rows].to(computed).sub_(maxima).to(a.device)
        difference, weight = a - b, a.exp_()
        total = torch.linalg.vecdot(weight, difference)
        if bool(total.isnan().any()):
            # 0 · (−∞ − x) is 0: a token the reference rules out adds nothing.
            total = torch.where(weight == 0, 0.0, weight * difference).sum(-1)
        found.append(total.to(maxima.device))
    return torch.cat(found).cpu().double() / reference.log_sums.exp()


@torch.no_grad()
def predict(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, padded: bool = True) -> Predictions:
    """Return what a model predicts in one batch: a forward pass, padding masked, nothing cached.

    Args:
        model: Causal language model.
        ids: (B, T), int64.
        mask: (B, T), bool, False where ids are padding.
        padded: Otherwise no ids are padding, and those where the mask is False are read and not judged.
    """
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    attention_mask = None if not padded or bool(mask.all()) else mask.long()
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    return predictions(logits, ids.to(logits.device), mask.to(logits.device))


def compare_models(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    ids: torch.Tensor,
    mask: torch.Tensor,
    padded: bool = True,
) -> Comparison:
    """Compare one batch as `compare` does: a forward pass of each model.

    Args:
        model: Causal language model.
        reference: Causal language model of the same vocabulary, or None.
        ids: (B, T), int64.
        mask: (B, T), bool, False where ids are padding.
        padded: See `predict`.
    """
    expected = None if reference is None else predict(reference, ids, mask, padded)
    return compare(predict(model, ids, mask, padded), expected)


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


__all__ = [
    "NOTHING",
    "Comparison",
    "Predictions",
    "check_same_vocabulary",
    "compare",
    "compare_models",
    "max_batch_size",
    "predict",
    "predictions",
]
