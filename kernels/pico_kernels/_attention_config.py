"""Sizes of one attention call and the tiles its kernels take, plain functions of head_dim, dtype and length.

Predicted, not measured: at head_dim 8 and 16 a score costs an H100's SM 1/64 clock of tensor core (2 x 16 columns, 64
FLOP of 4096 a clock) and 1/16 of exponential, so forward tiles are made for many resident warps, not for long products;
at 64 the two are even, and above the products decide. Checked by compiling with Triton 3.9: no tile spills registers on
sm_80, sm_90 or sm_100 but the query gradient in float32 above head_dim 128; none needs more shared memory than sm_80's
163 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from pico_kernels._triton import interpreting


@dataclass(frozen=True)
class AttentionConfig:
    """Rows (packed positions and heads) and keys of a tile, powers of two of at least 16; warps; pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _block_d(head_dim: int) -> int:
    """Columns of a tile in registers: a tensor-core product needs 16."""
    return max(16, triton.next_power_of_2(head_dim))


def forward_config(head_dim: int, itemsize: int, rows: int) -> AttentionConfig:
    """Tiles of the forward kernel for ``rows`` packed rows of a key-value head."""
    few = max(16, triton.next_power_of_2(rows))
    block_d = _block_d(head_dim)
    if itemsize > 2:
        config = _float32_config(block_d)
    elif block_d <= 32:
        config = AttentionConfig(128, 64, 4, 3 if block_d == 16 else 2)
    elif block_d == 64:
        config = AttentionConfig(128, 32, 8, 3)  # 64 keys spill on sm_100
    elif block_d == 128:
        config = AttentionConfig(64, 32, 4, 2)  # 64 keys spill on sm_80
    else:
        config = AttentionConfig(64, 32, 8, 2)
    return replace(config, block_m=min(few, config.block_m))


def query_config(head_dim: int, itemsize: int) -> AttentionConfig:
    """Tiles of the kernel of ``delta`` and the gradient of q: two score tiles live at once, so fewer rows."""
    block_d = _block_d(head_dim)
    if itemsize > 2:
        return _float32_config(block_d)
    if block_d <= 64:
        # With documents 64 keys spill at 32 columns on sm_100, at 64 on sm_80.
        return AttentionConfig(64, 64 if block_d == 16 else 32, 4, 2)
    if block_d == 128:
        return AttentionConfig(64, 64, 8, 2)
    return AttentionConfig(32, 32, 8, 1)


def key_config(head_dim: int, itemsize: int) -> AttentionConfig:
    """Tiles of the kernel of the gradients of k and v, whose two accumulators are ``block_n`` keys high.

    64 keys in half precision: the fewest rows of a Hopper tensor-core product.
    """
    block_d = _block_d(head_dim)
    if itemsize > 2:
        if block_d == 16:
            return AttentionConfig(16, 32, 8, 1)
        # 8 warps spill a few registers at 128 columns on sm_80.
        return replace(_float32_config(block_d), num_warps=16 if block_d <= 128 else 8)
    if block_d <= 64:
        return AttentionConfig(64 if block_d <= 32 else 32, 64, 4, 2)
    if block_d == 128:
        return AttentionConfig(32, 64, 8, 2)
    return AttentionConfig(32, 32, 8, 1)


def _float32_config(block_d: int) -> AttentionConfig:
    """Tiles of all kernels in float32, whose products run outside the tensor cores.

    A thread holds whole rows of both operands: tiles shrink as heads widen, and more warps share them.
    """
    return AttentionConfig(32, 32, 8, 1) if block_d <= 64 else AttentionConfig(16, 16, 8, 1)


@dataclass(frozen=True)
class AttentionProblem:
    """What every launch of one call shares."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    causal: bool
    scale: float
    documents: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Packed rows of a key-value head."""
        return self.queries * self.group

    def constants(self, config: AttentionConfig) -> dict[str, Any]:
        """The ``constexpr`` arguments that all three kernels have."""
        return {
            "SCALE": self.scale,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "CAUSAL": self.causal,
            "DOCUMENTS": self.documents,
            "WIDEN": interpreting(),
            "BLOCK_D": _block_d(self.head_dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }


def problem_of(
    q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float, bounds: torch.Tensor | None
) -> AttentionProblem:
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    return AttentionProblem(
        batch, queries, keys, heads, kv_heads, head_dim, q.dtype, causal, scale, documents=bounds is not None
    )
