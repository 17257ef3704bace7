"""Tensor and sequence parallelism: how a decoder block's projections run when several ranks share the tokens.

Megatron-LM's scheme (tensor parallelism: arXiv 1909.08053; sequence parallelism: arXiv 2205.05198) on plain local
tensors. A micro-batch of B rows of S tokens is T = B * S tokens in a row. Between blocks each of the ``tp`` ranks holds
T / tp of them, in order, so that norms, residual stream, embedding, head and loss work on local tokens with whole
weights. Inside a block every rank sees all T tokens and its part of the heads and hidden units: tokens are gathered
before the projections into heads or hidden units, whose weights are split by output, and the partial sums of the
projections back, whose weights are split by input, are summed and scattered.

The tokens are cut as one row of T, not row by row as S / tp each: gathered pieces then lie in the order of the
micro-batch, and no copy puts them in order.

Gradients of weights that every rank holds whole are those of local tokens: they are summed over tp after the last
micro-batch (:mod:`pico_fast.parallel.gradients`). The loss of a micro-batch is the sum of the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pico_fast.parallel.mesh import Axis

# Since torch 2.13 under these names, and the old ones warn
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_gather(local: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Begin to collect (t, d) of every rank into (size * t, d), valid after the returned work's ``wait()``."""
    whole = local.new_empty(local.shape[0] * group.size(), *local.shape[1:])
    return whole, _all_gather(whole, local.contiguous(), group=group, async_op=True)


def _start_reduce_scatter(partial: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Begin to sum (T, d) over the ranks; this rank gets its (T / size, d), valid after the work's ``wait()``."""
    local = partial.new_empty(partial.shape[0] // group.size(), *partial.shape[1:])
    return local, _reduce_scatter(local, partial.contiguous(), group=group, async_op=True)


def gather_tokens(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(t, ...) of every rank as (size * t, ...), in the order of the ranks; without gradient."""
    whole, gathering = start_gather(local, group)
    gathering.wait()
    return whole


class _ReduceScatter(torch.autograd.Function):
    """Sum over the ranks, each keeping its tokens; its adjoint gathers the tokens' gradients."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        local, scattering = _start_reduce_scatter(partial, group)
        scattering.wait()
        return local

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grad, ctx.group), None


class _GatherAndProject(torch.autograd.Function):
    """Gathered tokens times several weights (w, d), keeping only the local tokens for the backward pass.

    The backward pass hides its communication behind products that do not need it: the tokens are gathered again
    while the gradient of the tokens is computed, and that is summed and scattered while those of the weights are.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(local, *weights)
        tokens = gather_tokens(local, group)
        return tuple(F.linear(tokens, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local, *weights = ctx.saved_tensors
        tokens, gathering = start_gather(local, ctx.group)
        tokens_grad = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            tokens_grad.addmm_(grad, weight)
        gathering.wait()
        local_grad, scattering = _start_reduce_scatter(tokens_grad, ctx.group)
        weight_grads = [grad.t() @ tokens for grad in grads]
        scattering.wait()
        return local_grad, None, *weight_grads


class AllTokens:
    """One process: every token and every weight is here, projections are called as they are."""

    def cut(self, ids: Tensor) -> Tensor:
        """This rank's part of ids or labels (B, S); here all of them, in their shape."""
        return ids

    def column_parallel(self, x: Tensor, *projections: nn.Linear) -> Sequence[Tensor]:
        """All tokens through projections into this rank's heads or hidden units."""
        return [projection(x) for projection in projections]

    def row_parallel(self, x: Tensor, projection: nn.Linear) -> Tensor:
        """This rank's heads or hidden units of all tokens, projected back and summed over the ranks."""
        return projection(x)


class ReplicatedTokens(AllTokens):
    """Every token on every rank, split weights: for generation and logits, without gradient."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def row_parallel(self, x: Tensor, projection: nn.Linear) -> Tensor:
        """(..., width / tp) to (..., d)."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "with tensor parallelism, hidden states and logits of all tokens carry no gradient: "
                "call them under torch.no_grad(), and loss() for training"
            )
        partial = projection(x).contiguous()
        dist.all_reduce(partial, group=self.group)
        return partial


class SequenceParallel(AllTokens):
    """T / tp tokens on each rank between blocks, all of them inside."""

    def __init__(self, axis: Axis):
        assert axis.group is not None
        self.axis, self.group = axis, axis.group

    def cut(self, ids: Tensor) -> Tensor:
        """(B, S) to (B * S / tp,). Raises ValueError where the tokens do not divide."""
        if ids.numel() % self.axis.size:
            raise ValueError(
                f"{ids.shape[0]} rows of {ids.shape[1]} tokens = {ids.numel()} tokens do not divide over "
                f"parallel.tp = {self.axis.size} ranks; give a number of rows or tokens that is a multiple of it"
            )
        return ids.flatten().chunk(self.axis.size)[self.axis.rank]

    def column_parallel(self, x: Tensor, *projections: nn.Linear) -> Sequence[Tensor]:
        """(T / tp, d) to (T, width / tp) for each projection."""
        return _GatherAndProject.apply(x, self.group, *(projection.weight.to(x.dtype) for projection in projections))

    def row_parallel(self, x: Tensor, projection: nn.Linear) -> Tensor:
        """(..., width / tp) of T tokens to (T / tp, d)."""
        return _ReduceScatter.apply(projection(x).flatten(0, -2), self.group)


ALL_TOKENS = AllTokens()
