"""The linear map that an attention block ends in, o_proj, found by running the block: no family is described.

It can be fitted again where what it makes is what the block sends, and that is added to the residual stream as it is.
What lies before it (softmax, sinks, gates, norms) does not matter: its inputs are looked at as they come.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mea_compress.layers.blocks import BlockRunner

# Of a stream that is the sum of two, and of a change that passes a layer unchanged, relative.
_SUM, _PASSED = 1e-4, 0.02


@dataclass(frozen=True)
class OutputMap:
    """The linear map that an attention block ends in.

    Attributes:
        name: Its name below the block.
        transposed: Whether its weight is (inputs, outputs), as that of `Conv1D` is.
    """

    name: str
    transposed: bool

    def weight(self, block: nn.Module) -> torch.Tensor:
        """Return the weight of a block's map, (D, inputs)."""
        weight = block.get_parameter(f"{self.name}.weight").detach()
        return weight.T.contiguous() if self.transposed else weight

    def read(self, runner: BlockRunner, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the map of a layer reads when that runs on (B, T, D): (B, T, inputs)."""
        seen: list[torch.Tensor] = []
        hook = runner.attention.get_submodule(self.name).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].detach())
        )
        try:
            with torch.no_grad():
                runner.send(hidden)
        finally:
            hook.remove()
        return seen[-1].reshape(*hidden.shape[:2], -1)


def find_output_map(runner: BlockRunner, hidden: torch.Tensor) -> OutputMap | str:
    """Return the map that a layer's attention block ends in, or a sentence why it has none that could be fitted again.

    Args:
        runner: The layer, its block as in the original.
        hidden: Something to run it on, (B, T, D).
    """
    block, name = runner.attention, type(runner.attention).__name__
    made: dict[str, torch.Tensor] = {}
    behind: list[torch.Tensor] = []
    captured, after = _run(runner, hidden, made, behind)
    same = [own for own, output in made.items() if _equal(output, captured)]
    if not same:
        return f"{name} sends what no linear map of it makes, so that its weights stay as they are"
    stream = hidden.to(captured.device, torch.float32) + captured.float()
    if not any(_close(tensor, stream, _SUM * float(stream.abs().max())) for tensor in behind):
        change = torch.randn(captured.shape, generator=torch.Generator().manual_seed(0)).to(captured.device)
        change *= float(captured.float().square().mean().sqrt())
        moved = _run(runner, hidden, {}, [], change)[1] - after
        if not _close(moved, change, _PASSED * float(change.abs().max())):
            return (
                f"what {name} sends is not added to the residual stream as it is, so that its weights stay as they are"
            )
    return OutputMap(same[-1], isinstance(block.get_submodule(same[-1]), Conv1D))


@torch.no_grad()
def _run(
    runner: BlockRunner,
    hidden: torch.Tensor,
    made: dict[str, torch.Tensor],
    behind: list[torch.Tensor],
    change: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a layer, and return what its attention block and it send.

    Args:
        runner: The layer.
        hidden: Its input, (B, T, D).
        made: Gets what the linear maps of the block make, by name, in order.
        behind: Gets what modules behind the block get.
        change: Is added to what the block sends.
    """
    block, sent = runner.attention, []

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        outputs = output[0] if isinstance(output, tuple) else output
        sent.append(outputs)
        if change is None:
            return None
        changed = outputs + change.to(outputs.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def keep(own: str) -> Any:
        return lambda _, __, output: made.update({own: output})

    def reached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("hidden_states", args[0] if args else None)
        if sent and isinstance(given, torch.Tensor):
            behind.append(given)

    with ExitStack() as stack:
        inside = set(block.modules())
        for own, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                stack.callback(module.register_forward_hook(keep(own)).remove)
        for module in runner.layer.modules():
            if module not in inside and module is not runner.layer:
                stack.callback(module.register_forward_pre_hook(reached, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(after).remove)
        following = runner.forward(hidden)
    return sent[-1], following


def _equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.numel() == other.numel() and torch.equal(tensor.reshape(other.shape), other)


def _close(tensor: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if tensor.shape != other.shape:
        return False
    return bool((tensor.float() - other.float()).abs().max() <= tolerance)


__all__ = ["OutputMap", "find_output_map"]
