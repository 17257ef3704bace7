"""The chunked passes behind ``linear_cross_entropy``.

A *chunk* of token rows has its logits in one reused buffer of the input dtype, large enough for efficient products. Its
softmax runs over *blocks* of a few rows in float32 that fit a CPU cache, writing the gradient of the logits over the
logits. For a scalar loss both gradients are computed in the forward (three products and one exponential in all),
and the backward only scales them; per-token losses need their incoming gradient first, so their backward computes the
logits again. Measured against the alternatives in docs/performance.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from pico_kernels._dispatch import compute_dtype

_CPU_CHUNK_BYTES = 50 << 20  # logits of 512 tokens at V = 50304 in bfloat16
_CPU_BLOCK_BYTES = 6 << 20  # two float32 blocks beside one another in a last-level cache of 32 MiB
_DEVICE_CHUNK_BYTES = 256 << 20


class _Sizes(NamedTuple):
    """Rows of logits held at once, and rows whose softmax is taken at once."""

    chunk: int
    block: int


def _sizes(hidden: torch.Tensor, vocab_size: int) -> _Sizes:
    """Rows from a byte budget, spread evenly over the chunks; blocks only help where there is a CPU cache."""
    tokens = hidden.shape[0]
    on_cpu = hidden.device.type == "cpu"
    budget = _CPU_CHUNK_BYTES if on_cpu else _DEVICE_CHUNK_BYTES
    fitting = max(1, budget // (vocab_size * hidden.element_size()))
    chunks = -(-tokens // fitting)
    chunk = -(-tokens // max(1, chunks))
    if not on_cpu or torch.compiler.is_compiling():
        return _Sizes(chunk, chunk)
    wide_bytes = compute_dtype(hidden.dtype).itemsize
    return _Sizes(chunk, min(chunk, max(1, _CPU_BLOCK_BYTES // (vocab_size * wide_bytes))))


class _Result(NamedTuple):
    losses: torch.Tensor
    grad_hidden: torch.Tensor | None
    grad_weight: torch.Tensor | None


class _BlockSoftmax:
    """Losses of blocks of rows and, over their logits, the gradients; scratch memory is reused."""

    def __init__(self, logits: torch.Tensor, rows: int, z_loss: float) -> None:
        wide = compute_dtype(logits.dtype)
        shape = (rows, logits.shape[1])
        self._logits = None if logits.dtype == wide else logits.new_empty(shape, dtype=wide)
        self._softmax = logits.new_empty(shape, dtype=wide)
        self._z_loss = z_loss

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, token_grad: torch.Tensor | None) -> torch.Tensor:
        """Losses of the rows (n, V). With ``token_grad`` (n,), ``logits`` becomes the gradient of the weighted sum."""
        rows = logits.shape[0]
        wide = logits if self._logits is None else self._logits[:rows].copy_(logits)
        index = targets[:, None]
        target_logit = wide.gather(1, index).squeeze(1)
        softmax = torch.softmax(wide, 1, out=self._softmax[:rows])
        # max(softmax) = exp(max(logits) - lse), at least 1 / V: exact to the float, without another exponential pass.
        lse = wide.amax(1) - softmax.amax(1).log_()
        if token_grad is not None:
            scale = token_grad * (2 * self._z_loss * lse + 1)
            softmax.mul_(scale[:, None]).scatter_add_(1, index, -token_grad[:, None])
            logits.copy_(softmax)
        return lse - target_logit + self._z_loss * lse.square()


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    token_grad: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> _Result:
    """Per-token losses (N,), and the gradients of ``sum(token_grad * losses)`` that are asked for.

    ``grad_weight`` is in the computing dtype, ``grad_hidden`` in that of ``hidden``.
    """
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    wide = compute_dtype(hidden.dtype)
    losses = hidden.new_empty(tokens, dtype=wide)
    grad_hidden = hidden.new_empty(hidden.shape) if need_hidden else None
    grad_weight = hidden.new_zeros(weight.shape, dtype=wide) if need_weight else None
    if tokens == 0:
        return _Result(losses, grad_hidden, grad_weight)
    head = weight.to(hidden.dtype)
    sizes = _sizes(hidden, vocab_size)
    buffer = hidden.new_empty(sizes.chunk, vocab_size)
    # A float32 product accumulates on its own; a narrower one is rounded per chunk and added in float32.
    partial = hidden.new_empty(weight.shape) if need_weight and hidden.dtype != wide else None
    softmax = _BlockSoftmax(buffer, sizes.block, z_loss)
    for start in range(0, tokens, sizes.chunk):
        rows = slice(start, min(start + sizes.chunk, tokens))
        part = hidden[rows]
        logits = torch.mm(part, head.t(), out=buffer[: part.shape[0]])
        for first in range(0, part.shape[0], sizes.block):
            last = min(first + sizes.block, part.shape[0])
            block = slice(start + first, start + last)
            block_grad = None if token_grad is None else token_grad[block]
            losses[block] = softmax(logits[first:last], targets[block], block_grad)
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[rows])
        if grad_weight is not None:
            if partial is None:
                grad_weight.addmm_(logits.t(), part)
            else:
                grad_weight.add_(torch.mm(logits.t(), part, out=partial))
    return _Result(losses, grad_hidden, grad_weight)


class FusedLoss(torch.autograd.Function):
    """The sum of the counted tokens' losses; gradients are computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        z_loss: float,
        grad_enabled: bool,
    ) -> torch.Tensor:
        need_hidden, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        mask = counted.to(compute_dtype(hidden.dtype))
        token_grad = mask if need_hidden or need_weight else None
        result = _run(hidden, weight, targets, z_loss, token_grad, need_hidden, need_weight)
        ctx.save_for_backward(result.grad_hidden, result.grad_weight)
        ctx.weight_dtype = weight.dtype
        return torch.where(counted, result.losses, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


class TokenLosses(torch.autograd.Function):
    """The loss of every token (0 where not counted), each with its own incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        z_loss: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, targets, counted)
        ctx.z_loss = z_loss
        losses = _run(hidden, weight, targets, z_loss, None, False, False).losses
        return torch.where(counted, losses, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, counted = ctx.saved_tensors
        result = _run(hidden, weight, targets, ctx.z_loss, torch.where(counted, grad, 0), *ctx.needs_input_grad[:2])
        grad_weight = None if result.grad_weight is None else result.grad_weight.to(weight.dtype)
        return result.grad_hidden, grad_weight, None, None, None
