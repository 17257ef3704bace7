"""Exact causal attention for CPUs: tiles of query rows against their whole key prefix, probabilities never kept.

PyTorch's CPU flash kernel multiplies per head with an inner dimension of ``head_dim``; at Pico's 8 that wastes most
of the matrix unit. Here the query heads that share a key-value head are stacked as rows of one batched product, keys
right of the diagonal are not computed, and the backward computes the probabilities again (one softmax, cheaper than
exponentials of saved log-sum-exps), so memory is three tiles. Against scaled_dot_product_attention, forward and
backward, on cores of its own: 1.6 to 2.5 times faster (docs/performance.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pico_kernels._autocast import in_argument_dtype
from pico_kernels._dispatch import compute_dtype

_TILE_BYTES = 6 << 20  # one score tile; three of them stay in a last-level cache of 32 MiB
_MAX_ROWS = 128
_MIN_ROWS = 16
_MIN_FP32_COLUMNS = 16  # float32 products with 8 output columns run 3 times slower than with 16


@dataclass(frozen=True)
class _Problem:
    """Sizes of one call. ``offset``: position of the first query among the keys; ``rows``: queries per tile."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    scale: float
    rows: int

    @property
    def offset(self) -> int:
        return self.keys - self.queries

    def tiles(self) -> list[tuple[int, int, int]]:
        """(first query, one past the last, number of keys they may see)."""
        starts = range(0, self.queries, self.rows)
        ends = [min(start + self.rows, self.queries) for start in starts]
        return [
            (start, end, self.offset + end if self.causal else self.keys)
            for start, end in zip(starts, ends, strict=True)
        ]

    def tile_shape(self, rows: int, keys: int) -> tuple[int, int, int]:
        return self.batch * self.kv_heads, self.heads // self.kv_heads * rows, keys

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, H, D) to (B * Hkv, H / Hkv * n, D): the query heads of a group below one another."""
        batch, rows, heads, dim = x.shape
        grouped = x.reshape(batch, rows, self.kv_heads, heads // self.kv_heads, dim)
        return grouped.permute(0, 2, 3, 1, 4).reshape(batch * self.kv_heads, -1, dim)

    def unstack_into(self, out: torch.Tensor, stacked: torch.Tensor) -> None:
        """The inverse of :meth:`stack`, written to ``out``; columns past the head dimension are dropped."""
        group = self.heads // self.kv_heads
        rows = stacked.shape[1] // group
        ungrouped = stacked.view(self.batch, self.kv_heads, group, rows, -1)[..., : self.head_dim]
        out.view(self.batch, rows, self.kv_heads, group, self.head_dim).copy_(ungrouped.permute(0, 3, 1, 2, 4))

    def keys_first(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Sk, Hkv, D) to (B * Hkv, Sk, D), with enough columns for a fast product."""
        stacked = x.transpose(1, 2).reshape(self.batch * self.kv_heads, self.keys, self.head_dim)
        missing = _MIN_FP32_COLUMNS - self.head_dim
        return functional.pad(stacked, (0, missing)) if x.dtype == torch.float32 and missing > 0 else stacked

    def keys_last(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Sk, Hkv, D) to (B * Hkv, D, Sk)."""
        return x.permute(0, 2, 3, 1).reshape(self.batch * self.kv_heads, self.head_dim, self.keys)


class _Tiles:
    """Reused memory for score tiles, each a view of one flat buffer."""

    def __init__(self, problem: _Problem, like: torch.Tensor, count: int) -> None:
        elements = problem.batch * problem.heads * problem.rows * problem.keys
        self._buffers = [like.new_empty(elements) for _ in range(count)]
        self._future = like.new_full((problem.rows, problem.rows), -math.inf).triu_(1)
        self._problem = problem

    def view(self, index: int, rows: int, keys: int) -> torch.Tensor:
        shape = self._problem.tile_shape(rows, keys)
        return self._buffers[index][: math.prod(shape)].view(shape)

    def probabilities(self, query: torch.Tensor, key: torch.Tensor, rows: int) -> torch.Tensor:
        """Softmax of the tile's scores, in buffer 1; buffer 0 is overwritten. ``query`` is already scaled."""
        keys = key.shape[2]
        scores = torch.bmm(query, key, out=self.view(0, rows, keys))
        if self._problem.causal:
            diagonal = scores.view(-1, rows, keys)[:, :, keys - rows :]
            diagonal += self._future[:rows, :rows]
        return torch.softmax(scores, -1, out=self.view(1, rows, keys))

    def log_sum_exp(self, weights: torch.Tensor) -> torch.Tensor:
        """(B * Hkv, H / Hkv * rows) of the scores that :meth:`probabilities` has just turned into ``weights``.

        ``max(weights) = exp(max(scores) - lse)``, at least 1 / keys: exact to the float without another exponential.
        """
        scores = self._buffers[0][: weights.numel()].view(weights.shape)
        return scores.amax(-1) - weights.amax(-1).log_()


class _TiledAttention(torch.autograd.Function):
    """Output (B, Sq, H, D), and the log-sum-exps (B, H, Sq) if asked for."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, return_lse: bool
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        problem = _plan(q, k, causal, scale)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(problem.batch, problem.heads, problem.queries, dtype=q.dtype) if return_lse else None
        key, value = problem.keys_last(k), problem.keys_first(v)
        tiles = _Tiles(problem, q, 2)
        for start, end, seen in problem.tiles():
            query = problem.stack(q[:, start:end]) * scale
            weights = tiles.probabilities(query, key[:, :, :seen], end - start)
            problem.unstack_into(out[:, start:end], torch.bmm(weights, value[:, :seen]))
            if lse is not None:
                lse[:, :, start:end] = tiles.log_sum_exp(weights).view(problem.batch, problem.heads, -1)
        ctx.save_for_backward(q, k, v)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return out if lse is None else (out, lse)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return *_gradients(q, k, v, grad, grad_lse, ctx.problem, needed), None, None, None


@in_argument_dtype
def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    problem: _Problem,
    needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Of q, k and v, as far as needed; probabilities are computed again."""
    if grad is None:
        grad = torch.zeros((), dtype=q.dtype).expand(q.shape)
    need_q, need_k, need_v = needed
    wide = torch.promote_types(q.dtype, torch.float32)
    key, key_rows, value = problem.keys_last(k), problem.keys_first(k), problem.keys_last(v)
    grad_q = torch.empty(q.shape, dtype=q.dtype) if need_q else None
    # Transposed (D, Sk) because the products grad^T @ tile are 2 to 9 times faster than tile^T @ grad.
    grad_k = torch.zeros(key.shape, dtype=wide) if need_k else None
    grad_v = torch.zeros(key.shape, dtype=wide) if need_v else None
    tiles = _Tiles(problem, q, 3)
    for start, end, seen in problem.tiles():
        rows = end - start
        query = problem.stack(q[:, start:end]) * problem.scale
        weights = tiles.probabilities(query, key[:, :, :seen], rows)
        grad_out = problem.stack(grad[:, start:end])
        if grad_v is not None:
            grad_v[:, :, :seen] += torch.bmm(grad_out.transpose(1, 2), weights)
        if grad_q is None and grad_k is None:
            continue
        grad_weights = torch.bmm(grad_out, value[:, :, :seen], out=tiles.view(0, rows, seen))
        grad_scores = torch.ops.aten._softmax_backward_data.out(
            grad_weights, weights, -1, q.dtype, grad_input=tiles.view(2, rows, seen)
        )
        if grad_lse is not None:
            rows_of_tile = grad_lse[:, :, start:end].reshape(weights.shape[0], -1, 1)
            grad_scores.addcmul_(weights, rows_of_tile)
        if grad_q is not None:
            scaled = torch.bmm(grad_scores, key_rows[:, :seen]).mul_(problem.scale)
            problem.unstack_into(grad_q[:, start:end], scaled)
        if grad_k is not None:
            grad_k[:, :, :seen] += torch.bmm(query.transpose(1, 2), grad_scores)
    return grad_q, _to_layout_of(k, grad_k), _to_layout_of(v, grad_v)


def _to_layout_of(x: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
    """(B * Hkv, D, Sk) to (B, Sk, Hkv, D) in the dtype of ``x``."""
    if grad is None:
        return None
    batch, keys, kv_heads, head_dim = x.shape
    return grad.view(batch, kv_heads, head_dim, keys).permute(0, 3, 1, 2).to(x.dtype)


def _plan(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> _Problem:
    """Rows per tile: a power of two within the byte budget, and at least four tiles so that the diagonal is cheap."""
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    fitting = _TILE_BYTES // (batch * heads * keys * q.element_size())
    wanted = max(_MIN_ROWS, min(_MAX_ROWS, fitting, queries // 4))
    rows = min(queries, 1 << (wanted.bit_length() - 1))
    return _Problem(batch, queries, keys, heads, kv_heads, head_dim, causal, scale, rows)


def tiled_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Attention on a CPU; arguments as :func:`pico_kernels.attention`, at least one query."""
    return _TiledAttention.apply(q, k, v, causal, scale, False)


def tiled_attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`tiled_attention` and the log-sum-exps; in float32 at least, whose accuracy they promise."""
    wide = compute_dtype(q.dtype)
    out, lse = _TiledAttention.apply(q.to(wide), k.to(wide), v.to(wide), causal, scale, True)
    return out.to(q.dtype), lse


def one_query_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One query (B, 1, H, D) against a cache (B, Sk, Hkv, D): the heads of a group are the rows of one product.

    In bfloat16 on 2,048 keys and one core 2 to 4 times faster than SDPA; in float32 no faster, in float16 slower.
    """
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    query = (q * scale).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    weights = torch.softmax(query @ k.permute(0, 2, 3, 1), -1)
    return (weights @ v.transpose(1, 2)).reshape(q.shape)
