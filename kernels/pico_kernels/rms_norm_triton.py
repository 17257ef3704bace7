"""RMSNorm on Triton: launchers, autograd, registered ops. Rounding points are those of the twin in ``rms_norm.py``.

The forward saves ``x`` (or the sum) and ``rstd``, 4 bytes a row. Gradients are computed in float32 (float64 for float64
input) and rounded once; for ``add_rms_norm`` the gradient that reaches the sum is added before that rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pico_kernels._dispatch import KERNEL_DTYPES, compute_dtype, require
from pico_kernels._rms_norm_kernels import (
    backward_config,
    forward_config,
    partitions,
    rms_norm_backward,
    rms_norm_backward_wide,
    rms_norm_forward,
    sum_config,
    sum_partials,
)
from pico_kernels._triton import (
    COMPILE_OPTIONS,
    AotCase,
    PicoShape,
    as_rows,
    on_device,
    register_op,
    triton_name,
)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, sum (the output again without a residual) and ``rstd`` of shape (rows,), in one launch."""
    require(x.dtype in KERNEL_DTYPES, "rms_norm", "x", "float32, bfloat16, float16 or float64", x.dtype)
    d = x.shape[-1]
    flat = as_rows(x)
    rows = flat.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=compute_dtype(x.dtype), device=x.device)
    if rows:
        config = forward_config(d, x.element_size())
        added = flat if residual is None else as_rows(residual)
        with on_device(x):
            rms_norm_forward[(-(-rows // config.rows),)](
                flat,
                added,
                weight.contiguous(),
                out,
                total,
                rstd,
                rows,
                flat.stride(0),
                added.stride(0),
                EPS=float(eps),
                D=d,
                ADD=residual is not None,
                **config.forward_arguments(),
                num_warps=config.num_warps,
                **COMPILE_OPTIONS,
            )
    return out, total, rstd


def _backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``x`` (which is also the residual's) and ``weight``; one not needed is empty."""
    d, rows = x.shape[-1], rstd.shape[0]
    grad_x = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(d if need_weight else 0, dtype=weight.dtype, device=x.device)
    if not rows:
        return grad_x, grad_weight.zero_()
    config = backward_config(d, x.element_size())
    parts = partitions(rows, config)
    flat, flat_grad = as_rows(x), as_rows(grad)
    flat_total = flat_grad if grad_total is None else as_rows(grad_total)
    partial = torch.empty((parts, d) if need_weight else (0,), dtype=rstd.dtype, device=x.device)
    kernel = rms_norm_backward if config.held else rms_norm_backward_wide
    with on_device(x):
        kernel[(parts,)](
            flat_grad,
            flat_total,
            flat,
            weight.contiguous(),
            rstd,
            grad_x,
            partial,
            rows,
            flat_grad.stride(0),
            flat_total.stride(0),
            flat.stride(0),
            D=d,
            NEED_X=need_x,
            NEED_WEIGHT=need_weight,
            HAS_TOTAL=grad_total is not None,
            **config.backward_arguments(),
            num_warps=config.num_warps,
            **COMPILE_OPTIONS,
        )
        if need_weight:
            sums = sum_config(d)
            sum_partials[(-(-d // sums.block),)](
                partial,
                grad_weight,
                parts,
                D=d,
                ROWS=sums.rows,
                BLOCK=sums.block,
                num_warps=sums.num_warps,
                **COMPILE_OPTIONS,
            )
    return grad_x, grad_weight


class _RMSNorm(torch.autograd.Function):
    """Eager calls; tracing sees the registered op, whose boundary costs more than a small norm."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, _, rstd = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_x, need_weight = ctx.needs_input_grad[:2]
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = _backward(grad, None, x, weight, rstd, need_x, need_weight)
        return grad_x if need_x else None, grad_weight if need_weight else None, None


def _add_gradients(
    ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None, backward: Callable[..., Any]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x, residual, weight, eps) from those of the output and of the sum, either None where unused."""
    *need_sum, need_weight = ctx.needs_input_grad[:3]
    if grad is None:
        return grad_total if need_sum[0] else None, grad_total if need_sum[1] else None, None, None
    need_x = any(need_sum)
    grad_x, grad_weight = backward(grad, grad_total, *ctx.saved_tensors, need_x, need_weight)
    return (
        grad_x if need_sum[0] else None,
        grad_x if need_sum[1] else None,
        grad_weight if need_weight else None,
        None,
    )


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total, rstd = _forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return _add_gradients(ctx, grad, grad_total, _backward)


def _fake_rstd(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), dtype=compute_dtype(x.dtype))


_BACKWARD_OP = register_op(
    "rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd, bool need_x, "
    "bool need_weight) -> (Tensor, Tensor)",
    _backward,
    lambda grad, grad_total, x, weight, rstd, need_x, need_weight: (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    ),
)


def _forward_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, _, rstd = _forward(x, None, weight, eps)
    return out, rstd


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward_of_op(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = _BACKWARD_OP(grad, None, *ctx.saved_tensors, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, None


_OP = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward_op,
    lambda x, weight, eps: (x.new_empty(x.shape), _fake_rstd(x)),
    _backward_of_op,
    _save_forward,
)


def _save_add_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, total, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.set_materialize_grads(False)


def _backward_of_add_op(
    ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return _add_gradients(ctx, grad, grad_total, _BACKWARD_OP)


_ADD_OP = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _fake_rstd(x)),
    _backward_of_add_op,
    _save_add_forward,
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """:func:`pico_kernels.rms_norm` on Triton."""
    if torch.compiler.is_compiling():
        return _OP(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`pico_kernels.add_rms_norm` on Triton."""
    if torch.compiler.is_compiling():
        return _ADD_OP(x, residual, weight, eps)[:2]
    return _AddRMSNorm.apply(x, residual, weight, eps)


def aot_cases(shape: PicoShape) -> list[AotCase]:
    """Every kernel as a training step launches it: bfloat16 activations with float32 weights, and all float32."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for add in (False, True):
            cases += [_forward_case(shape.d_model, dtype, add), _backward_case(shape.d_model, dtype, add)]
    return [*cases, _sum_case(shape.d_model)]


def _case(
    name: str, kernel: Any, pointers: dict[str, str], ints: dict[str, str], consts: dict[str, Any], num_warps: int
) -> AotCase:
    """A case whose pointers and strides are divisible by 16; ``rows`` and ``parts`` are never specialised."""
    given = pointers | ints | dict.fromkeys(consts, "constexpr")
    signature = {argument: given[argument] for argument in kernel.arg_names}
    aligned = tuple(a for a in (*pointers, *ints) if a not in ("rows", "parts"))
    return AotCase(name, kernel, signature, consts, num_warps, aligned=aligned)


def _forward_case(d: int, dtype: torch.dtype, add: bool) -> AotCase:
    config, narrow = forward_config(d, dtype.itemsize), f"*{triton_name(dtype)}"
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "out_ptr", "total_ptr"), narrow)
    pointers |= {"weight_ptr": "*fp32", "rstd_ptr": "*fp32"}
    ints = dict.fromkeys(("rows", "x_stride", "residual_stride"), "i32")
    consts = {"EPS": 1e-6, "D": d, "ADD": add, **config.forward_arguments()}
    name = f"{'add_' if add else ''}rms_norm_forward-{triton_name(dtype)}"
    return _case(name, rms_norm_forward, pointers, ints, consts, config.num_warps)


def _backward_case(d: int, dtype: torch.dtype, add: bool) -> AotCase:
    config, narrow = backward_config(d, dtype.itemsize), f"*{triton_name(dtype)}"
    kernel = rms_norm_backward if config.held else rms_norm_backward_wide
    pointers = dict.fromkeys(("grad_ptr", "grad_total_ptr", "x_ptr", "grad_x_ptr"), narrow)
    pointers |= dict.fromkeys(("weight_ptr", "rstd_ptr", "partial_ptr"), "*fp32")
    ints = dict.fromkeys(("rows", "grad_stride", "total_stride", "x_stride"), "i32")
    consts = {"D": d, "NEED_X": True, "NEED_WEIGHT": True, "HAS_TOTAL": add, **config.backward_arguments()}
    name = f"{'add_' if add else ''}rms_norm_backward-{triton_name(dtype)}"
    return _case(name, kernel, pointers, ints, consts, config.num_warps)


def _sum_case(d: int) -> AotCase:
    config = sum_config(d)
    consts = {"D": d, "ROWS": config.rows, "BLOCK": config.block}
    pointers = {"partial_ptr": "*fp32", "out_ptr": "*fp32"}
    return _case("rms_norm_sum", sum_partials, pointers, {"parts": "i32"}, consts, config.num_warps)
