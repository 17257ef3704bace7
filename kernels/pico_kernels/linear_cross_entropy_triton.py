"""Triton implementation of :func:`pico_kernels.linear_cross_entropy`: two strategies and the choice between them.

``tiles``: the logits are computed tile by tile in registers and never stored; the kernels and the mathematics are in
:mod:`pico_kernels._linear_cross_entropy_kernels`. The forward also computes the gradient of ``hidden`` for incoming
gradients of 1, (N, d), which the backward scales; the backward computes the logits once more for that of ``weight``.

``chunks``: the driver of the ``torch`` implementation, whose products are the vendor's, with one kernel for the softmax
of a chunk in place of ATen's passes over float32 copies.

Rounding points: ``weight`` is rounded to ``hidden.dtype``. ``tiles`` keeps logits and softmax in float32 and rounds
the probabilities for the products; the label's own term of the gradient of ``hidden`` is float32 throughout, the sum
is rounded once and once more when it is scaled. ``chunks`` rounds where ``torch`` does. The gradient of ``weight`` is
summed in float32 and rounded once to ``weight.dtype``. float64 and empty inputs are computed by ``torch``: a GPU's
tensor cores and ``tl.dot`` have no float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pico_kernels._dispatch import require
from pico_kernels._linear_cross_entropy import Result, run_chunks, scaled
from pico_kernels._linear_cross_entropy_kernels import (
    chunk_softmax_kernel,
    tile_config,
    tiles_combine_kernel,
    tiles_forward_kernel,
    tiles_weight_kernel,
)
from pico_kernels._linear_cross_entropy_launch import (
    ChunkSoftmax,
    combine_constants,
    softmax_constants,
    tile_constants,
    tiles_forward,
    tiles_weight,
)
from pico_kernels._triton import COMPILE_OPTIONS, AotCase, PicoShape, register_op, triton_name
from pico_kernels.linear_cross_entropy import check_labels, divisor, in_chunks, linear_cross_entropy_torch


@dataclass(frozen=True)
class Choice:
    """A row of :data:`STRATEGIES`: the strategy for at most this many columns of at most this many bytes each."""

    max_dim: int
    max_itemsize: int
    strategy: str
    reason: str


STRATEGIES = (
    Choice(128, 2, "tiles", "predicted: moving logits through memory costs more than a fourth product"),
    Choice(1 << 62, 8, "chunks", "predicted: three products at the vendor's rate; float32 has no tensor cores here"),
)
"""The first row that fits decides. No row is measured yet: docs/performance-linear-cross-entropy-gpu.md has the model.

N and V are not columns of it: both strategies take time in proportion to both.
"""


def choose_strategy(dim: int, itemsize: int) -> str:
    """``tiles`` or ``chunks`` for rows of ``dim`` elements."""
    return next(row.strategy for row in STRATEGIES if dim <= row.max_dim and itemsize <= row.max_itemsize)


class _Tiles(torch.autograd.Function):
    """The loss of every token, 0 where ignored: the eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int,
        z_loss: float,
    ) -> torch.Tensor:
        losses, statistics, grad_hidden = tiles_forward(
            hidden, weight, labels, ignore_index, z_loss, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(hidden, weight, labels, statistics, grad_hidden)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _tiles_gradients(ctx, grad, tiles_weight)


def _tiles_gradients(
    ctx: Any, grad: torch.Tensor, weight_gradient: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, labels, statistics, grad_hidden = ctx.saved_tensors
    return (
        scaled(grad_hidden, grad, hidden.dtype) if ctx.needs_input_grad[0] else None,
        weight_gradient(grad, hidden, weight, labels, statistics) if ctx.needs_input_grad[1] else None,
        *(None,) * (len(ctx.needs_input_grad) - 2),
    )


def _tiles_fake(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, z_loss: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, dim = hidden.shape
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(3, tokens, dtype=torch.float32),
        hidden.new_empty(tokens if gradient else 0, dim),
    )


def _tiles_weight_fake(
    token_grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    statistics: torch.Tensor,
) -> torch.Tensor:
    return weight.new_empty(weight.shape)


_tiles_weight_op = register_op(
    "linear_cross_entropy_tiles_weight(Tensor token_grad, Tensor hidden, Tensor weight, Tensor labels, "
    "Tensor statistics) -> Tensor",
    tiles_weight,
    _tiles_weight_fake,
)


def _tiles_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _traced_tiles_backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    return _tiles_gradients(ctx, grad, _tiles_weight_op)


_tiles_op = register_op(
    "linear_cross_entropy_tiles(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float z_loss, "
    "bool gradient) -> (Tensor, Tensor, Tensor)",
    tiles_forward,
    _tiles_fake,
    _traced_tiles_backward,
    _tiles_setup_context,
)


def tile_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, z_loss: float
) -> torch.Tensor:
    """The loss of every token (N,), 0 where ignored, by the strategy ``tiles``."""
    if torch.compiler.is_compiling():
        gradient = torch.is_grad_enabled() and hidden.requires_grad
        return _tiles_op(hidden, weight, labels, ignore_index, z_loss, gradient)[0]
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _Tiles.apply(hidden, weight, labels, ignore_index, z_loss)
    return tiles_forward(hidden, weight, labels, ignore_index, z_loss, False)[0]


def _chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    token_grad: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> list[torch.Tensor]:
    """What :func:`run_chunks` returns, without the gradients that were not asked for."""
    result = run_chunks(hidden, weight, targets, z_loss, token_grad, need_hidden, need_weight, ChunkSoftmax)
    return [x for x in result if x is not None]


def _chunks_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    token_grad: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> list[torch.Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    grad_hidden = [hidden.new_empty(hidden.shape)] if need_hidden else []
    grad_weight = [hidden.new_empty(weight.shape, dtype=torch.float32)] if need_weight else []
    return [losses, *grad_hidden, *grad_weight]


_chunks_op = register_op(
    "linear_cross_entropy_chunks(Tensor hidden, Tensor weight, Tensor targets, float z_loss, Tensor? token_grad, "
    "bool need_hidden, bool need_weight) -> Tensor[]",
    _chunks,
    _chunks_fake,
)


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float,
    token_grad: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> Result:
    """:func:`run_chunks` with the kernel; one op where it is traced, whose chunks the graph does not see."""
    call = _chunks_op if torch.compiler.is_compiling() else _chunks
    found = iter(call(hidden, weight, targets, z_loss, token_grad, need_hidden, need_weight))
    return Result(next(found), next(found) if need_hidden else None, next(found) if need_weight else None)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
    strategy: str | None = None,
) -> torch.Tensor:
    """:func:`pico_kernels.linear_cross_entropy` by ``strategy``, or by the one :data:`STRATEGIES` names.

    Arguments are trusted but for the strategy: ValueError for one that is neither ``tiles`` nor ``chunks``. Any strides
    are read; rows whose elements are not side by side are copied first. The host never waits for the device.
    """
    if hidden.dtype == torch.float64 or hidden.numel() == 0:
        return linear_cross_entropy_torch(
            hidden,
            weight,
            labels,
            ignore_index=ignore_index,
            reduction=reduction,
            denominator=denominator,
            z_loss=z_loss,
        )
    strategy = strategy or choose_strategy(hidden.shape[1], hidden.element_size())
    require(strategy in ("tiles", "chunks"), "linear_cross_entropy", "strategy", "tiles or chunks", repr(strategy))
    check_labels(labels, weight.shape[0], ignore_index)
    if strategy == "chunks":
        return in_chunks(hidden, weight, labels, ignore_index, reduction, denominator, z_loss, _run)
    losses = tile_losses(hidden, weight, labels, ignore_index, z_loss)
    return losses if reduction == "none" else losses.sum() / divisor(labels != ignore_index, reduction, denominator)


_LAUNCH_OPTIONS = ("num_warps", "num_stages", *COMPILE_OPTIONS)


def _aot_case(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> AotCase:
    """A case whose pointers are aligned, and those integers that are multiples of 16 at every published size."""
    constexprs = {key: value for key, value in constants.items() if key not in _LAUNCH_OPTIONS}
    integers = (
        "tokens",
        "vocab",
        "logits_stride",
        "hidden_stride",
        "weight_stride",
        "columns_per_split",
        "tokens_per_split",
    )
    return AotCase(
        name,
        kernel,
        {**types, **dict.fromkeys(constexprs, "constexpr")},
        constexprs,
        constants["num_warps"],
        constants.get("num_stages", 2),
        aligned=tuple(key for key in types if key.endswith("_ptr") or key in integers),
    )


def _tile_cases(dim: int, dtype: torch.dtype) -> list[AotCase]:
    config = tile_config(dim, dtype.itemsize)
    name = triton_name(dtype)
    rows = {"hidden_ptr": f"*{name}", "weight_ptr": f"*{name}", "labels_ptr": "*i64"}
    sizes = dict.fromkeys(("tokens", "vocab", "hidden_stride", "weight_stride"), "i32")
    parts = dict.fromkeys(("maxima_ptr", "sums_ptr", "means_ptr"), "*fp32")
    results = {"losses_ptr": "*fp32", "statistics_ptr": "*fp32", "grad_hidden_ptr": f"*{name}"}
    tiles = tile_constants(dim, config) | {"UPCAST": False}
    cases = [
        _aot_case(
            f"linear_cross_entropy_tiles_forward{suffix}-{name}",
            tiles_forward_kernel,
            {**rows, **parts, **sizes, "columns_per_split": "i32"},
            tiles | {"GRADIENT": gradient},
        )
        for suffix, gradient in (("", True), ("_loss", False))
    ]
    cases.append(
        _aot_case(
            f"linear_cross_entropy_tiles_combine-{name}",
            tiles_combine_kernel,
            {**rows, **parts, **results, **sizes, "ignore_index": "i32", "splits": "i32"},
            combine_constants(dim, 0.0, True),
        )
    )
    sums = dict.fromkeys(("log_sums_ptr", "slopes_ptr", "sums_ptr"), "*fp32")
    cases.append(
        _aot_case(
            f"linear_cross_entropy_tiles_weight-{name}",
            tiles_weight_kernel,
            {**rows, **sums, **sizes, "tokens_per_split": "i32"},
            tiles,
        )
    )
    return cases


def aot_cases(shape: PicoShape) -> list[AotCase]:
    """The kernels of the strategy chosen in bfloat16 and in float32, and the tiles in bfloat16 at d 384 and below."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        chosen = choose_strategy(shape.d_model, dtype.itemsize)
        if chosen == "tiles" or (shape.d_model <= 384 and dtype.itemsize == 2):
            cases += _tile_cases(shape.d_model, dtype)
        if chosen == "chunks":
            pointers = {"logits_ptr": f"*{triton_name(dtype)}", "targets_ptr": "*i64"}
            floats = dict.fromkeys(("token_grad_ptr", "losses_ptr"), "*fp32")
            name = f"linear_cross_entropy_chunk_softmax-{triton_name(dtype)}"
            types = {**pointers, **floats, "vocab": "i32", "logits_stride": "i32"}
            cases.append(_aot_case(name, chunk_softmax_kernel, types, softmax_constants(0.0, True)))
    return cases
