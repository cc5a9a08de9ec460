"""The student of a distillation whose attention blocks stay their family's own, composed at their cache.

It is the original's model with the same tensors, but for what is trained: encoders and decoders, and those linear maps
of the composed blocks that neither keys nor values are made by, such as q_proj, o_proj and gates. Which these are is
seen from the gradients of what the blocks hand to their cache.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mea_compress.checkpoint import CheckpointReader
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.emit.weights import layer_directory
from mea_compress.fit.refinement import trainable_parameters
from mea_compress.layers.blocks import ObservedAttention, recorded
from mea_compress.modeling.encoded_mea import compose_block
from mea_compress.planning.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOOKED_AT = 4  # tokens


def make_block_student(
    plan: Plan, workspace: Workspace, teacher: PreTrainedModel, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[int, dict[str, nn.Parameter]]]:
    """Return the compressed model, which shares with the original whatever is not trained.

    Args:
        plan: What was done.
        workspace: Where the fitted layers are.
        teacher: The original; its weights get no gradients.
        dtype: Of the weights that are trained.

    Returns:
        The student, in evaluation mode; and for each composed layer its trained weights by their names below its
        attention block.
    """
    teacher.requires_grad_(False)
    blocks = {layer.layer: plan.source.attention(layer.layer)[:-1] for layer in plan.layers if layer.compressed}
    free = maps_beside_the_cache(teacher, blocks)
    # A copy of the modules over the tensors themselves.
    shared = {id(tensor): tensor for tensor in [*teacher.parameters(), *teacher.buffers()]}
    student = copy.deepcopy(teacher, shared)
    trained = {}
    for layer, path in blocks.items():
        block: Any = student.get_submodule(path)
        reader = CheckpointReader(layer_directory(workspace, layer))
        compose_block(block, workspace.result_of("layers", str(layer)))
        block.to(teacher.device)  # with the tables of its compositions, which no checkpoint has
        for name in reader.tensors:
            module, _, own = name.rpartition(".")
            weight = nn.Parameter(reader.read(name).to(teacher.device, dtype), requires_grad=False)
            setattr(block.get_submodule(module), own, weight)
        for name in free[layer]:
            if not plan.source.reader.has(plan.source.attention_tensor(layer, name)):  # it is renamed as it is loaded
                continue
            module, _, own = name.rpartition(".")
            start = block.get_parameter(name).detach()
            setattr(block.get_submodule(module), own, nn.Parameter(start.to(dtype, copy=True)))
        trainable_parameters(block)
        trained[layer] = {name: weight for name, weight in block.named_parameters() if weight.requires_grad}
    return student.eval(), trained


def maps_beside_the_cache(model: Any, blocks: Mapping[int, str]) -> dict[int, list[str]]:
    """Return the weights and biases of attention blocks' linear maps that neither keys nor values are made by.

    Weights that are shared with another part of the model are left out.

    Args:
        model: A causal language model without gradients.
        blocks: Paths of attention blocks by the numbers of their layers.

    Returns:
        For each layer their names below its block, in order.
    """
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    candidates: dict[int, dict[str, nn.Parameter]] = {}
    seen = {layer: ObservedAttention() for layer in blocks}
    with ExitStack() as stack, torch.enable_grad():
        for layer, path in blocks.items():
            block = model.get_submodule(path)
            maps = {name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
            candidates[layer] = {
                name: weight.requires_grad_(True)
                for name, weight in block.named_parameters()
                if name.rpartition(".")[0] in maps and uses[id(weight)] == 1
            }
            stack.enter_context(recorded(block, seen[layer]))
            stack.callback(block.register_forward_hook(_keeping_outputs(seen[layer])).remove)
        ids = torch.ones(1, _LOOKED_AT, dtype=torch.long, device=model.device)
        model(input_ids=ids, use_cache=False)
        free = {}
        for layer, weights in candidates.items():
            observed = seen[layer]
            cached = observed.keys.float().sum() + observed.values.float().sum()
            makes, moves = _reached(cached, weights), _reached(observed.outputs.float().sum(), weights)
            free[layer] = [name for name in weights if name in moves - makes]
    model.requires_grad_(False)
    return free


def _keeping_outputs(observed: ObservedAttention) -> Any:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        observed.outputs = output[0] if isinstance(output, tuple) else output

    return keep


def _reached(number: torch.Tensor, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Return the names of the weights that a number is computed from."""
    if not weights or not number.requires_grad:
        return set()
    gradients = torch.autograd.grad(number, list(weights.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}


__all__ = ["make_block_student", "maps_beside_the_cache"]
