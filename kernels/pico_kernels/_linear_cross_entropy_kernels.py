"""The Triton kernels of the linear cross-entropy and how they cut the work.

With ``z = hidden @ weight^T``, ``p = softmax(z)``, ``t`` a token's label, ``c`` the coefficient of the squared
log-sum-exp (``lse``) and ``slope = 1 + 2 c lse``::

    loss = lse - z_t + c lse^2              d loss / d z_v = slope p_v - [v = t]
    d hidden = slope sum_{v != t} p_v weight_v + (slope p_t - 1) weight_t          (for an incoming gradient of 1)
    d weight_v = sum over tokens of g (slope p_v - [v = t]) hidden

The first sum is attention with ``weight`` as both keys and values, so the forward of the tiles computes it online, as
FlashAttention does (Dao, arXiv 2307.08691): 4 products and 2 exponentials a logit in all, where computing every logit
again for each of the two gradients (as Wijmans et al. do, arXiv 2411.09009) takes 5 and 3.

The label's column is left out of every sum over the vocabulary. ``slope p_t - 1`` then needs no subtraction of two
numbers close to 1: it is ``2 c lse p_t - (sum of the others) / (sum of all)``, exact to the float, and meets
``weight_t`` in float32. A label outside the vocabulary matches no column and is never followed.

Row indices are int64 before they meet a stride. Logarithms and exponentials are to base 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_PROGRAMS = 1024  # of a launch, at least: the last wave of 132 SMs, two programs each, is then at most a fifth of it
_MIN_COLUMNS = 2048  # of the vocabulary per program: 2048 products with a row for each partial sum stored and loaded
_MIN_TOKENS = 1024


@dataclass(frozen=True)
class TileConfig:
    """Tiles of the recomputing kernels.

    Attributes:
        held: rows whose sums a program holds: tokens in the forward, ids in the weight's gradient.
        streamed: rows of the other operand loaded at once.
        widths: columns of both operands, as one or two powers of two: 96 is 64 + 32, where 128 would cost a third more.
        num_warps: warps of a program.
        num_stages: tiles in flight.
    """

    held: int
    streamed: int
    widths: tuple[int, int]
    num_warps: int
    num_stages: int


def tile_widths(dim: int) -> tuple[int, int]:
    """``dim`` columns as one power of two, or as two where their sum is less; ``tl.dot`` needs 16 at least."""
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(max(1, dim - first)))
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def tile_config(dim: int, itemsize: int) -> TileConfig:
    """Tiles for rows of ``dim`` elements: the float32 sums of ``held`` rows must fit a program's registers."""
    widths = tile_widths(dim)
    if itemsize == 4:  # without tensor cores: each product is a chain of scalar instructions
        return TileConfig(32, 32, widths, num_warps=8, num_stages=2)
    if sum(widths) <= 128:
        return TileConfig(128, 64, widths, num_warps=8, num_stages=3)
    # Half the rows, though each tile from L2 is then used half as often: larger ones spill on sm_80 and sm_100.
    return TileConfig(64, 32, widths, num_warps=8, num_stages=3)


def forward_splits(tokens: int, vocab: int, config: TileConfig) -> int:
    """Parts of the vocabulary, each a program's; from the shape alone, so that every GPU sums in one order."""
    return min(triton.cdiv(_PROGRAMS, triton.cdiv(tokens, config.held)), triton.cdiv(vocab, _MIN_COLUMNS))


def weight_splits(tokens: int, vocab: int, config: TileConfig) -> int:
    """Parts of the tokens, each a program's."""
    return min(triton.cdiv(_PROGRAMS, triton.cdiv(vocab, config.held)), triton.cdiv(tokens, _MIN_TOKENS))


@triton.jit
def _dot(a, b, sums, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sums + a @ b`` in float32. Triton's interpreter multiplies bfloat16 wrongly: UPCAST is for it alone."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _columns(ptr, rows, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, WIDTH) from column FIRST on; 0 beyond ``count`` rows or DIM columns."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = rows[:, None] < count
    if FIRST + WIDTH > DIM:
        mask = mask & (column < DIM)
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + column, mask=mask, other=0.0)


@triton.jit
def _store_columns(ptr, values, rows, count, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store what :func:`_columns` loads, into contiguous rows of DIM elements."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = (rows[:, None] < count) & (column < DIM)
    tl.store(ptr + rows.to(tl.int64)[:, None] * DIM + column, values, mask=mask)


@triton.jit
def _labels(labels_ptr, rows, tokens, vocab):  # type: ignore[no-untyped-def]
    """The labels as int32, -1 where none is an id: 64-bit comparisons with every column would cost twice."""
    label = tl.load(labels_ptr + rows, mask=rows < tokens, other=-1)
    return tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)


@triton.jit
def tiles_forward_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # (tokens, DIM), last stride 1
    weight_ptr,  # (vocab, DIM), likewise, same dtype
    labels_ptr,  # (tokens,) int64
    maxima_ptr,  # (splits, tokens) float32: the largest logit of a part, times log2(e)
    sums_ptr,  # (splits, tokens) float32: the sum of 2 ** (log2(e) logit - maximum)
    means_ptr,  # (splits, tokens, DIM) float32: the rows of weight summed with these
    tokens,
    vocab,
    hidden_stride,
    weight_stride,
    columns_per_split,  # a multiple of STREAMED
    GRADIENT: tl.constexpr,  # whether to write means
    DIM: tl.constexpr,
    HELD: tl.constexpr,
    STREAMED: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Softmax statistics of a block of tokens over one part of the vocabulary, without the label's column.

    Grid: blocks of tokens (fastest) x parts. Programs that run together read the same part of ``weight`` at about the
    same time, and it comes from L2 (9.7 MB in bfloat16 at d 96, V 50304); each reads its tokens once.
    """
    narrow: tl.constexpr = hidden_ptr.dtype.element_ty
    token = tl.program_id(0) * HELD + tl.arange(0, HELD)
    part = tl.program_id(1).to(tl.int64)
    label = _labels(labels_ptr, token, tokens, vocab)
    hidden = _columns(hidden_ptr, token, tokens, hidden_stride, 0, WIDTH, DIM)
    means = tl.zeros((HELD, WIDTH), tl.float32)
    if REST:
        hidden_rest = _columns(hidden_ptr, token, tokens, hidden_stride, WIDTH, REST, DIM)
        means_rest = tl.zeros((HELD, REST), tl.float32)
    maximum = tl.full((HELD,), float("-inf"), tl.float32)
    total = tl.zeros((HELD,), tl.float32)
    start = tl.program_id(1) * columns_per_split
    for first in range(start, tl.minimum(start + columns_per_split, vocab), STREAMED):
        column = first + tl.arange(0, STREAMED)
        weight = _columns(weight_ptr, column, vocab, weight_stride, 0, WIDTH, DIM)
        logits = _dot(hidden, tl.trans(weight), tl.zeros((HELD, STREAMED), tl.float32), UPCAST)
        if REST:
            weight_rest = _columns(weight_ptr, column, vocab, weight_stride, WIDTH, REST, DIM)
            logits = _dot(hidden_rest, tl.trans(weight_rest), logits, UPCAST)
        others = (column[None, :] != label[:, None]) & (column < vocab)[None, :]
        logits = tl.where(others, logits, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logits, 1) * LOG2E)
        # Where every column so far was left out, any finite number in place of -inf gives sums of 0, not NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        powers = tl.exp2(logits * LOG2E - finite[:, None])
        shrink = tl.exp2(maximum - finite)
        total = total * shrink + tl.sum(powers, 1)
        maximum = higher
        if GRADIENT:
            rounded = powers.to(narrow)
            means = _dot(rounded, weight, means * shrink[:, None], UPCAST)
            if REST:
                means_rest = _dot(rounded, weight_rest, means_rest * shrink[:, None], UPCAST)
    row = part * tokens + token
    tl.store(maxima_ptr + row, maximum, mask=token < tokens)
    tl.store(sums_ptr + row, total, mask=token < tokens)
    if GRADIENT:
        means_ptr += part * tokens * DIM
        _store_columns(means_ptr, means, token, tokens, 0, WIDTH, DIM)
        if REST:
            _store_columns(means_ptr, means_rest, token, tokens, WIDTH, REST, DIM)


@triton.jit
def _token_statistics(others, maximum, target, Z_LOSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """From the sum over the other columns, relative to 2 ** maximum, and the label's logit (both times log2(e)).

    Returns the loss, the log-sum-exp (times log2(e)), the slope, the label's gradient, and the divisor of ``others``
    with the exponent it belongs to.
    """
    top = tl.maximum(maximum, target)
    finite = tl.where(top == float("-inf"), 0.0, top)
    others = others * tl.exp2(maximum - finite)
    own = tl.exp2(target - finite)
    total = others + own
    log_total = tl.log2(total)
    lse = (finite + log_total) * LN2
    loss = (finite - target + log_total) * LN2 + Z_LOSS * lse * lse
    bend = 2 * Z_LOSS * lse
    label_gradient = (bend * own - others) / total
    return loss, finite + log_total, 1 + bend, label_gradient, total, finite


@triton.jit
def tiles_combine_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # (tokens, DIM), last stride 1
    weight_ptr,  # (vocab, DIM), likewise
    labels_ptr,  # (tokens,) int64
    maxima_ptr,  # (splits, tokens), as tiles_forward_kernel wrote them
    sums_ptr,  # (splits, tokens)
    means_ptr,  # (splits, tokens, DIM)
    losses_ptr,  # (tokens,) float32
    statistics_ptr,  # (3, tokens) float32: log-sum-exp times log2(e), slope, gradient of the label's logit
    grad_hidden_ptr,  # (tokens, DIM), for incoming gradients of 1
    tokens,
    vocab,
    hidden_stride,
    weight_stride,
    ignore_index,
    splits,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Losses and gradients of a block of tokens from the parts of the vocabulary, in their order; ignored tokens get 0.

    The label's logit is computed here, in float32. Grid: blocks of tokens.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token < tokens
    counted = tl.load(labels_ptr + token, mask=exists, other=ignore_index) != ignore_index
    label = _labels(labels_ptr, token, tokens, vocab)
    known = tl.where(label >= 0, label, vocab)  # row vocab is not loaded but 0
    hidden = _columns(hidden_ptr, token, tokens, hidden_stride, 0, WIDTH, DIM).to(tl.float32)
    weight = _columns(weight_ptr, known, vocab, weight_stride, 0, WIDTH, DIM).to(tl.float32)
    target = tl.where(label >= 0, tl.sum(hidden * weight, 1) * LOG2E, float("-inf"))
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    row = token.to(tl.int64)
    for _ in range(splits):
        maximum = tl.maximum(maximum, tl.load(maxima_ptr + row, mask=exists, other=0.0))
        row += tokens
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    others = tl.zeros((ROWS,), tl.float32)
    means = tl.zeros((ROWS, WIDTH), tl.float32)
    row = token.to(tl.int64)
    for _ in range(splits):
        scale = tl.exp2(tl.load(maxima_ptr + row, mask=exists, other=0.0) - base)
        others += tl.load(sums_ptr + row, mask=exists, other=1.0) * scale
        if GRADIENT:
            means += _columns(means_ptr, token, tokens, DIM, 0, WIDTH, DIM) * scale[:, None]
            means_ptr += tl.cast(tokens, tl.int64) * DIM
        row += tokens
    loss, log_sum, slope, label_gradient, total, top = _token_statistics(others, base, target, Z_LOSS)
    tl.store(losses_ptr + token, tl.where(counted, loss, 0.0), mask=exists)
    tl.store(statistics_ptr + token, log_sum, mask=exists)
    tl.store(statistics_ptr + tokens + token, tl.where(counted, slope, 0.0), mask=exists)
    tl.store(statistics_ptr + tokens + tokens + token, tl.where(counted, label_gradient, 0.0), mask=exists)
    if GRADIENT:
        factor = slope * tl.exp2(base - top) / total
        grad = factor[:, None] * means + label_gradient[:, None] * weight
        grad = tl.where(counted[:, None], grad, 0.0).to(grad_hidden_ptr.dtype.element_ty)
        _store_columns(grad_hidden_ptr, grad, token, tokens, 0, WIDTH, DIM)


@triton.jit
def tiles_weight_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # (tokens, DIM), last stride 1
    weight_ptr,  # (vocab, DIM), likewise, same dtype
    labels_ptr,  # (tokens,) int64
    log_sums_ptr,  # (tokens,) float32: log-sum-exp times log2(e)
    slopes_ptr,  # (2, tokens) float32: slope and gradient of the label's logit, times the token's incoming gradient
    sums_ptr,  # (splits, vocab, DIM) float32
    tokens,
    vocab,
    hidden_stride,
    weight_stride,
    tokens_per_split,  # a multiple of STREAMED
    DIM: tl.constexpr,
    HELD: tl.constexpr,
    STREAMED: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of a block of rows of ``weight`` from one part of the tokens.

    Grid: blocks of the vocabulary (fastest) x parts: programs that run together read the same tokens.
    """
    narrow: tl.constexpr = hidden_ptr.dtype.element_ty
    column = tl.program_id(0) * HELD + tl.arange(0, HELD)
    part = tl.program_id(1).to(tl.int64)
    weight = _columns(weight_ptr, column, vocab, weight_stride, 0, WIDTH, DIM)
    sums = tl.zeros((HELD, WIDTH), tl.float32)
    if REST:
        weight_rest = _columns(weight_ptr, column, vocab, weight_stride, WIDTH, REST, DIM)
        sums_rest = tl.zeros((HELD, REST), tl.float32)
    start = tl.program_id(1) * tokens_per_split
    for first in range(start, tl.minimum(start + tokens_per_split, tokens), STREAMED):
        token = first + tl.arange(0, STREAMED)
        exists = token < tokens
        hidden = _columns(hidden_ptr, token, tokens, hidden_stride, 0, WIDTH, DIM)
        logits = _dot(weight, tl.trans(hidden), tl.zeros((HELD, STREAMED), tl.float32), UPCAST)
        if REST:
            hidden_rest = _columns(hidden_ptr, token, tokens, hidden_stride, WIDTH, REST, DIM)
            logits = _dot(weight_rest, tl.trans(hidden_rest), logits, UPCAST)
        label = _labels(labels_ptr, token, tokens, vocab)
        log_sum = tl.load(log_sums_ptr + token, mask=exists, other=0.0)
        slope = tl.load(slopes_ptr + token, mask=exists, other=0.0)
        own = tl.load(slopes_ptr + tokens + token, mask=exists, other=0.0)
        grad = tl.exp2(logits * LOG2E - log_sum[None, :]) * slope[None, :]
        grad = tl.where(column[:, None] == label[None, :], own[None, :], grad).to(narrow)
        sums = _dot(grad, hidden, sums, UPCAST)
        if REST:
            sums_rest = _dot(grad, hidden_rest, sums_rest, UPCAST)
    sums_ptr += part * vocab * DIM
    _store_columns(sums_ptr, sums, column, vocab, 0, WIDTH, DIM)
    if REST:
        _store_columns(sums_ptr, sums_rest, column, vocab, WIDTH, REST, DIM)


@triton.jit
def chunk_softmax_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # (rows, vocab), last stride 1; with GRADIENT overwritten by the gradient
    targets_ptr,  # (rows,) int64
    token_grad_ptr,  # (rows,) float32
    losses_ptr,  # (rows,) float32
    vocab,
    logits_stride,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss of one row and, over its logits, the gradient of ``token_grad * loss``; grid: rows.

    The second reading comes from L2: a row takes 100 KB at V 50304, those in flight 40 MB on 132 SMs of three programs.
    """
    program = tl.program_id(0)
    logits_ptr += program.to(tl.int64) * logits_stride
    target = tl.load(targets_ptr + program)
    known = (target >= 0) & (target < vocab)
    # Before the first overwriting: the reductions below are barriers.
    own_logit = tl.load(logits_ptr + target, mask=known, other=float("-inf")).to(tl.float32) * LOG2E
    label = tl.where(known, target, -1).to(tl.int32)
    maximum = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab, BLOCK):
        column = first + tl.arange(0, BLOCK)
        others = (column < vocab) & (column != label)
        logits = tl.load(logits_ptr + column, mask=others, other=float("-inf")).to(tl.float32) * LOG2E
        higher = tl.maximum(maximum, tl.max(logits, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp2(maximum - finite) + tl.exp2(logits - finite)
        maximum = higher
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    loss, log_sum, slope, label_gradient, _, _ = _token_statistics(tl.sum(sums, 0), base, own_logit, Z_LOSS)
    tl.store(losses_ptr + program, loss)
    if GRADIENT:
        token_grad = tl.load(token_grad_ptr + program)
        for first in range(0, vocab, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = column < vocab
            logits = tl.load(logits_ptr + column, mask=mask, other=0.0).to(tl.float32) * LOG2E
            grad = tl.where(column == label, label_gradient, slope * tl.exp2(logits - log_sum)) * token_grad
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=mask)
