"""Sequence parallelism with products and communication fused: torch's symmetric-memory matmuls, over NVLink.

``fused_all_gather_matmul`` multiplies the tokens that have arrived while others are on their way, and
``fused_matmul_reduce_scatter`` sends partial sums while the next are computed (asynchronous tensor parallelism; Wang et
al., "Overlap communication with dependent computation via decomposition", ASPLOS 2023). Same results as
:class:`~pico_fast.parallel.tensor.SequenceParallel` up to the order of sums; off unless ``parallel.symmetric_memory``.

The calls are tested against torch's own specification of these ops; the kernels behind them run on several NVIDIA GPUs
only.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pico_fast.parallel.mesh import Axis
from pico_fast.parallel.tensor import SequenceParallel, start_gather
from pico_fast.runtime import local_world_size


class _GatherAndProject(torch.autograd.Function):
    """Tokens (t, d) of every rank times several weights (w, d); keeps the local tokens for the backward pass."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(local, *weights)
        transposed = [weight.t() for weight in weights]
        _, projected = torch.ops.symm_mem.fused_all_gather_matmul(local, transposed, 0, group.group_name)
        return tuple(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local, *weights = ctx.saved_tensors
        tokens, gathering = start_gather(local, ctx.group)
        # One product over all projections' outputs: their sum is taken before it travels
        local_grad = torch.ops.symm_mem.fused_matmul_reduce_scatter(
            torch.cat(grads, 1), torch.cat(weights), "sum", 0, ctx.group.group_name
        )
        gathering.wait()
        return local_grad, None, *(grad.t() @ tokens for grad in grads)


class _ProjectAndScatter(torch.autograd.Function):
    """All tokens' part of the hidden units (T, h) times a weight (d, h), summed over the ranks: (T / tp, d)."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(units, weight)
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(units, weight.t(), "sum", 0, group.group_name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        units, weight = ctx.saved_tensors
        tokens_grad, (units_grad,) = torch.ops.symm_mem.fused_all_gather_matmul(
            grad.contiguous(), [weight], 0, ctx.group.group_name
        )
        return units_grad, tokens_grad.t() @ units, None


class SymmetricMemory(SequenceParallel):
    """:class:`SequenceParallel` through the fused products."""

    def __init__(self, axis: Axis):
        super().__init__(axis)
        importlib.import_module("torch.distributed._symmetric_memory")  # registers the ops; of no use to other layouts

    def column_parallel(self, x: Tensor, *projections: nn.Linear) -> Sequence[Tensor]:
        """(T / tp, d) to (T, width / tp) for each projection."""
        weights = (projection.weight.to(x.dtype) for projection in projections)
        return _GatherAndProject.apply(x.contiguous(), self.group, *weights)

    def row_parallel(self, x: Tensor, projection: nn.Linear) -> Tensor:
        """(..., width / tp) of T tokens to (T / tp, d)."""
        return _ProjectAndScatter.apply(x.flatten(0, -2).contiguous(), projection.weight.to(x.dtype), self.group)


def symmetric_memory_problem(device: torch.device, tp: Axis) -> str | None:
    """Why the ranks of ``tp`` cannot write into each other's memory, and what to do; None where they can."""
    advice = "give parallel.symmetric_memory=false"
    if device.type != "cuda":
        return f"parallel.symmetric_memory: it needs NVIDIA GPUs joined by NVLink, this run is on {device}; {advice}"
    on_node = local_world_size()
    if on_node % tp.size:
        return (
            f"parallel.symmetric_memory: parallel.tp = {tp.size} does not divide the {on_node} processes of this node, "
            f"so that ranks of one group are on different nodes; {advice}"
        )
    assert device.index is not None
    first = device.index - tp.rank
    for peer in range(first, first + tp.size):
        if peer != device.index and not torch.cuda.can_device_access_peer(device.index, peer):
            return (
                f"parallel.symmetric_memory: GPU {device.index} has no direct access to the memory of GPU {peer}; "
                f"{advice}"
            )
    return None
