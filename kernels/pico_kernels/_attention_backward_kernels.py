"""Triton kernels of the gradients of attention; rows, masks and numbers as in :mod:`pico_kernels._attention_kernels`.

With ``p`` the probabilities, ``dp = grad v^T`` and ``delta = sum(grad * out) - grad_lse`` per row (``grad_lse`` as of
base e), the gradient of the scores is ``p * (dp - delta)``. The query kernel computes ``delta`` on its way, so it runs
first. Both kernels compute the probabilities again from the log-sum-exp: seven products instead of five, but every sum
has one owner and one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pico_kernels._attention_kernels import (
    _LOG2_E,
    _key_blocks,
    _keys_seen,
    _load_rows,
    _positions_seeing,
    _rounded,
    _row_offset,
    _store_rows,
)


@triton.jit
def _query_blocks(  # type: ignore[no-untyped-def]
    acc,
    q,
    grad,
    lse,
    delta,
    k_ptr,
    v_ptr,
    start,
    end,
    low,
    high,
    keys,
    k_stride,
    v_stride,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    FROM_LOW: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the unscaled query gradient of blocks of keys from ``start`` to ``end``."""
    narrow: tl.constexpr = k_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_N)
    for block in range(start, end, BLOCK_N):
        key = block + column
        exists = (key < keys)[:, None]
        offset = key.to(tl.int64)[:, None]
        k = _load_rows(k_ptr, offset * k_stride * UNIT, exists, HEAD_DIM, BLOCK_D, not MASKED, WIDEN)
        v = _load_rows(v_ptr, offset * v_stride * UNIT, exists, HEAD_DIM, BLOCK_D, not MASKED, WIDEN)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        weights = tl.exp2(scores * (SCALE * _LOG2_E) - lse[:, None])
        if MASKED:
            visible = key[None, :] < high[:, None]
            if FROM_LOW:
                visible = visible & (key[None, :] >= low[:, None])
            weights = tl.where(visible, weights, 0.0)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = _rounded(weights * (grad_weights - delta[:, None]), narrow, WIDEN)
        acc = tl.dot(grad_scores, k, acc, input_precision="ieee")
    return acc


@triton.jit
def attention_query_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # (batch, queries, heads, HEAD_DIM), last stride 1
    q_ptr,  # (batch, queries, heads, HEAD_DIM), last stride 1
    k_ptr,  # (batch, keys, kv_heads, HEAD_DIM), last stride 1
    v_ptr,  # likewise
    out_ptr,  # (batch, queries, heads, HEAD_DIM), contiguous
    lse_ptr,  # (batch, heads, queries) float32, contiguous; base 2
    grad_lse_ptr,  # likewise
    first_ptr,  # as in the forward
    last_ptr,
    delta_ptr,  # (batch, heads, queries) float32, contiguous
    grad_q_ptr,  # as out
    queries,
    keys,
    kv_heads,
    grad_batch_stride,
    grad_stride,
    grad_head_stride,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    GRAD_LSE: tl.constexpr,  # whether there is a gradient of the log-sum-exp
    QUERY: tl.constexpr,  # whether to write the gradient of q, and not delta alone
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``delta`` and the gradient of ``q`` of one tile of rows; grid: tiles x batch x kv_heads, last tiles first."""
    rows = queries * GROUP
    tiles = tl.cdiv(rows, BLOCK_M)
    pairs = tl.num_programs(0) // tiles
    pair = tl.program_id(0) % pairs
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    begin = (tiles - 1 - tl.program_id(0) // pairs) * BLOCK_M
    row = begin + tl.arange(0, BLOCK_M)
    exists = (row < rows)[:, None]
    heads = kv_heads * GROUP
    head = kv_head * GROUP

    grad_ptr += (batch * grad_batch_stride + head * grad_head_stride) * UNIT
    grad_offset = _row_offset(row, grad_stride, grad_head_stride, GROUP)[:, None] * UNIT
    grad = _load_rows(grad_ptr, grad_offset, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
    out_start = (batch * queries * heads + head) * HEAD_DIM
    out_offset = _row_offset(row, heads * HEAD_DIM, HEAD_DIM, GROUP)[:, None]
    out = _load_rows(out_ptr + out_start, out_offset, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    number = (batch * heads + head) * queries + _row_offset(row, 1, queries, GROUP)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + number, mask=row < rows, other=0.0) * _LOG2_E
    tl.store(delta_ptr + number, delta, mask=row < rows)

    if QUERY:
        # Infinity makes every probability of a row that does not exist 0.
        lse = tl.load(lse_ptr + number, mask=row < rows, other=float("inf"))
        low, high = _keys_seen(row // GROUP, first_ptr, last_ptr, queries, keys, CAUSAL, DOCUMENTS)
        start, whole_start, whole_end, end = _key_blocks(
            begin, first_ptr, last_ptr, queries, keys, GROUP, CAUSAL, DOCUMENTS, BLOCK_M, BLOCK_N
        )
        q_ptr += (batch * q_batch_stride + head * q_head_stride) * UNIT
        q_offset = _row_offset(row, q_stride, q_head_stride, GROUP)[:, None] * UNIT
        q = _load_rows(q_ptr, q_offset, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for part in tl.static_range(0 if DOCUMENTS else 1, 3):
            acc = _query_blocks(
                acc,
                q,
                grad,
                lse,
                delta,
                k_ptr + (batch * k_batch_stride + kv_head * k_head_stride) * UNIT,
                v_ptr + (batch * v_batch_stride + kv_head * v_head_stride) * UNIT,
                start if part == 0 else (whole_start if part == 1 else whole_end),
                whole_start if part == 0 else (whole_end if part == 1 else end),
                low,
                high,
                keys,
                k_stride,
                v_stride,
                UNIT,
                SCALE,
                HEAD_DIM,
                part != 1,
                DOCUMENTS,
                WIDEN,
                BLOCK_D,
                BLOCK_N,
            )
        _store_rows(grad_q_ptr + out_start, out_offset, exists, acc * SCALE, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_blocks(  # type: ignore[no-untyped-def]
    grad_k,
    grad_v,
    k,
    v,
    grad_ptr,
    q_ptr,
    lse_ptr,
    delta_ptr,
    start,
    end,
    low,
    high,
    queries,
    grad_stride,
    grad_head_stride,
    q_stride,
    q_head_stride,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds the gradients of k (unscaled) and v of tiles of rows from ``start`` to ``end``; tiles are transposed."""
    narrow: tl.constexpr = q_ptr.dtype.element_ty
    rows = queries * GROUP
    for begin in range(start, end, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        exists = (row < rows)[:, None]
        q_offset = _row_offset(row, q_stride, q_head_stride, GROUP)[:, None] * UNIT
        q = _load_rows(q_ptr, q_offset, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
        number = _row_offset(row, 1, queries, GROUP)
        # Infinity makes every probability of a row that does not exist 0.
        lse = tl.load(lse_ptr + number, mask=row < rows, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        weights = tl.exp2(scores * (SCALE * _LOG2_E) - lse[None, :])
        if MASKED:
            position = row // GROUP
            visible = position[None, :] >= low[:, None]
            if DOCUMENTS:
                visible = visible & (position[None, :] < high[:, None])
            weights = tl.where(visible, weights, 0.0)
        grad_offset = _row_offset(row, grad_stride, grad_head_stride, GROUP)[:, None] * UNIT
        grad = _load_rows(grad_ptr, grad_offset, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
        if VALUE:
            grad_v = tl.dot(_rounded(weights, narrow, WIDEN), grad, grad_v, input_precision="ieee")
        if KEY:
            delta = tl.load(delta_ptr + number, mask=row < rows, other=0.0)
            grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
            grad_scores = _rounded(weights * (grad_weights - delta[None, :]), narrow, WIDEN)
            grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def attention_key_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # (batch, queries, heads, HEAD_DIM), last stride 1
    q_ptr,  # (batch, queries, heads, HEAD_DIM), last stride 1
    k_ptr,  # (batch, keys, kv_heads, HEAD_DIM), last stride 1
    v_ptr,  # likewise
    lse_ptr,  # (batch, heads, queries) float32, contiguous; base 2
    delta_ptr,  # likewise
    first_ptr,  # as in the forward
    last_ptr,
    grad_k_ptr,  # (batch, keys, kv_heads, HEAD_DIM), contiguous
    grad_v_ptr,  # likewise
    queries,
    keys,
    kv_heads,
    grad_batch_stride,
    grad_stride,
    grad_head_stride,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    KEY: tl.constexpr,  # whether to write the gradient of k
    VALUE: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of one block of keys and values, summed over the group; grid: blocks x batch x kv_heads.

    The first blocks come first: with a causal mask most rows see them.
    """
    pairs = tl.num_programs(0) // tl.cdiv(keys, BLOCK_N)
    pair = tl.program_id(0) % pairs
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    head = kv_head * GROUP
    block = tl.program_id(0) // pairs * BLOCK_N
    key = block + tl.arange(0, BLOCK_N)
    exists = (key < keys)[:, None]
    low, high = _positions_seeing(key, first_ptr, last_ptr, queries, keys, CAUSAL, DOCUMENTS)
    last_key = tl.minimum(block + BLOCK_N, keys) - 1
    first_low, first_high = _positions_seeing(block, first_ptr, last_ptr, queries, keys, CAUSAL, DOCUMENTS)
    last_low, last_high = _positions_seeing(last_key, first_ptr, last_ptr, queries, keys, CAUSAL, DOCUMENTS)
    start = first_low * GROUP
    end = last_high * GROUP
    whole_start = start + tl.cdiv(last_low * GROUP - start, BLOCK_M) * BLOCK_M
    whole_end = end
    if DOCUMENTS:
        whole_end = whole_start + tl.maximum(first_high * GROUP - whole_start, 0) // BLOCK_M * BLOCK_M

    k_offset = key.to(tl.int64)[:, None]
    k_start = (batch * k_batch_stride + kv_head * k_head_stride) * UNIT
    k = _load_rows(k_ptr + k_start, k_offset * k_stride * UNIT, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
    v_start = (batch * v_batch_stride + kv_head * v_head_stride) * UNIT
    v = _load_rows(v_ptr + v_start, k_offset * v_stride * UNIT, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    number = (batch * kv_heads * GROUP + head) * queries
    for part in tl.static_range(0 if CAUSAL or DOCUMENTS else 1, 3 if DOCUMENTS else 2):
        grad_k, grad_v = _key_gradient_blocks(
            grad_k,
            grad_v,
            k,
            v,
            grad_ptr + (batch * grad_batch_stride + head * grad_head_stride) * UNIT,
            q_ptr + (batch * q_batch_stride + head * q_head_stride) * UNIT,
            lse_ptr + number,
            delta_ptr + number,
            start if part == 0 else (whole_start if part == 1 else whole_end),
            whole_start if part == 0 else (whole_end if part == 1 else end),
            low,
            high,
            queries,
            grad_stride,
            grad_head_stride,
            q_stride,
            q_head_stride,
            KEY,
            VALUE,
            UNIT,
            SCALE,
            GROUP,
            HEAD_DIM,
            part != 1,
            DOCUMENTS,
            WIDEN,
            BLOCK_D,
            BLOCK_M,
        )
    out_start = (batch * keys * kv_heads + kv_head) * HEAD_DIM
    out_offset = k_offset * (kv_heads * HEAD_DIM)
    if KEY:
        _store_rows(grad_k_ptr + out_start, out_offset, exists, grad_k * SCALE, HEAD_DIM, BLOCK_D)
    if VALUE:
        _store_rows(grad_v_ptr + out_start, out_offset, exists, grad_v, HEAD_DIM, BLOCK_D)
