"""The loss of a distillation: KL(teacher ‖ student) of the next-token distributions, and what may stand beside it.

`whole_loss` is the plain one, which has all logits in memory; `sliced_loss` is the same with those of one sequence at a
time, wherever a model's head alone makes its logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mea_compress.errors import RequestError
from mea_compress.layers.stream import stream_size
from mea_compress.training.head_loss import HeadLoss, whole_row
from mea_compress.training.settings import DistillationSettings
from mea_compress.training.sharding import reshard, run_base
from mea_compress.training.top_logits import top_divergence, top_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = ("self_attn", "self_attention", "attention", "attn")  # what families call their attention blocks
_AGREEMENT = 1e-3  # of logits made in slices with the model's own, relative to the largest


@dataclass(frozen=True)
class Terms:
    """What a loss is made of.

    Attributes:
        temperature: Divides the logits of both models for the KL.
        cross_entropy: Share of the text's own.
        top_logits: Tokens that are told apart, see `top_divergence`; None for the whole vocabulary.
        match_hidden: Weight of the error of every layer's output; see `_relative_error`.
        match_attention: Weight of the error of every attention block's output.
    """

    temperature: float = 1.0
    cross_entropy: float = 0.0
    top_logits: int | None = None
    match_hidden: float = 0.0
    match_attention: float = 0.0


class DistillationLoss(nn.Module):
    """The loss of a student as a module, so that whatever wraps a model for several processes wraps this.

    Args:
        student: The model that is trained.
        teacher: Its original; no part of the module.
        settings: Temperature, cross-entropy, products.
        sliced: Whether each model's head alone makes its logits, so that those of one sequence at a time will do.
        per_sequence: Tokens that count in a sequence, on average; None where all do.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        settings: DistillationSettings,
        sliced: bool,
        per_sequence: float | None = None,
    ) -> None:
        super().__init__()
        self.student, self.settings, self.sliced, self.per_sequence = student, settings, sliced, per_sequence
        self.share_of_matching = 1.0
        object.__setattr__(self, "teacher", teacher)

    def train(self, mode: bool = True) -> DistillationLoss:
        """Leave dropout off, which the teacher has not: only what is run again for its gradients is in training."""
        super().train(False)
        if mode and self.settings.gradient_checkpointing:
            for module in self.student.modules():
                if getattr(module, "gradient_checkpointing", False):
                    _without_dropout(module)
                    module.training = True
        return self

    def forward(
        self, input_ids: torch.Tensor, counted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss per token of ids (B, T), of which those that count may be given, (B, T).

        Returns:
            All of it, and without gradients what of it is of predictions, or all of it where that is not finite.
        """
        loss_of = sliced_loss if self.sliced else whole_loss
        teacher: Any = self.teacher
        # By the average of all sequences, so that it does not matter how they are shared out.
        weights = None if counted is None else _weights(counted, len(counted) * (self.per_sequence or 1))
        settings = self.settings
        terms = Terms(
            settings.temperature,
            settings.cross_entropy,
            settings.top_logits,
            match_hidden=self.share_of_matching * (settings.match_hidden or 0.0),
            match_attention=self.share_of_matching * settings.match_attention,
        )
        with autocast(teacher, settings.products):
            of_predictions, of_states = loss_of(self.student, teacher, input_ids, terms, weights)
        loss = of_predictions + of_states
        return loss, of_predictions.detach() if loss.isfinite() else loss.detach()


def _without_dropout(module: nn.Module) -> None:
    """Set a module's own probabilities of leaving something out to zero: some layers drop in functions of their own."""
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float):
            setattr(module, name, 0.0)


def whole_loss(
    model: Any,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    terms: Terms = Terms(),
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss per token of ids (B, T): KL(teacher ‖ model), and a share of cross-entropy.

    Args:
        model: The student.
        teacher: Its original.
        ids: (B, T), int64.
        terms: What the loss is made of.
        weights: Of the prediction at every position, (B, T); None for all of them alike.

    Returns:
        The loss of predictions, and the weighted errors that are to be added to it.
    """
    more = {"use_cache": False, "output_hidden_states": terms.match_hidden > 0}
    with torch.no_grad(), _attention_outputs(teacher, terms.match_attention > 0) as targets:
        expected = teacher(input_ids=ids, **more)
        log_p = (expected.logits.float() / terms.temperature).log_softmax(-1)
    with _attention_outputs(model, terms.match_attention > 0) as outputs:
        found = model(input_ids=ids, **more)
    logits = found.logits.float()
    log_q = (logits / terms.temperature).log_softmax(-1)
    of_kl, of_text = _weights_of(ids, terms, weights)
    if terms.top_logits is None:
        divergence = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        divergence = top_divergence(log_p, log_q, terms.top_logits)
    loss = (of_kl * divergence).sum()
    if of_text is not None:
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = loss + (of_text[:, :-1].flatten() * losses).sum()
    layers = (terms.match_hidden, (found.hidden_states or ())[1:], (expected.hidden_states or ())[1:])
    return loss, _matched(loss, weights, layers, (terms.match_attention, outputs, targets))


def sliced_loss(
    model: Any,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    terms: Terms = Terms(),
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `whole_loss` returns, with the logits of one sequence at a time in memory."""
    with torch.no_grad(), _attention_outputs(teacher, terms.match_attention > 0) as targets:
        target, expected = base_states(teacher, ids, terms.match_hidden > 0)
    with _attention_outputs(model, terms.match_attention > 0) as outputs:
        hidden, found = base_states(model, ids, terms.match_hidden > 0)
    own, other = head_of(model), head_of(teacher)
    of_kl, of_text = _weights_of(ids, terms, weights)
    loss_of = whole_row if terms.top_logits is None else partial(top_row, count=terms.top_logits)
    loss = HeadLoss.apply(hidden, target, own, other, ids, weights, of_kl, of_text, terms.temperature, loss_of)
    layers = (terms.match_hidden, found[1:], expected[1:])
    return loss, _matched(loss, weights, layers, (terms.match_attention, outputs, targets))


def _weights(counted: torch.Tensor, total: float) -> torch.Tensor:
    """Return the weight of the prediction at every position, (B, T), from which tokens count when they are predicted.

    Args:
        counted: (B, T), bool.
        total: What the weights of a batch add up to 1 for.
    """
    return nn.functional.pad(counted[:, 1:] / total, (0, 1))


def _weights_of(
    ids: torch.Tensor, terms: Terms, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what KL and cross-entropy at every position of ids (B, T) count in the loss, (B, T) each or None."""
    if weights is None:
        everywhere = torch.ones_like(ids, dtype=torch.float32)
        of_kl, of_text = everywhere / ids.numel(), _weights(everywhere, ids[:, 1:].numel())
    else:
        of_kl = of_text = weights
    share = terms.cross_entropy
    return (1 - share) * terms.temperature**2 * of_kl, share * of_text if share else None


def base_states(
    model: PreTrainedModel, ids: torch.Tensor, every_layer: bool = False
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return what the language-model head reads, (B, T, D), and the outputs of every layer if they are asked for."""
    output = run_base(model, input_ids=ids, use_cache=False, output_hidden_states=every_layer)
    return output.last_hidden_state, output.hidden_states or ()


@contextmanager
def _attention_outputs(model: PreTrainedModel, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs (B, T, D) of a model's attention blocks while it runs in the block, if they are wanted.

    Raises:
        RequestError: It has no attention blocks that can be told.
    """
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    blocks = [each for name, each in model.named_modules() if name.rpartition(".")[2] in _ATTENTION] if wanted else []
    if wanted and not blocks:
        raise RequestError(f"the attention of a {type(model).__name__} cannot be told: leave `match_attention` out")
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:  # a layer that is run again for its gradients adds nothing
            handle.remove()


def _matched(
    like: torch.Tensor,
    weights: torch.Tensor | None,
    *sides: tuple[float, Sequence[torch.Tensor], Sequence[torch.Tensor]],
) -> torch.Tensor:
    """Return the weighted sum of the errors of states, a tensor like another one; see `_relative_error`.

    A side is a weight, the states found and those expected: of layers' outputs those behind the embeddings.
    """
    errors = (weight * _relative_error(found, expected, weights) for weight, found, expected in sides if weight)
    return sum(errors, torch.zeros_like(like))


def _relative_error(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> torch.Tensor:
    """Return |found - expected|² of states (…, B, T, D) over the size of each token, averaged over tokens and layers.

    Each token is measured by its own size, of which the first of a sequence has often a thousand times as much as the
    others, and by what it has in the model where that is more (`stream_size`). With weights (B, T) it counts as much as
    what is predicted from it.
    """
    # Made again for its gradients, so that of a layer no more is kept than its two outputs.
    errors = [
        checkpoint(_error_of, *states, weights, use_reentrant=False) for states in zip(found, expected, strict=True)
    ]
    return torch.stack(errors).mean()


def _error_of(found: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    found, expected = found.float(), expected.float()
    errors = (found - expected).square().mean(-1) / stream_size(expected, found.detach())[..., 0]
    return errors.mean() if weights is None else (errors * weights).sum((-2, -1)).mean()


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the language-model head of a model whose head alone makes its logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def autocast(model: PreTrainedModel, products: torch.dtype) -> torch.autocast:
    """Return what computes a model's matrix products in a dtype; nothing changes with float32."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, products, enabled=products != torch.float32)


@torch.no_grad()
def head_alone_makes_logits(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Return whether logits are the head applied to the base model's output, and the head is not trained.

    Families may scale or cap logits, which a loss made from hidden states would miss.
    """
    head = model.get_output_embeddings()
    if model.base_model is model:  # nothing that it would name makes hidden states alone
        return False
    if type(head) is not nn.Linear or any(weight.requires_grad for weight in head.parameters()):
        return False
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = head(base_states(model, ids)[0].to(head.weight.dtype)).float()
    reshard(model)
    return bool((found - expected).abs().max() <= _AGREEMENT * expected.abs().max())


@torch.no_grad()
def tell_the_same_layers(model: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Return whether the outputs of layers, which not all families tell, are as many in both models and as large.

    They are asked for in both ways that a loss may ask for them: with logits, and without.
    """
    shapes = []
    try:
        for one in (model, teacher):
            asked = {"input_ids": ids, "use_cache": False, "output_hidden_states": True}
            outputs = [one(**asked)] if one.base_model is one else [one(**asked), run_base(one, **asked)]
            shapes += [[state.shape for state in (getattr(each, "hidden_states", None) or ())[1:]] for each in outputs]
            reshard(one)
    except (AttributeError, IndexError, TypeError):  # of a family that was not made to be asked
        return False
    return shapes[0] != [] and all(found == shapes[0] for found in shapes)


__all__ = [
    "DistillationLoss",
    "Terms",
    "autocast",
    "base_states",
    "head_alone_makes_logits",
    "head_of",
    "sliced_loss",
    "tell_the_same_layers",
    "whole_loss",
]
