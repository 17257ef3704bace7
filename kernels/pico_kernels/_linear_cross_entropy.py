"""The chunked passes behind ``linear_cross_entropy``.

A *chunk* of token rows has its logits in one reused buffer of the input dtype, large enough for efficient products. Its
softmax writes the gradient of the logits over the logits: a Triton kernel, or ATen over *blocks* of a few rows in
float32 that fit a CPU cache. For a scalar loss both gradients are computed in the forward (three products and one
exponential in all), and the backward only scales them; per-token losses need their incoming gradient first, so their
backward computes the logits again. Measured against the alternatives in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from pico_kernels._dispatch import compute_dtype

_CPU_CHUNK_BYTES = 50 << 20  # logits of 512 tokens at V = 50304 in bfloat16
_CPU_BLOCK_BYTES = 6 << 20  # two float32 blocks beside one another in a last-level cache of 32 MiB
_DEVICE_CHUNK_BYTES = 256 << 20  # 2668 tokens at V = 50304: the weight's gradient is read and written per chunk
_DEVICE_CHUNKS = 4  # at least, so that a few thousand tokens do not have all their logits in memory
_DEVICE_MIN_ROWS = 1024  # but no fewer: at 620, reading and writing that gradient would take as long as its product
_DEVICE_TILE = 128  # rows of a tile of the products


class _Sizes(NamedTuple):
    """Rows of logits held at once, and rows whose softmax is taken at once."""

    chunk: int
    block: int


def _spread(tokens: int, most: int) -> int:
    """Rows of a chunk, at most ``most``, so that the chunks are about equal."""
    chunks = -(-tokens // most)
    return -(-tokens // max(1, chunks))


def _device_rows(tokens: int, row_bytes: int) -> int:
    """Rows of a chunk on a GPU: whole tiles of its products, where the budget has room for one."""
    fitting = max(1, _DEVICE_CHUNK_BYTES // row_bytes)
    if fitting < _DEVICE_TILE:
        return _spread(tokens, fitting)
    share = max(_DEVICE_MIN_ROWS, -(-tokens // _DEVICE_CHUNKS))
    rows = _spread(tokens, min(fitting - fitting % _DEVICE_TILE, share))
    return min(tokens, -(-rows // _DEVICE_TILE) * _DEVICE_TILE)


def _sizes(hidden: torch.Tensor, vocab_size: int) -> _Sizes:
    """Rows from a byte budget, spread evenly over the chunks; blocks only help where there is a CPU cache."""
    tokens = hidden.shape[0]
    row_bytes = vocab_size * hidden.element_size()
    if hidden.device.type != "cpu":
        chunk = _device_rows(tokens, row_bytes)
        return _Sizes(chunk, chunk)
    chunk = _spread(tokens, max(1, _CPU_CHUNK_BYTES // row_bytes))
    if torch.compiler.is_compiling():
        return _Sizes(chunk, chunk)
    wide_bytes = compute_dtype(hidden.dtype).itemsize
    return _Sizes(chunk, min(chunk, max(1, _CPU_BLOCK_BYTES // (vocab_size * wide_bytes))))


class Result(NamedTuple):
    """What a run over all chunks computes."""

    losses: torch.Tensor
    grad_hidden: torch.Tensor | None
    grad_weight: torch.Tensor | None


SoftmaxPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``(logits (n, V), targets (n,), token_grad (n,) or None)`` to losses (n,) in the computing dtype.

With ``token_grad`` the logits become the gradient of the losses' sum weighted by it.
"""


class BlockSoftmax:
    """A :data:`SoftmaxPass` on ATen for at most ``rows`` rows like those of ``logits``; scratch memory is reused."""

    def __init__(self, logits: torch.Tensor, rows: int, z_loss: float) -> None:
        wide = compute_dtype(logits.dtype)
        shape = (rows, logits.shape[1])
        self._logits = None if logits.dtype == wide else logits.new_empty(shape, dtype=wide)
        self._softmax = logits.new_empty(shape, dtype=wide)
        self._z_loss = z_loss

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, token_grad: torch.Tensor | None) -> torch.Tensor:
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


@cache
def _addmm_widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this GPU and PyTorch add a product of ``dtype`` to a float32 matrix in one call; asked by one call."""
    factor = torch.zeros(16, 16, device=device, dtype=dtype)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, beta=0, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


class _WeightGradient:
    """The sum of the chunks' products in the computing dtype.

    A product of that dtype accumulates on its own. So does a narrower one where the GPU's library writes float32: 8
    bytes a weight and chunk in place of the 12 of a product rounded to the narrow dtype and then added.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        self.total = hidden.new_empty(weight.shape, dtype=compute_dtype(hidden.dtype))
        self._begun = False
        self._in_place = hidden.dtype == self.total.dtype
        self._widens = (
            hidden.is_cuda
            and not self._in_place
            and not torch.compiler.is_compiling()
            and _addmm_widens(hidden.device, hidden.dtype)
        )
        self._partial = None if self._in_place or self._widens else hidden.new_empty(weight.shape)

    def add(self, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add the products of the chunk's tokens; the first are written, which saves zeros and reading them."""
        beta = int(self._begun)
        self._begun = True
        if self._in_place:
            self.total.addmm_(grad_logits.t(), hidden, beta=beta)
        elif self._widens:
            torch.addmm(self.total, grad_logits.t(), hidden, out_dtype=torch.float32, beta=beta, out=self.total)
        else:
            partial = torch.mm(grad_logits.t(), hidden, out=self._partial)
            if beta:
                self.total.add_(partial)
            else:
                self.total.copy_(partial)


def run_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    token_grad: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    softmax_pass: Callable[[torch.Tensor, int, float], SoftmaxPass] = BlockSoftmax,
) -> Result:
    """Per-token losses (N,), and the gradients of ``sum(token_grad * losses)`` that are asked for.

    ``softmax_pass(buffer, rows, z_loss)`` makes the pass over ``rows`` rows of logits like ``buffer``. ``grad_weight``
    is in the computing dtype, ``grad_hidden`` in that of ``hidden``.
    """
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    wide = compute_dtype(hidden.dtype)
    losses = hidden.new_empty(tokens, dtype=wide)
    grad_hidden = hidden.new_empty(hidden.shape) if need_hidden else None
    grad_weight = _WeightGradient(hidden, weight) if need_weight else None
    result = Result(losses, grad_hidden, None if grad_weight is None else grad_weight.total)
    if tokens == 0:
        if grad_weight is not None:
            grad_weight.total.zero_()
        return result
    head = weight.to(hidden.dtype)
    sizes = _sizes(hidden, vocab_size)
    buffer = hidden.new_empty(sizes.chunk, vocab_size)
    softmax = softmax_pass(buffer, sizes.block, z_loss)
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
            grad_weight.add(logits, part)
    return result


Run = Callable[..., Result]
"""``run_chunks`` or its like, with some softmax pass."""


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` (n, d) times a factor, 0-d or (n,), in the wider dtype of the two, rounded once to ``dtype``.

    The factor gets the dimensions of ``x``: CUDA kernels round a 0-d tensor to the dtype of ``x`` first, which makes
    1 / count wrong by up to 0.4 % in bfloat16. A CUDA kernel also converts while it reads and writes, without a copy.
    """
    return torch.mul(x, factor.reshape(-1, 1), out=torch.empty_like(x, dtype=dtype))


def normalised(token_grad: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Incoming gradients (N,) relative to the largest finite one, and that one, 0-d; as they are unless for float16.

    Gradients of logits in float16 would not hold those of a mean, p / N: its smallest number is 6e-8.
    """
    if dtype != torch.float16 or token_grad.numel() == 0:
        return token_grad, None
    largest = token_grad.abs().nan_to_num(0.0, 0.0).amax().clamp_min(torch.finfo(torch.float32).tiny)
    return token_grad / largest, largest


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
        run: Run,
    ) -> torch.Tensor:
        need_hidden, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        mask = counted.to(compute_dtype(hidden.dtype))
        token_grad = mask if need_hidden or need_weight else None
        result = run(hidden, weight, targets, z_loss, token_grad, need_hidden, need_weight)
        ctx.save_for_backward(result.grad_hidden, result.grad_weight)
        ctx.weight_dtype = weight.dtype
        return torch.where(counted, result.losses, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else scaled(grad_hidden, grad, grad_hidden.dtype),
            None if grad_weight is None else scaled(grad_weight, grad, ctx.weight_dtype),
            *(None,) * 5,
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
        run: Run,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, targets, counted)
        ctx.z_loss = z_loss
        ctx.run = run
        losses = run(hidden, weight, targets, z_loss, None, False, False).losses
        return torch.where(counted, losses, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, counted = ctx.saved_tensors
        token_grad, largest = normalised(torch.where(counted, grad, 0), hidden.dtype)
        result = ctx.run(hidden, weight, targets, ctx.z_loss, token_grad, *ctx.needs_input_grad[:2])
        grad_hidden, grad_weight = result.grad_hidden, result.grad_weight
        if grad_hidden is not None and largest is not None:
            grad_hidden = scaled(grad_hidden, largest, hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight if largest is None else grad_weight.mul_(largest)).to(weight.dtype)
        return grad_hidden, grad_weight, *(None,) * 4
