"""Few queries against a long cache: the keys are split among programs, and their results put together again.

One tile of rows per key-value head leaves most of a GPU idle, so the forward kernel runs on every split of the keys
(flash decoding) and :func:`attention_combine_kernel` weighs the partial outputs. How the keys are split depends on
their number alone, not on the GPU or the batch, and the sum has one order: the same bits everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pico_kernels._triton import COMPILE_OPTIONS, AotCase, on_device, triton_name

_SMALLEST_SPLIT = 256
_MOST_SPLITS = 64  # 256 programs for Pico's 4 key-value heads at batch 1, two for each SM of an H100


def split_length(rows: int, keys: int) -> int:
    """Keys of one split, a power of two; 0 where splitting does not pay: many rows or few keys.

    Args:
        rows: packed rows of a key-value head, queries times query heads per key-value head.
        keys: number of keys.
    """
    if rows > 64 or keys < 2 * _SMALLEST_SPLIT:
        return 0
    return max(_SMALLEST_SPLIT, triton.next_power_of_2(triton.cdiv(keys, _MOST_SPLITS)))


@triton.jit
def attention_combine_kernel(  # type: ignore[no-untyped-def]
    part_ptr,  # (splits, batch, queries, heads, HEAD_DIM) float32, contiguous: normalised outputs
    part_lse_ptr,  # (splits, batch, heads, queries) float32, contiguous; base 2, -inf where a split shows a row nothing
    out_ptr,  # (batch, queries, heads, HEAD_DIM), contiguous
    lse_ptr,  # (batch, heads, queries) float32, contiguous; base 2
    splits,
    queries,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row of the output from its splits; grid: batch x queries x heads."""
    row = tl.program_id(0).to(tl.int64)
    head = row % heads
    token = row // heads
    number = (token // queries * heads + head) * queries + token % queries
    split = tl.arange(0, BLOCK_SPLITS).to(tl.int64)
    lse = tl.load(part_lse_ptr + split * tl.num_programs(0) + number, mask=split < splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    weights = tl.exp2(lse - peak)
    total = tl.sum(weights, 0)
    column = tl.arange(0, BLOCK_D)[None, :]
    offset = (split[:, None] * tl.num_programs(0) + row) * HEAD_DIM + column
    part = tl.load(part_ptr + offset, mask=(split < splits)[:, None] & (column < HEAD_DIM), other=0.0)
    out = tl.sum(part * (weights / total)[:, None], 0)[None, :]
    tl.store(out_ptr + row * HEAD_DIM + column, out.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)
    tl.store(lse_ptr + number, peak + tl.log2(total))


def _num_warps(block_splits: int, block_d: int) -> int:
    return 8 if block_splits * block_d > 8192 else 4  # at most 64 elements a thread


def combine(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Write ``out`` and ``lse`` from the results of the splits, (splits, *out.shape) and (splits, *lse.shape)."""
    splits = part.shape[0]
    batch, queries, heads, head_dim = out.shape
    block_splits, block_d = triton.next_power_of_2(splits), triton.next_power_of_2(head_dim)
    with on_device(out):
        attention_combine_kernel[(batch * queries * heads,)](
            part,
            part_lse,
            out,
            lse,
            splits,
            queries,
            heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_SPLITS=block_splits,
            num_warps=_num_warps(block_splits, block_d),
            **COMPILE_OPTIONS,
        )


def combine_aot_case(head_dim: int, keys: int, dtype: torch.dtype) -> AotCase:
    """:func:`attention_combine_kernel` for one query against ``keys`` keys."""
    block_splits = triton.next_power_of_2(triton.cdiv(keys, split_length(1, keys)))
    block_d = triton.next_power_of_2(head_dim)
    constants = {"queries": 1, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_SPLITS": block_splits}
    pointers = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": f"*{triton_name(dtype)}", "lse_ptr": "*fp32"}
    return AotCase(
        f"attention_combine-{triton_name(dtype)}",
        attention_combine_kernel,
        {**pointers, "splits": "i32", "heads": "i32", **dict.fromkeys(constants, "constexpr")},
        constants,
        _num_warps(block_splits, block_d),
        aligned=tuple(pointers),
    )
