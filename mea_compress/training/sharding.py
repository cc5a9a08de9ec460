"""Models that are sharded over processes with FSDP2: every decoder layer by itself, and all else around them.

Each process has its part of every weight, a `DTensor`, and a whole layer only while it runs. What is outside the
layers, embeddings and head, is whole from a forward pass on, until gradients have been made or `reshard` is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from mea_compress.architectures.geometry import decoder_layers
from mea_compress.errors import RequestError
from mea_compress.processes import is_first_process, process_count, process_number

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_T = TypeVar("_T")
# What `accelerate launch` sets, and what each asks for beyond sharding.
_ASKED = "ACCELERATE_USE_FSDP"
_ELSEWHERE = {
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", "leave it out, weights stay where they are computed with"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", "use `gradient_checkpointing`"),
}


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


@contextmanager
def sharding_asked_for() -> Iterator[bool]:
    """Say whether a launcher is to shard models, and take it over inside the block.

    Transformers and accelerate would do it once more, each in its own way, and on a CPU not at all: they are not told.

    Raises:
        RequestError: It asks for the first version of FSDP, or for what is not done here.
    """
    if not _is_set(_ASKED):
        yield False
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RequestError("--use_fsdp shards with the second version of FSDP alone: add --fsdp_version 2")
    for variable, (flag, remedy) in _ELSEWHERE.items():
        if _is_set(variable):
            raise RequestError(f"{flag} is not done here: {remedy}")
    if process_count() == 1:
        raise RequestError("--use_fsdp shards models over processes, and there is one: add --num_processes 2 or more")
    asked = os.environ.pop(_ASKED)
    try:
        yield True
    finally:
        os.environ[_ASKED] = asked


def in_turns(make: Callable[[], _T]) -> _T:
    """Return what `make` makes, one process of a machine after the other, so that there is one such work at a time."""
    number = int(os.environ.get("LOCAL_RANK", process_number()))
    count = int(os.environ.get("LOCAL_WORLD_SIZE", process_count()))
    made: list[_T] = []
    for turn in range(count):
        if turn == number:
            made.append(make())
        torch.distributed.barrier()
    return made[0]


def all_processes(device: torch.device) -> DeviceMesh:
    """Return all processes as what models are sharded over; all of them call it.

    Args:
        device: Of this process, where its part of a model goes.
    """
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (process_count(),))


def shard(model: PreTrainedModel, mesh: DeviceMesh, products: torch.dtype | None = None) -> None:
    """Shard a model in place over all processes; it is called as before, and `run_base` runs it without its head.

    Args:
        model: Causal language model, the same in every process.
        mesh: Of `all_processes`.
        products: What weights are gathered in, for use under autocast to that dtype; None for what they are stored
            in. Gradients are added up in float32. Autocast itself would keep what it has converted of every layer until
            gradients are made. Embeddings without a head that is tied to them stay as they are.

    Raises:
        RequestError: Its decoder layers cannot be told, or share weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy()
    if products not in (None, torch.float32):
        policy = MixedPrecisionPolicy(products, torch.float32, cast_forward_inputs=False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for layer in _decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if head is None or head.weight is not embeddings.weight:
        fully_shard(embeddings, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    whole: Any = model
    whole.run_base = lambda **inputs: model.base_model(**inputs)
    register_fsdp_forward_method(whole, "run_base")


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    refusal = f"the layers of a {type(model).__name__} cannot be sharded one by one: leave --use_fsdp out"
    try:
        name, found = decoder_layers(model)
    except ValueError as error:
        raise RequestError(refusal) from error
    owners: dict[int, set[str]] = {}
    for each, weight in model.named_parameters(remove_duplicate=False):
        layer = each.removeprefix(f"{name}.").partition(".")[0] if each.startswith(f"{name}.") else ""
        owners.setdefault(id(weight), set()).add(layer)
    if any(len(layers) > 1 for layers in owners.values()):
        raise RequestError(refusal)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is sharded."""
    if process_count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def run_base(model: PreTrainedModel, **inputs: Any) -> Any:
    """Return what a model's base makes of its inputs: all but the head, whose weight may be read afterwards."""
    run: Any = model.run_base if is_sharded(model) else model.base_model
    return run(**inputs)


def reshard(*models: nn.Module) -> None:
    """Let go of whole weights, which a later change of the parts would not reach; nothing for other models."""
    for model in models:
        if not is_sharded(model):
            continue
        for module in model.modules():
            if is_sharded(module):
                cast(Any, module).reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, in every process; all of them call it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor on the device of another, and sharded where that is; all processes call it."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    parts = cast(DTensor, like)
    return distribute_tensor(tensor, parts.device_mesh, parts.placements)


def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole tensors in the CPU's memory of the first process, and none in the others; all of them call it."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if is_first_process():
            found[name] = full.cpu().contiguous()
    return found


def save_parts(directory: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write what is trained and its optimiser's state, every process its part.

    Raises:
        RuntimeError: A part could not be written.
    """
    import torch.distributed.checkpoint as parts

    try:
        parts.save(_state(model, optimiser), checkpoint_id=directory)
    except parts.CheckpointException as error:  # which is no Exception
        raise RuntimeError(str(error)) from error


def load_parts(directory: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Set what is trained and its optimiser's state to what `save_parts` wrote, of any number of processes.

    Raises:
        RuntimeError: A part could not be read.
    """
    import torch.distributed.checkpoint as parts
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _state(model, optimiser)
    try:
        parts.load(state, checkpoint_id=directory)
    except parts.CheckpointException as error:
        raise RuntimeError(str(error)) from error
    set_optimizer_state_dict(model, optimiser, state["optimiser"])


def _state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    reshard(model)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return {"weights": weights, "optimiser": get_optimizer_state_dict(model, optimiser)}


__all__ = [
    "all_processes",
    "gathered",
    "in_turns",
    "is_sharded",
    "load_parts",
    "part_of",
    "reshard",
    "run_base",
    "save_parts",
    "shard",
    "sharding_asked_for",
    "whole",
]
