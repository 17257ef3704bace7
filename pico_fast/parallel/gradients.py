"""What is left to do with the gradients after a step's last backward pass, and the step's numbers over all ranks.

Then every data-parallel axis has been summed already (:mod:`pico_fast.parallel.data_parallel`). Over the
tensor-parallel ranks, a weight that the sharding table splits has its whole gradient where it is; one that every rank
holds has seen only that rank's tokens, and its gradient is a part of the sum.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

from pico_fast.model.sharding import tensor_parallel_dim
from pico_fast.parallel.mesh import Parallel
from pico_fast.parallel.slices import local, writes


def sum_over_tensor_parallel(model: nn.Module, parallel: Parallel) -> None:
    """Add up, over the tp ranks, the gradients of the weights that each of them holds whole: one coalesced all-reduce.

    Megatron-LM does the same with its norms under sequence parallelism (finalize_model_grads.py); here embedding and
    head are among them, since they too work on local tokens. Shards of FSDP2 are summed as shards. Narrower gradients
    (``bf16-true``) are added in float32 and rounded once, as along the other dimensions.
    """
    if parallel.tp.group is None:
        return
    partial = [
        gradient
        for name, parameter in model.named_parameters()
        if tensor_parallel_dim(name) is None and (gradient := _gradient(parameter)) is not None and gradient.numel()
    ]
    if not partial:
        return
    sums = [gradient.float() for gradient in partial]  # a float32 gradient is summed where it is
    with _coalescing_manager(parallel.tp.group):  # private, but what torch itself coalesces with
        for gradient in sums:
            dist.all_reduce(gradient, group=parallel.tp.group)
    for gradient, summed in zip(partial, sums, strict=True):
        if summed is not gradient:
            gradient.copy_(summed)


def global_numbers(model: nn.Module, loss: Tensor, parallel: Parallel, *, norm: bool) -> tuple[Tensor, Tensor | None]:
    """(loss, norm of all gradients) of the step, on the device and the same bits on every rank.

    ``loss`` is this rank's share, a float32 scalar; the result is the sum of all. With ``norm`` the squares of the
    gradients travel in the same all-reduce, each element counted once. On one process the norm is torch's own.
    """
    if not parallel.active:
        return loss, _norm(model) if norm else None
    numbers = [loss]
    if norm:
        numbers.append(_squares(model, parallel))
    summed = torch.stack(numbers)
    dist.all_reduce(summed)
    return summed[0], summed[1].sqrt() if norm else None


def clip(model: nn.Module, max_norm: float, norm: Tensor) -> None:
    """Scale the gradients so that their norm, which is ``norm``, is at most ``max_norm``.

    The arithmetic of ``torch.nn.utils.clip_grads_with_norm_``, on the local part of each gradient: DTensors would go
    one by one through its dispatcher.
    """
    gradients = _gradients(model)
    if gradients:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def _norm(model: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm(_gradients(model), foreach=True)


def _squares(model: nn.Module, parallel: Parallel) -> Tensor:
    """This rank's part of the sum of squares, float32 (), so that the sum over all ranks counts each element once."""
    counted = [
        gradient
        for name, parameter in model.named_parameters()
        if writes(name, parallel) and (gradient := _gradient(parameter)) is not None
    ]
    if not counted:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack(torch._foreach_norm(counted, 2, dtype=torch.float32)).square().sum()


def _gradients(model: nn.Module) -> list[Tensor]:
    return [gradient for parameter in model.parameters() if (gradient := _gradient(parameter)) is not None]


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    return None if parameter.grad is None else local(parameter.grad)
