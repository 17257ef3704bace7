"""The Triton kernels of RMSNorm and how they cut the work; launched by ``rms_norm_triton.py``.

With ``n = x * rstd``, ``y = round(n) * w`` and ``g`` the gradient of ``y``, both roundings to the dtype of ``x``::

    dx = rstd * (g * w - n * mean(g * w * n))          dw = sum over rows of g * round(n)

A program holds a tile of whole rows in registers, as up to four blocks of a power of two columns: 1536 is 3 x 512 and
96 is 3 x 32 (one block of 2048 or 128 would leave a quarter of the lanes idle). Rows too wide for that are read twice,
the second time from cache. Row indices are int64 before they meet a stride.

The weight gradient is summed over a number of partitions that depends on the shape only, never on the GPU, each in
float32 by one program; a second kernel adds the partitions in a fixed order. Same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
import triton.language as tl

_MAX_STEPS = 4
_TILE_BYTES = 2048  # one load by 4 warps, 16 bytes a thread
_FORWARD_HELD = 16384  # columns; 32 float32 values a thread in 16 warps
_BACKWARD_HELD = 8192  # a row of x, its gradient, their products and the partial sums
_WIDE_BLOCK = 4096
_PIPELINED_BYTES = 8192  # of a tile; two tiles of x, gradient and weight in flight need 37 KB of shared memory at most
_PARTITIONS = 512  # 4 programs of at most 128 registers a thread on each of 132 processors; 3 MB of sums at d = 1536
_WIDE_PARTITIONS = 128  # partial sums in memory: 34 MB at d = 65536 stay in an L2 of 50 MB


@dataclass(frozen=True)
class NormConfig:
    """How a kernel cuts rows of one width: ``rows`` rows a tile, ``steps`` blocks of ``block`` columns a row.

    ``held``: a tile stays in registers; otherwise it is read twice. ``stages``: tiles in flight in a loop over tiles.
    """

    rows: int
    block: int
    steps: int
    held: bool
    num_warps: int
    stages: int

    def forward_arguments(self) -> dict[str, Any]:
        """The constexpr arguments of the forward kernel that this decides."""
        return {"ROWS": self.rows, "BLOCK": self.block, "STEPS": self.steps, "HELD": self.held}

    def backward_arguments(self) -> dict[str, Any]:
        """The constexpr arguments of the backward kernel that this decides."""
        cut = {"BLOCK": self.block, "STEPS": self.steps}
        return cut | ({"ROWS": self.rows, "STAGES": self.stages} if self.held else {})


def _config(d: int, itemsize: int, held_columns: int) -> NormConfig:
    """Least padding, then fewest blocks; rows enough to fill a tile, a warp for every 16 bytes a lane of a load."""
    cuts = [(steps, triton.next_power_of_2(-(-d // steps))) for steps in range(1, _MAX_STEPS + 1)]
    steps, block = min(cuts, key=lambda cut: (cut[0] * cut[1], cut[0]))
    held = steps * block <= held_columns
    if not held:
        steps, block = -(-d // _WIDE_BLOCK), _WIDE_BLOCK
    rows = max(1, _TILE_BYTES // (block * itemsize))
    # Two float32 tiles of several rows in flight spill: 2 registers at d = 96 on sm_100 (Triton 3.9), 8 bytes at 768 on
    # sm_90 (3.6); of one row, d = 1536, it is the other way round on sm_80.
    fits = held and rows * block * steps * itemsize <= _PIPELINED_BYTES
    stages = 2 if fits and (itemsize == 2 or rows == 1) else 1
    return NormConfig(rows, block, steps, held, min(16, max(4, rows * block * itemsize // 512)), stages)


@cache
def forward_config(d: int, itemsize: int) -> NormConfig:
    """The forward's cut of rows of ``d`` columns of ``itemsize`` bytes."""
    return _config(d, itemsize, _FORWARD_HELD)


@cache
def backward_config(d: int, itemsize: int) -> NormConfig:
    """The backward's cut of rows of ``d`` columns of ``itemsize`` bytes."""
    return _config(d, itemsize, _BACKWARD_HELD)


def partitions(rows: int, config: NormConfig) -> int:
    """Partial sums of the weight gradient, one for each program of the backward; nothing of the GPU enters."""
    return min(-(-rows // config.rows), _PARTITIONS if config.held else _WIDE_PARTITIONS)


@dataclass(frozen=True)
class SumConfig:
    """``rows`` x ``block`` partial sums a load."""

    rows: int
    block: int
    num_warps: int = 8


def sum_config(d: int) -> SumConfig:
    """Four loads for all partitions, and programs enough to fill a GPU."""
    return SumConfig(128, 16) if d <= _BACKWARD_HELD else SumConfig(32, 128)


@triton.jit
def _load(x_ptr, residual_ptr, x_at, residual_at, mask, ADD: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of x, or of x + residual rounded to the dtype of x, upcast."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(wide)
    if ADD:
        x += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(wide)
        x = x.to(x_ptr.dtype.element_ty).to(wide)
    return x


@triton.jit
def _normalise(x, rstd, weight_ptr, out_ptr, total_ptr, column, at, mask, D: tl.constexpr, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a block of the output, and of the sum."""
    narrow: tl.constexpr = out_ptr.dtype.element_ty
    product: tl.constexpr = tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else x.dtype
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(product)
    if ADD:
        tl.store(total_ptr + at, x.to(narrow), mask=mask)
    normalised = (x * rstd).to(narrow).to(product)
    tl.store(out_ptr + at, (normalised * weight[None, :]).to(narrow), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward(  # type: ignore[no-untyped-def]
    x_ptr,  # (rows, D)
    residual_ptr,  # (rows, D) if ADD
    weight_ptr,  # (D,)
    out_ptr,  # (rows, D), contiguous
    total_ptr,  # (rows, D), contiguous, if ADD
    rstd_ptr,  # (rows,), of the dtype of statistics
    rows,
    x_stride,
    residual_stride,
    EPS: tl.constexpr,
    D: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    HELD: tl.constexpr,
):
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    x_row, residual_row, out_row = row[:, None] * x_stride, row[:, None] * residual_stride, row[:, None] * D
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), wide)
    held = ()
    if HELD:
        for step in tl.static_range(STEPS):
            column = step * BLOCK + columns
            mask = inside & (column < D)[None, :]
            at = column[None, :]
            x = _load(x_ptr, residual_ptr, x_row + at, residual_row + at, mask, ADD, wide)
            squares += x * x
            held = held + (x,)  # type: ignore[assignment]  # noqa: RUF005 (Triton cannot unpack)
    else:
        for step in range(STEPS):
            column = step * BLOCK + columns
            mask = inside & (column < D)[None, :]
            at = column[None, :]
            x = _load(x_ptr, residual_ptr, x_row + at, residual_row + at, mask, ADD, wide)
            squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 1) / D + EPS)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    rstd = rstd[:, None]
    if HELD:
        for step in tl.static_range(STEPS):
            column = step * BLOCK + columns
            mask = inside & (column < D)[None, :]
            _normalise(
                held[step], rstd, weight_ptr, out_ptr, total_ptr, column, out_row + column[None, :], mask, D, ADD
            )
    else:
        for step in range(STEPS):
            column = step * BLOCK + columns
            mask = inside & (column < D)[None, :]
            at = column[None, :]
            x = _load(x_ptr, residual_ptr, x_row + at, residual_row + at, mask, ADD, wide)
            _normalise(x, rstd, weight_ptr, out_ptr, total_ptr, column, out_row + at, mask, D, ADD)


@triton.jit
def _scale(grad, weight_ptr, column, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of the gradient times the weight."""
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(grad.dtype)
    return grad * weight[None, :]


@triton.jit
def _write_grad_x(grad_x, grad_x_ptr, grad_total_ptr, at, total_at, mask, HAS_TOTAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a block of the gradient of x; the gradient that reached the sum is added before the one rounding."""
    if HAS_TOTAL:
        grad_x += tl.load(grad_total_ptr + total_at, mask=mask, other=0.0).to(grad_x.dtype)
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward(  # type: ignore[no-untyped-def]
    grad_ptr,  # (rows, D)
    grad_total_ptr,  # (rows, D) if HAS_TOTAL
    x_ptr,  # (rows, D)
    weight_ptr,  # (D,)
    rstd_ptr,  # (rows,)
    grad_x_ptr,  # (rows, D), contiguous, if NEED_X
    partial_ptr,  # (programs, D), contiguous, of the dtype of statistics, if NEED_WEIGHT
    rows,
    grad_stride,
    total_stride,
    x_stride,
    D: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program p takes tiles p, p + programs, ...; a tile is read once."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    narrow: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    sums = ()
    for _ in tl.static_range(STEPS):
        sums = sums + (tl.zeros((ROWS, BLOCK), wide),)  # type: ignore[assignment]  # noqa: RUF005
    # With two stages the next tile's loads are in flight while this one is computed (asynchronous copies).
    for tile in tl.range(tl.program_id(0), (rows - 1) // ROWS + 1, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        inside = (row < rows)[:, None]
        row = row[:, None]
        dot = tl.zeros((ROWS, BLOCK), wide)
        held = ()
        new_sums = ()
        for step in tl.static_range(STEPS):
            column = step * BLOCK + columns
            mask = inside & (column < D)[None, :]
            x = tl.load(x_ptr + (row * x_stride + column[None, :]), mask=mask, other=0.0).to(wide)
            grad = tl.load(grad_ptr + (row * grad_stride + column[None, :]), mask=mask, other=0.0).to(wide)
            normalised = x * rstd
            if NEED_WEIGHT:
                added = sums[step] + grad * normalised.to(narrow).to(wide)
                new_sums = new_sums + (added,)  # type: ignore[assignment]  # noqa: RUF005
            if NEED_X:
                scaled = _scale(grad, weight_ptr, column, D)
                dot += scaled * normalised
                held = held + ((scaled, normalised),)  # type: ignore[assignment]  # noqa: RUF005
        if NEED_WEIGHT:
            sums = new_sums
        if NEED_X:
            mean = (tl.sum(dot, 1) / D)[:, None]
            for step in tl.static_range(STEPS):
                column = step * BLOCK + columns
                mask = inside & (column < D)[None, :]
                at, total_at = row * D + column[None, :], row * total_stride + column[None, :]
                grad_x = (held[step][0] - held[step][1] * mean) * rstd
                _write_grad_x(grad_x, grad_x_ptr, grad_total_ptr, at, total_at, mask, HAS_TOTAL)
    if NEED_WEIGHT:
        for step in tl.static_range(STEPS):
            column = step * BLOCK + columns
            tl.store(partial_ptr + tl.program_id(0) * D + column, tl.sum(sums[step], 0), mask=column < D)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_wide(  # type: ignore[no-untyped-def]
    grad_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    grad_stride,
    total_stride,
    x_stride,
    D: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """As :func:`rms_norm_backward` for rows beyond the registers: read twice, partial sums kept in memory."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    narrow: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    row_start = tl.program_id(0)
    for row_number in range(row_start, rows, tl.num_programs(0)):
        row = (row_number + tl.zeros((1,), tl.int32)).to(tl.int64)  # a tensor: the interpreter cannot convert scalars
        rstd = tl.load(rstd_ptr + row)[:, None]
        row = row[:, None]
        dot = tl.zeros((1, BLOCK), wide)
        if NEED_X:
            for step in range(STEPS):
                column = step * BLOCK + columns
                mask = (column < D)[None, :]
                x = tl.load(x_ptr + (row * x_stride + column[None, :]), mask=mask, other=0.0).to(wide)
                grad = tl.load(grad_ptr + (row * grad_stride + column[None, :]), mask=mask, other=0.0).to(wide)
                dot += _scale(grad, weight_ptr, column, D) * (x * rstd)
        mean = (tl.sum(dot, 1) / D)[:, None]
        for step in range(STEPS):
            column = step * BLOCK + columns
            mask = (column < D)[None, :]
            x = tl.load(x_ptr + (row * x_stride + column[None, :]), mask=mask, other=0.0).to(wide)
            grad = tl.load(grad_ptr + (row * grad_stride + column[None, :]), mask=mask, other=0.0).to(wide)
            normalised = x * rstd
            if NEED_WEIGHT:
                partial_at = partial_ptr + row_start * D + column[None, :]
                # Nothing was written before the program's first row.
                total = tl.load(partial_at, mask=mask & (row != row_start), other=0.0)
                tl.store(partial_at, total + grad * normalised.to(narrow).to(wide), mask=mask)
            if NEED_X:
                at, total_at = row * D + column[None, :], row * total_stride + column[None, :]
                grad_x = (_scale(grad, weight_ptr, column, D) - normalised * mean) * rstd
                _write_grad_x(grad_x, grad_x_ptr, grad_total_ptr, at, total_at, mask, HAS_TOTAL)
        if NEED_WEIGHT:
            tl.debug_barrier()  # the next row's loads of the partial sums may be other threads' stores


@triton.jit(do_not_specialize=["parts"])
def sum_partials(partial_ptr, out_ptr, parts, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(parts, D) to (D,): the sum over rows in a fixed order, rounded to the dtype of the output."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    totals = tl.zeros((ROWS, BLOCK), partial_ptr.dtype.element_ty)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < parts)[:, None] & (column < D)[None, :]
        totals += tl.load(partial_ptr + row[:, None] * D + column[None, :], mask=mask, other=0.0)
    # In two levels: 128 float32 numbers added one after another, as the interpreter does, lose 5 ulp.
    total = tl.sum(tl.sum(tl.reshape(totals, (ROWS // 8, 8, BLOCK)), 0), 0)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=column < D)
