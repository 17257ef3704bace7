"""Triton kernels of :mod:`pico_kernels.attention_triton`: FlashAttention-2 (arXiv 2307.08691) without atomics.

**Rows.** The ``GROUP`` query heads that share a key-value head are packed into the rows of one tile: row ``r`` of a
key-value head is position ``r // GROUP``, head ``r % GROUP`` of its group. Keys and values are read once per group, few
positions still fill a tile, and the key gradient sums over the group in registers.

**Masks.** Every position sees one interval of keys and every key is seen by one interval of positions, whether the
bound is the causal diagonal, a document or the end of the sequence. Both ends grow with the position, so the first and
the last position of a tile tell which blocks are skipped, which need no mask and which are compared element by element.

**Strides** come in units of 8 elements where 8 divides them all: at head_dim 8 the compiler could not see otherwise
that rows start at multiples of 16 bytes, and would load them element by element.

**Numbers.** Products take the input dtype and accumulate in float32; softmax is float32 in powers of two, its scale
folded into one multiply-add per score. So is the log-sum-exp: taken to base e and back it would be rounded twice, which
float32 gradients show. Probabilities and score gradients are rounded to the input dtype for the second products.
``WIDEN`` makes operands float32 after that rounding: Triton's interpreter cannot multiply bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    ptr, offset, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALL_EXIST: tl.constexpr, WIDEN: tl.constexpr
):
    """(rows, BLOCK_D) tile at the element offsets (rows, 1); zeros right of HEAD_DIM and where no row exists."""
    column = tl.arange(0, BLOCK_D)[None, :]
    if ALL_EXIST and HEAD_DIM == BLOCK_D:
        tile = tl.load(ptr + offset + column)
    elif ALL_EXIST:
        tile = tl.load(ptr + offset + column, mask=column < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(ptr + offset + column, mask=exists & (column < HEAD_DIM), other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _store_rows(ptr, offset, exists, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The counterpart of :func:`_load_rows`, rounding to the dtype of ``ptr``."""
    column = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + offset + column, tile.to(ptr.dtype.element_ty), mask=exists & (column < HEAD_DIM))


@triton.jit
def _rounded(x, narrow: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 tile as operand of a product in the input dtype."""
    return x.to(narrow).to(tl.float32) if WIDEN else x.to(narrow)


@triton.jit
def _row_offset(row, stride, head_stride, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offset of packed rows, in the unit of the strides; int64 first, as rows may lie 2 ** 31 elements apart."""
    return (row // GROUP).to(tl.int64) * stride + (row % GROUP).to(tl.int64) * head_stride


@triton.jit
def _keys_seen(  # type: ignore[no-untyped-def]
    position, first_ptr, last_ptr, queries, keys, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """First and one-past-last key that positions see; none for positions past the end of packed documents."""
    low = position * 0
    high = low + keys
    if DOCUMENTS:
        low = tl.load(first_ptr + position, mask=position < queries, other=0)
        high = tl.load(last_ptr + position, mask=position < queries, other=0)
    if CAUSAL:
        high = tl.minimum(high, position + (keys - queries) + 1)
    return low, high


@triton.jit
def _positions_seeing(  # type: ignore[no-untyped-def]
    key, first_ptr, last_ptr, queries, keys, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """First and one-past-last position that see keys: :func:`_keys_seen` read the other way."""
    low = key * 0
    high = low + queries
    if DOCUMENTS:
        low = tl.load(first_ptr + key, mask=key < keys, other=0)
        high = tl.load(last_ptr + key, mask=key < keys, other=0)
    if CAUSAL:
        low = tl.maximum(low, key - (keys - queries))
    return low, high


@triton.jit
def _key_blocks(  # type: ignore[no-untyped-def]
    begin,
    first_ptr,
    last_ptr,
    queries,
    keys,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys a tile of rows needs, [start, end), and [whole_start, whole_end) in it, blocks that every row sees whole."""
    last_row = tl.minimum(begin + BLOCK_M, queries * GROUP) - 1
    start, high = _keys_seen(begin // GROUP, first_ptr, last_ptr, queries, keys, CAUSAL, DOCUMENTS)
    low, end = _keys_seen(last_row // GROUP, first_ptr, last_ptr, queries, keys, CAUSAL, DOCUMENTS)
    whole_start = tl.cdiv(low, BLOCK_N) * BLOCK_N
    whole_end = tl.maximum(high // BLOCK_N * BLOCK_N, whole_start)
    return start // BLOCK_N * BLOCK_N, whole_start, whole_end, end


@triton.jit
def _forward_blocks(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    q,
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
    FROM_LOW: tl.constexpr,  # whether low is more than 0 for some row, so that a row may see nothing of a block
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over blocks of keys from ``start`` to ``end``; ``peak`` is the largest score before scaling."""
    narrow: tl.constexpr = v_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_N)
    for block in range(start, end, BLOCK_N):
        key = block + column
        exists = (key < keys)[:, None]
        offset = key.to(tl.int64)[:, None]
        k = _load_rows(k_ptr, offset * k_stride * UNIT, exists, HEAD_DIM, BLOCK_D, not MASKED, WIDEN)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = key[None, :] < high[:, None]
            if FROM_LOW:
                visible = visible & (key[None, :] >= low[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet has a peak of -inf, and -inf - -inf is NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        weights = tl.exp2(scores * (SCALE * _LOG2_E) - (shift * (SCALE * _LOG2_E))[:, None])
        decay = tl.exp2((peak - shift) * (SCALE * _LOG2_E))
        total = total * decay + tl.sum(weights, 1)
        v = _load_rows(v_ptr, offset * v_stride * UNIT, exists, HEAD_DIM, BLOCK_D, not MASKED, WIDEN)
        acc = tl.dot(_rounded(weights, narrow, WIDEN), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit
def attention_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # (batch, queries, kv_heads * GROUP, HEAD_DIM), last stride 1
    k_ptr,  # (batch, keys, kv_heads, HEAD_DIM), last stride 1
    v_ptr,  # likewise
    out_ptr,  # (splits, batch, queries, heads, HEAD_DIM), contiguous
    lse_ptr,  # (splits, batch, heads, queries) float32, contiguous; base 2
    first_ptr,  # (queries,) int32: first key of each position's document
    last_ptr,  # (queries,) int32: one past its last key
    queries,
    keys,
    kv_heads,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    UNIT: tl.constexpr,  # elements in one of the strides
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    SPLIT: tl.constexpr,  # keys of one program, a multiple of BLOCK_N; 0: all of them
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp of one tile of rows over the keys of one split; grid: (tiles x batch x kv_heads, splits).

    The last tiles come first: with a causal mask they are the longest.
    """
    rows = queries * GROUP
    tiles = tl.cdiv(rows, BLOCK_M)
    pairs = tl.num_programs(0) // tiles  # batch x kv_heads
    pair = tl.program_id(0) % pairs
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    begin = (tiles - 1 - tl.program_id(0) // pairs) * BLOCK_M
    row = begin + tl.arange(0, BLOCK_M)
    low, high = _keys_seen(row // GROUP, first_ptr, last_ptr, queries, keys, CAUSAL, DOCUMENTS)
    start, whole_start, whole_end, end = _key_blocks(
        begin, first_ptr, last_ptr, queries, keys, GROUP, CAUSAL, DOCUMENTS, BLOCK_M, BLOCK_N
    )
    image = batch
    if SPLIT > 0:
        image += tl.program_id(1).to(tl.int64) * (pairs // kv_heads)
        start = tl.maximum(start, tl.program_id(1) * SPLIT)
        end = tl.minimum(end, (tl.program_id(1) + 1) * SPLIT)
        whole_start = tl.maximum(whole_start, start)
        whole_end = tl.maximum(tl.minimum(whole_end, end // BLOCK_N * BLOCK_N), whole_start)

    head = kv_head * GROUP
    q_ptr += (batch * q_batch_stride + head * q_head_stride) * UNIT
    k_ptr += (batch * k_batch_stride + kv_head * k_head_stride) * UNIT
    v_ptr += (batch * v_batch_stride + kv_head * v_head_stride) * UNIT
    exists = (row < rows)[:, None]
    q_offset = _row_offset(row, q_stride, q_head_stride, GROUP)[:, None] * UNIT
    q = _load_rows(q_ptr, q_offset, exists, HEAD_DIM, BLOCK_D, False, WIDEN)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(0 if DOCUMENTS else 1, 3):
        acc, peak, total = _forward_blocks(
            acc,
            peak,
            total,
            q,
            k_ptr,
            v_ptr,
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
    heads = kv_heads * GROUP
    total = tl.where(total == 0.0, 1.0, total)  # nothing was seen: out is 0, lse -inf
    lse = peak * (SCALE * _LOG2_E) + tl.log2(total)
    out = acc / total[:, None]
    out_ptr += (image * queries * heads + head) * HEAD_DIM
    _store_rows(out_ptr, _row_offset(row, heads * HEAD_DIM, HEAD_DIM, GROUP)[:, None], exists, out, HEAD_DIM, BLOCK_D)
    lse_ptr += (image * heads + head) * queries
    tl.store(lse_ptr + _row_offset(row, 1, queries, GROUP), lse, mask=row < rows)
