"""Launches of the Triton kernels of the linear cross-entropy: output memory, grids and compile-time constants."""

from __future__ import annotations

from typing import Any

import torch
import triton

from pico_kernels._linear_cross_entropy import normalised
from pico_kernels._linear_cross_entropy_kernels import (
    TileConfig,
    chunk_softmax_kernel,
    forward_splits,
    tile_config,
    tiles_combine_kernel,
    tiles_forward_kernel,
    tiles_weight_kernel,
    weight_splits,
)
from pico_kernels._triton import COMPILE_OPTIONS, as_rows, interpreting, on_device

_COMBINE_ELEMENTS = 2048  # of a program's rows: 16 float32 sums a thread
_SOFTMAX_BLOCK = 4096
_SOFTMAX_WARPS = 8


def _rows_like(weight: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
    """``hidden`` and ``weight`` in the dtype of ``hidden``, both with unit stride in the last dimension."""
    return [as_rows(hidden), as_rows(weight.to(hidden.dtype))]


def tile_constants(dim: int, config: TileConfig) -> dict[str, Any]:
    """Constants and options that the two kernels over tiles share."""
    return {
        "DIM": dim,
        "HELD": config.held,
        "STREAMED": config.streamed,
        "WIDTH": config.widths[0],
        "REST": config.widths[1],
        "UPCAST": interpreting(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **COMPILE_OPTIONS,
    }


def combine_constants(dim: int, z_loss: float, gradient: bool) -> dict[str, Any]:
    """Constants and options of a launch of ``tiles_combine_kernel``."""
    width = triton.next_power_of_2(dim)
    rows = max(1, _COMBINE_ELEMENTS // width)
    return {
        "Z_LOSS": z_loss,
        "GRADIENT": gradient,
        "DIM": dim,
        "ROWS": rows,
        "WIDTH": width,
        "num_warps": 4,
        **COMPILE_OPTIONS,
    }


def _part(items: int, splits: int, block: int) -> int:
    """Items of one part: whole blocks."""
    return triton.cdiv(triton.cdiv(items, block), splits) * block


def tiles_forward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, z_loss: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (N,), statistics (3, N) for the backward, and the gradient of ``hidden`` (N, d), or (0, d) without it."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    dim = hidden.shape[1]
    config = tile_config(dim, hidden.element_size())
    part = _part(vocab, forward_splits(tokens, vocab, config), config.streamed)
    splits = triton.cdiv(vocab, part)

    def wide(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    maxima, sums = wide(splits, tokens), wide(splits, tokens)
    means = wide(splits if gradient else 0, tokens, dim)
    losses, statistics = wide(tokens), wide(3, tokens)
    grad_hidden = hidden.new_empty(tokens if gradient else 0, dim)
    rows = _rows_like(weight, hidden)
    strides = [x.stride(0) for x in rows]
    labels = labels.contiguous()
    with on_device(hidden):
        tiles_forward_kernel[(triton.cdiv(tokens, config.held), splits)](
            *rows,
            labels,
            maxima,
            sums,
            means,
            tokens,
            vocab,
            *strides,
            part,
            GRADIENT=gradient,
            **tile_constants(dim, config),
        )
        constants = combine_constants(dim, z_loss, gradient)
        tiles_combine_kernel[(triton.cdiv(tokens, constants["ROWS"]),)](
            *rows,
            labels,
            maxima,
            sums,
            means,
            losses,
            statistics,
            grad_hidden,
            tokens,
            vocab,
            *strides,
            ignore_index,
            splits,
            **constants,
        )
    return losses, statistics, grad_hidden


def tiles_weight(
    token_grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    statistics: torch.Tensor,
) -> torch.Tensor:
    """The gradient of ``weight`` for incoming gradients (N,), in its dtype."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    dim = hidden.shape[1]
    config = tile_config(dim, hidden.element_size())
    part = _part(tokens, weight_splits(tokens, vocab, config), config.streamed)
    splits = triton.cdiv(tokens, part)
    sums = torch.empty((splits, vocab, dim), dtype=torch.float32, device=hidden.device)
    token_grad, largest = normalised(token_grad, hidden.dtype)
    slopes = statistics[1:] * token_grad
    rows = _rows_like(weight, hidden)
    with on_device(hidden):
        tiles_weight_kernel[(triton.cdiv(vocab, config.held), splits)](
            *rows,
            labels.contiguous(),
            statistics[0],
            slopes,
            sums,
            tokens,
            vocab,
            *(x.stride(0) for x in rows),
            part,
            **tile_constants(dim, config),
        )
    total = sums[0] if splits == 1 else sums.sum(0)
    return (total if largest is None else total.mul_(largest)).to(weight.dtype)


def softmax_constants(z_loss: float, gradient: bool) -> dict[str, Any]:
    """Constants and options of a launch of ``chunk_softmax_kernel``."""
    return {
        "Z_LOSS": z_loss,
        "GRADIENT": gradient,
        "BLOCK": _SOFTMAX_BLOCK,
        "num_warps": _SOFTMAX_WARPS,
        **COMPILE_OPTIONS,
    }


class ChunkSoftmax:
    """A :data:`pico_kernels._linear_cross_entropy.SoftmaxPass` in one launch; needs no scratch memory."""

    def __init__(self, logits: torch.Tensor, rows: int, z_loss: float) -> None:
        self._z_loss = z_loss

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, token_grad: torch.Tensor | None) -> torch.Tensor:
        """Losses of the rows (n, V) and, with ``token_grad`` (n,), the gradient over the logits."""
        losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        with on_device(logits):
            chunk_softmax_kernel[(logits.shape[0],)](
                logits,
                targets.contiguous(),
                losses if token_grad is None else token_grad.contiguous(),
                losses,
                logits.shape[1],
                logits.stride(0),
                **softmax_constants(self._z_loss, token_grad is not None),
            )
        return losses
