"""Triton implementation of :func:`pico_kernels.swiglu`.

Forward and backward are one pass over the data each. The backward computes silu again from ``gate`` and writes both
gradients (or the one asked for) in the same launch, into new memory: the inputs and the incoming gradient stay as they
are. Contiguous tensors are one flat vector; others are read row by row with their own row stride.

Rounding points are those of the twin (:mod:`pico_kernels.swiglu`): silu in float32, rounded to the input dtype, then
the product rounded once more; in the backward ``grad * up`` and silu are rounded before they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from pico_kernels._dispatch import KERNEL_DTYPES, require
from pico_kernels._triton import (
    COMPILE_OPTIONS,
    AotCase,
    PicoShape,
    as_rows,
    on_device,
    register_op,
    triton_name,
)

_TILE_BYTES = 4096  # two 16-byte vectors of each input in flight per thread of four warps


@dataclass(frozen=True)
class SwiGLUConfig:
    """Tile of one program, powers of two, and its warps."""

    block_rows: int
    block_columns: int
    num_warps: int


def swiglu_config(rows: int, columns: int, itemsize: int) -> SwiGLUConfig:
    """Launch configuration for ``rows`` rows of ``columns`` elements; a flat vector is one row.

    Rows of several tiles are cut by the largest power of two that divides them, if that is at least 128 elements: no
    lane idles at Pico's 384 (3 x 128), 1536, 3072 and 6144. Narrow rows share a program.
    """
    elements = _TILE_BYTES // itemsize
    if rows == 1:
        return SwiGLUConfig(1, elements, num_warps=4)
    divisor = columns & -columns
    block_columns = min(elements, divisor if divisor >= 128 else triton.next_power_of_2(columns))
    return SwiGLUConfig(elements // block_columns, block_columns, num_warps=4)


@triton.jit
def _tile(program, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row (BLOCK_ROWS, 1) and column (1, BLOCK_COLUMNS) numbers of a program, int64, and which of them exist.

    int64 before any stride: 65536 rows of 50304 elements are more than 2 ** 31, as is a long flat vector.
    """
    column_blocks = (columns - 1) // BLOCK_COLUMNS + 1  # tl.cdiv would overflow just below 2 ** 31 columns
    row_block = program // column_blocks
    column_block = program % column_blocks
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def swiglu_forward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,  # (rows, columns), last stride 1
    up_ptr,  # likewise
    out_ptr,  # contiguous
    rows,
    columns,
    gate_stride,
    up_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``out = silu(gate) * up`` for one tile; grid: blocks of rows x blocks of columns."""
    narrow: tl.constexpr = out_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if narrow == tl.float64 else tl.float32
    row, column, mask = _tile(tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(wide)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(wide)
    silu = (gate / (1.0 + tl.exp(-gate))).to(narrow).to(wide)
    tl.store(out_ptr + row * columns + column, (silu * up).to(narrow), mask=mask)


@triton.jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # (rows, columns), last stride 1
    gate_ptr,  # likewise
    up_ptr,  # likewise
    grad_gate_ptr,  # contiguous
    grad_up_ptr,  # contiguous
    rows,
    columns,
    grad_stride,
    gate_stride,
    up_stride,
    GATE: tl.constexpr,  # whether to write the gradient of gate
    UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Gradients of :func:`swiglu_forward_kernel` for one tile, with the same grid.

    ``d up = grad * silu(gate)``; ``d gate = grad * up * s * (1 + gate * (1 - s))`` with ``s`` the sigmoid of ``gate``.
    """
    narrow: tl.constexpr = gate_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if narrow == tl.float64 else tl.float32
    row, column, mask = _tile(tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(wide)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(wide)
    out = row * columns + column
    power = 1.0 + tl.exp(-gate)
    if GATE:
        up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(wide)
        grad_silu = (grad * up).to(narrow).to(wide)
        sigmoid = 1.0 / power
        grad_gate = grad_silu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(grad_gate_ptr + out, grad_gate.to(narrow), mask=mask)
    if UP:
        silu = (gate / power).to(narrow).to(wide)
        tl.store(grad_up_ptr + out, (grad * silu).to(narrow), mask=mask)


def _two_dimensional(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All of one shape, as (rows, columns) views or copies with last stride 1; one row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


def _launch(kernel: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], flags: dict[str, bool]) -> None:
    """Run a kernel on (rows, columns) ``inputs`` of one shape."""
    rows, columns = inputs[0].shape
    config = swiglu_config(rows, columns, inputs[0].element_size())
    grid = (triton.cdiv(rows, config.block_rows) * triton.cdiv(columns, config.block_columns),)
    strides = [x.stride(0) for x in inputs]
    with on_device(inputs[0]):
        kernel[grid](
            *inputs,
            *outputs,
            rows,
            columns,
            *strides,
            **flags,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLUMNS=config.block_columns,
            num_warps=config.num_warps,
            **COMPILE_OPTIONS,
        )


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    require(gate.dtype in KERNEL_DTYPES, "swiglu", "gate", "float32, bfloat16, float16 or float64", gate.dtype)
    out = _empty_like(gate)
    if out.numel():
        _launch(swiglu_forward_kernel, _two_dimensional(gate, up), [out], {})
    return out


def _backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    """The gradients asked for (at least one), in the order gate, up."""
    outputs = [_empty_like(gate) for needed in (need_gate, need_up) if needed]
    if gate.numel():
        inputs = _two_dimensional(grad, gate, up)
        # Without one of the gradients its pointer is the other's, and is not followed.
        _launch(swiglu_backward_kernel, inputs, [outputs[0], outputs[-1]], {"GATE": need_gate, "UP": need_up})
    return outputs


def _gradients(
    ctx: Any, grad: torch.Tensor, backward: Callable[..., list[torch.Tensor]]
) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    found = iter(backward(grad, *ctx.saved_tensors, *needs) if any(needs) else ())
    return tuple(next(found) if needed else None for needed in needs)


class _SwiGLU(torch.autograd.Function):
    """The eager path; saves the inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grad, _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _forward_fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    return [gate.new_empty(gate.shape) for needed in (need_gate, need_up) if needed]


_backward_op = register_op(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, bool need_gate, bool need_up) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _traced_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, grad, _backward_op)


_swiglu_op = register_op(
    "swiglu(Tensor gate, Tensor up) -> Tensor", _forward, _forward_fake, _traced_backward, _setup_context
)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """:func:`pico_kernels.swiglu` in one kernel launch; arguments are trusted.

    Any strides are read; rows whose elements are not side by side are copied first. Returns a contiguous tensor.
    """
    if torch.compiler.is_compiling():
        return _swiglu_op(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return _forward(gate, up)


def aot_cases(shape: PicoShape) -> list[AotCase]:
    """Forward and backward over a flat vector in bfloat16 and float32, and over rows with a stride in bfloat16."""
    tokens = 16384
    cases = []
    for layout, dtype in (("flat", torch.bfloat16), ("flat", torch.float32), ("rows", torch.bfloat16)):
        rows, columns = (1, tokens * shape.hidden) if layout == "flat" else (tokens, shape.hidden)
        config = swiglu_config(rows, columns, dtype.itemsize)
        blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
        for direction, kernel, inputs, outputs, flags in (
            ("forward", swiglu_forward_kernel, ("gate", "up"), ("out",), {}),
            (
                "backward",
                swiglu_backward_kernel,
                ("grad", "gate", "up"),
                ("grad_gate", "grad_up"),
                {"GATE": True, "UP": True},
            ),
        ):
            pointers = tuple(f"{name}_ptr" for name in (*inputs, *outputs))
            strides = tuple(f"{name}_stride" for name in inputs)
            # A launch makes an integer argument that is 1 a constant: the row count of a flat vector.
            constants: dict[str, Any] = {**flags, **blocks, **({"rows": 1} if rows == 1 else {})}
            signature = {
                **dict.fromkeys(pointers, f"*{triton_name(dtype)}"),
                **dict.fromkeys(("rows", "columns", *strides), "i32"),
                **dict.fromkeys(constants, "constexpr"),
            }
            aligned = (*pointers, "columns", *strides, *(() if rows == 1 else ("rows",)))
            name = f"swiglu_{direction}_{layout}-{triton_name(dtype)}"
            cases.append(AotCase(name, kernel, signature, constants, config.num_warps, aligned=aligned))
    return cases
