"""Triton implementation of :func:`pico_kernels.rope`.

One program takes a block of tokens of one sequence, loads their angles once and rotates every query and key head by
them, a tile of ``(tokens, heads, features)`` at a time. The backward is the same kernel with the sine negated. Nothing
is rotated in place, so a gradient that others read survives.

Rounding points are those of the twin (:mod:`pico_kernels.rope`): products in float32, one rounding to the input dtype.
The two products of a feature may contract to a fused multiply-add, which saves a rounding.
"""

from __future__ import annotations

import math
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
    on_device,
    register_op,
    triton_name,
)

_TILE_BYTES = 2048  # two 16-byte vectors in flight per thread of two warps
_LINE_BYTES = 128  # what a tile reads side by side, where the heads can be grouped to it


@dataclass(frozen=True)
class RopeConfig:
    """Tile of one program and its warps; ``block_pairs`` covers half a head, padded to a power of two."""

    block_tokens: int
    block_heads: int
    block_pairs: int
    num_warps: int


def rope_config(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> RopeConfig:
    """Launch configuration; ``heads`` or ``kv_heads`` is 0 where that tensor is not rotated.

    A tile spans as many heads as make a cache line (four of Pico tiny's 16 bytes, two of small's 64), but only a power
    of two that divides both head counts: 12 and 4 heads are covered exactly, without padding 12 to 16.
    """
    block_pairs = triton.next_power_of_2(head_dim // 2)
    common = math.gcd(heads, kv_heads)
    divisor = common & -common
    fitting = max(1, _LINE_BYTES // (2 * block_pairs * itemsize))
    block_heads = min(divisor, 1 << (fitting.bit_length() - 1))
    block_tokens = max(1, _TILE_BYTES // (block_heads * 2 * block_pairs * itemsize))
    return RopeConfig(block_tokens, block_heads, block_pairs, num_warps=2)


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    x_ptr,  # at the first feature of each token: (BLOCK_TOKENS, 1, 1)
    out_ptr,  # likewise
    stride_head,  # not read where ADJACENT
    cos,  # (BLOCK_TOKENS, 1, BLOCK_PAIRS), float32 or float64: the dtype of the products
    sin,
    live,  # (BLOCK_TOKENS, 1, 1): tokens inside the sequence
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ADJACENT: tl.constexpr,  # heads follow one another without a gap
    INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Rotate HEADS heads of a block of tokens, BLOCK_HEADS at a time.

    ADJACENT makes the distance between heads a constant. A launch only learns whether a stride is a multiple of 16, and
    Pico tiny's is 8: its loads would be 2 bytes each instead of 16.
    """
    wide: tl.constexpr = cos.dtype
    narrow: tl.constexpr = out_ptr.dtype.element_ty
    group = tl.arange(0, BLOCK_HEADS)[None, :, None]
    for first_head in range(0, HEADS, BLOCK_HEADS):
        head = (first_head + group).to(tl.int64)
        x_heads = x_ptr + head * (HEAD_DIM if ADJACENT else stride_head)
        out_heads = out_ptr + head * HEAD_DIM
        if INTERLEAVED:
            # Loading both features of a pair in one vector and splitting it in registers keeps loads and stores whole;
            # two loads with stride 2 would touch every sector twice.
            feature = tl.arange(0, 2 * BLOCK_PAIRS)[None, None, :]
            mask = live & (feature < HEAD_DIM)
            x = tl.load(x_heads + feature, mask=mask, other=0.0).to(wide)
            first, second = tl.split(tl.reshape(x, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_PAIRS, 2)))
            rotated = tl.join(first * cos - second * sin, first * sin + second * cos)
            rotated = tl.reshape(rotated, (BLOCK_TOKENS, BLOCK_HEADS, 2 * BLOCK_PAIRS))
            tl.store(out_heads + feature, rotated.to(narrow), mask=mask)
        else:
            HALF: tl.constexpr = HEAD_DIM // 2
            feature = tl.arange(0, BLOCK_PAIRS)[None, None, :]
            mask = live & (feature < HALF)
            first = tl.load(x_heads + feature, mask=mask, other=0.0).to(wide)
            second = tl.load(x_heads + HALF + feature, mask=mask, other=0.0).to(wide)
            tl.store(out_heads + feature, (first * cos - second * sin).to(narrow), mask=mask)
            tl.store(out_heads + HALF + feature, (first * sin + second * cos).to(narrow), mask=mask)


@triton.jit(do_not_specialize=["seq_len"])
def rope_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # (B, S, Q_HEADS, HEAD_DIM), last stride 1
    k_ptr,  # (B, S, K_HEADS, HEAD_DIM), last stride 1
    q_out_ptr,  # contiguous, as are the next three
    k_out_ptr,
    cos_ptr,  # (at least S, HEAD_DIM / 2)
    sin_ptr,
    seq_len,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    Q_HEADS: tl.constexpr,  # 0: there is no q, its pointers are not followed
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    Q_ADJACENT: tl.constexpr,
    K_ADJACENT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NEGATE_SINE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Rotate every head of BLOCK_TOKENS tokens of one sequence; grid: sequences x blocks of tokens."""
    wide: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(seq_len, BLOCK_TOKENS)
    # int64 before any stride: the last token of a (64, 2048, 128, 128) tensor is 2 ** 31 elements away.
    token = ((tl.program_id(0) % blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None, None]).to(tl.int64)
    batch = (tl.program_id(0) // blocks + tl.zeros((1, 1, 1), tl.int32)).to(tl.int64)
    live = token < seq_len

    pair = tl.arange(0, BLOCK_PAIRS)[None, None, :]
    angle = token * (HEAD_DIM // 2) + pair
    angle_mask = live & (pair < HEAD_DIM // 2)
    cos = tl.load(cos_ptr + angle, mask=angle_mask, other=0.0).to(wide)
    sin = tl.load(sin_ptr + angle, mask=angle_mask, other=0.0).to(wide)
    if NEGATE_SINE:
        sin = -sin

    out_token = batch * seq_len + token
    _rotate_heads(
        q_ptr + batch * q_stride_batch + token * q_stride_token,
        q_out_ptr + out_token * (Q_HEADS * HEAD_DIM),
        q_stride_head,
        cos,
        sin,
        live,
        Q_HEADS,
        HEAD_DIM,
        Q_ADJACENT,
        INTERLEAVED,
        BLOCK_TOKENS,
        BLOCK_HEADS,
        BLOCK_PAIRS,
    )
    _rotate_heads(
        k_ptr + batch * k_stride_batch + token * k_stride_token,
        k_out_ptr + out_token * (K_HEADS * HEAD_DIM),
        k_stride_head,
        cos,
        sin,
        live,
        K_HEADS,
        HEAD_DIM,
        K_ADJACENT,
        INTERLEAVED,
        BLOCK_TOKENS,
        BLOCK_HEADS,
        BLOCK_PAIRS,
    )


def _kernel_constants(
    heads: tuple[int, int],
    adjacent: tuple[bool, bool],
    head_dim: int,
    config: RopeConfig,
    style: str,
    negate_sine: bool,
) -> dict[str, Any]:
    return {
        "Q_HEADS": heads[0],
        "K_HEADS": heads[1],
        "HEAD_DIM": head_dim,
        "Q_ADJACENT": adjacent[0],
        "K_ADJACENT": adjacent[1],
        "INTERLEAVED": style == "interleaved",
        "NEGATE_SINE": negate_sine,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_HEADS": config.block_heads,
        "BLOCK_PAIRS": config.block_pairs,
    }


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only where its features are not side by side (a stride-0 gradient, a transposed view)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    tensors: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, style: str, negate_sine: bool
) -> list[torch.Tensor]:
    """One or two (B, S, H, D) tensors of one dtype, rotated into new contiguous ones by one kernel launch."""
    dtype = tensors[0].dtype
    require(dtype in KERNEL_DTYPES, "rope", "q", "float32, bfloat16, float16 or float64", dtype)
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
    if all(out.numel() == 0 for out in outputs):
        return outputs
    inputs = [_rows_contiguous(x) for x in tensors]
    q, k = inputs[0], inputs[-1]
    batch, seq_len, kv_heads, head_dim = k.shape
    heads = q.shape[2] if len(inputs) == 2 else 0
    config = rope_config(heads, kv_heads, head_dim, q.element_size())
    adjacent = q.stride(2) == head_dim, k.stride(2) == head_dim
    with on_device(q):
        rope_kernel[(batch * triton.cdiv(seq_len, config.block_tokens),)](
            q,
            k,
            outputs[0],
            outputs[-1],
            cos.contiguous(),
            sin.contiguous(),
            seq_len,
            *q.stride()[:3],
            *k.stride()[:3],
            **_kernel_constants((heads, kv_heads), adjacent, head_dim, config, style, negate_sine),
            num_warps=config.num_warps,
            **COMPILE_OPTIONS,
        )
    return outputs


def _gradients(
    ctx: Any, grads: tuple[torch.Tensor | None, ...], rotate: Callable[..., list[torch.Tensor]]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of ``(q, k, cos, sin, style)``: those asked for that exist, rotated back in one launch."""
    cos, sin = ctx.saved_tensors
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:2], strict=True)]
    present = [grad for grad in wanted if grad is not None]
    rotated = iter(rotate(present, cos, sin, ctx.style, True) if present else ())
    return (*(None if grad is None else next(rotated) for grad in wanted), None, None, None)


class _Rope(torch.autograd.Function):
    """The eager path; saves the angles only."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str
    ) -> tuple[torch.Tensor, ...]:
        _setup_context(ctx, (q, k, cos, sin, style), None)
        return tuple(_launch([q, k], cos, sin, style, False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grads, _launch)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, ctx.style = inputs
    ctx.save_for_backward(cos, sin)
    ctx.set_materialize_grads(False)


def _forward_op(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str
) -> tuple[torch.Tensor, ...]:
    return tuple(_launch([q, k], cos, sin, style, False))


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotate_fake(
    tensors: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, style: str, negate_sine: bool
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


_rotate_op = register_op(
    "rope_rotate(Tensor[] tensors, Tensor cos, Tensor sin, str style, bool negate_sine) -> Tensor[]",
    _launch,
    _rotate_fake,
)


def _backward_op(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, grads, _rotate_op)


_rope_op = register_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, str style) -> (Tensor, Tensor)",
    _forward_op,
    _forward_fake,
    _backward_op,
    _setup_context,
)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, style: str = "interleaved"
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`pico_kernels.rope` in one kernel launch; arguments are trusted.

    Any strides are read; heads whose features are not side by side are copied first. Returns contiguous tensors.
    """
    if torch.compiler.is_compiling():
        return _rope_op(q, k, cos, sin, style)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rope.apply(q, k, cos, sin, style)
    rotated_q, rotated_k = _launch([q, k], cos, sin, style, False)
    return rotated_q, rotated_k


def aot_cases(shape: PicoShape) -> list[AotCase]:
    """Forward of both styles and the interleaved backward in bfloat16, and the forward in float32."""
    variants = (
        ("rope_forward_interleaved-bf16", torch.bfloat16, "interleaved", False),
        ("rope_backward_interleaved-bf16", torch.bfloat16, "interleaved", True),
        ("rope_forward_half-bf16", torch.bfloat16, "half", False),
        ("rope_forward_interleaved-fp32", torch.float32, "interleaved", False),
    )
    pointers = ("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr")
    tables = ("cos_ptr", "sin_ptr")
    strides = tuple(f"{x}_stride_{axis}" for x in "qk" for axis in ("batch", "token", "head"))
    cases = []
    for name, dtype, style, negate_sine in variants:
        config = rope_config(shape.n_heads, shape.n_kv_heads, shape.head_dim, dtype.itemsize)
        heads = shape.n_heads, shape.n_kv_heads
        constants = _kernel_constants(heads, (True, True), shape.head_dim, config, style, negate_sine)
        signature = {
            **dict.fromkeys(pointers, f"*{triton_name(dtype)}"),
            **dict.fromkeys(tables, "*fp32"),
            "seq_len": "i32",
            **dict.fromkeys(strides, "i32"),
            **dict.fromkeys(constants, "constexpr"),
        }
        # A launch would align the strides between heads too, except tiny's 8; constants replace them.
        aligned = (*pointers, *tables, *(stride for stride in strides if not stride.endswith("head")))
        cases.append(AotCase(name, rope_kernel, signature, constants, config.num_warps, aligned=aligned))
    return cases
