"""The stages of healing: which weights of a student learn, few of them first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mea_compress.architectures.geometry import beside_language
from mea_compress.errors import RequestError
from mea_compress.fit.refinement import kept_by_forms, mask_cross_group_gradients
from mea_compress.loading import seeded
from mea_compress.modeling.attention_mea import MeaAttention
from mea_compress.text.formats import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGES = ("compositions", "components", "attention", "lora", "all")
"""Each trains what the one before it does and more, but that `all` has the weights themselves and no adapters."""

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
_COMPOSITION = re.compile(r"\.(key|value)_composition\.")
_COMPONENTS = re.compile(r"\.(key_composition|value_composition|k_proj|v_proj)\.")
_RANK = 16
"""Of the adapters; their scale is twice as much, as usual."""


def parse_stages(train: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stages that a list such as ``compositions,attention`` names, in order.

    Raises:
        RequestError: One is unknown, or needs peft, which is not installed.
    """
    names = train.split(",") if isinstance(train, str) else train
    stages = tuple(name.strip() for name in names)
    for name in stages:
        if name not in STAGES:
            raise RequestError(f"`train` {name} is unknown: use {', '.join(STAGES[:-1])} or {STAGES[-1]}")
    if not stages:
        raise RequestError(f"`train` names nothing: use {', '.join(STAGES[:-1])} or {STAGES[-1]}")
    if "lora" in stages:
        require("peft", "`train` lora")
    return stages


class Stages:
    """Prepares a student for one stage after the other.

    Args:
        model: The student; its parameters are frozen or not, and in a stage `lora` it has adapters of peft.
        seed: Of the adapters.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.trained: set[str] = set()
        self.largest = 0
        self._adapted: Any = None
        self._targets: list[str] = []

    def begin(self, stage: str) -> None:
        """Let what a stage trains learn, and freeze all else, such as heads that a form promises to keep.

        Raises:
            RequestError: The student has no such weights.
        """
        self.end()
        if stage == "lora":
            self._add_adapters()
        parameters = _trainable(self.model, stage)
        self.largest = max(self.largest, sum(parameter.numel() for parameter in parameters.values()))
        adapted = [f"{target}.weight" for target in self._targets]
        self.trained |= {name for name in parameters if "lora_" not in name} | set(adapted)

    def share(self, teacher: PreTrainedModel, products: torch.dtype) -> None:
        """Let the student have its original's tensors where they equal its own and no stage trains them.

        Args:
            teacher: The original, whose weights nothing trains.
            products: What matrix products are computed in: linear maps are shared if the original has them so, and
                everything else in the dtype that it has in the student.
        """
        originals = dict(teacher.named_parameters(remove_duplicate=False))
        learning = {id(weight) for name, weight in self.model.named_parameters() if name in self.trained}
        for path, module in self.model.named_modules():
            narrow = products != torch.float32 and isinstance(module, nn.Linear)
            for name, weight in module.named_parameters(path, recurse=False):
                own = originals.get(name)
                if own is None or own.shape != weight.shape or weight.requires_grad or id(weight) in learning:
                    continue
                if own.dtype == (products if narrow else weight.dtype) and torch.equal(weight, own.to(weight.dtype)):
                    weight.data = own.data

    def end(self) -> None:
        """Merge what adapters have learnt into the weights that they stand beside; names are what they were."""
        if self._adapted is not None:
            self._adapted.merge_and_unload()
            self._adapted, self._targets = None, []

    def _add_adapters(self) -> None:
        import peft

        head = self.model.get_output_embeddings()
        towers = set(beside_language(self.model))
        self._targets = [
            name
            for name, module in self.model.named_modules()
            if type(module) is nn.Linear and module is not head and not _ATTENTION.search(f"{name}.")
            if module not in towers
        ]
        if not self._targets:
            raise RequestError("the student has no linear maps outside attention: leave lora out of `train`")
        config = peft.LoraConfig(r=_RANK, lora_alpha=2 * _RANK, lora_dropout=0.0, target_modules=self._targets)
        with seeded(self.seed, self.model.device):
            self._adapted = peft.get_peft_model(self.model, config)


def _trainable(model: nn.Module, stage: str) -> dict[str, nn.Parameter]:
    """Return the parameters that a stage trains by name, and freeze all others, towers for images and sound too."""
    towers = {id(weight) for part in beside_language(model) for weight in part.parameters(recurse=False)}
    kept = tuple(
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, MeaAttention)
        for own in kept_by_forms(module)
    )

    def learns(name: str) -> bool:
        if stage == "all" or (stage == "lora" and "lora_" in name):
            return True
        if not _ATTENTION.search(name):
            return False
        pattern = {"compositions": _COMPOSITION, "components": _COMPONENTS}.get(stage)
        return pattern is None or pattern.search(name) is not None

    trainable = {
        name: parameter
        for name, parameter in model.named_parameters()
        if learns(name) and not name.startswith(kept) and id(parameter) not in towers
    }
    if not trainable:
        other = "attention" if stage in ("compositions", "components") else "all"
        raise RequestError(f"the student has no weights that {stage} would train: use {other} for `train`")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    mask_cross_group_gradients(model)
    return trainable


__all__ = ["STAGES", "Stages", "parse_stages"]
