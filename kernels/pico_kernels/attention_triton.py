"""Triton implementation of :func:`pico_kernels.attention`: FlashAttention-2 forward and backward, one order of sums.

The forward is one launch (two where the keys of a few queries are split, :mod:`.attention_decode_triton`), the backward
at most two: ``delta`` and the gradient of q, then those of k and v; what nobody asked for is not computed. Any strides
are read; outputs and gradients are contiguous. The ops return the log-sum-exp in base 2, the public function in base e.
float64, which Triton cannot multiply, and heads wider than 256 take the twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from pico_kernels._attention_backward_kernels import attention_key_gradient_kernel, attention_query_gradient_kernel
from pico_kernels._attention_config import (
    AttentionConfig,
    AttentionProblem,
    forward_config,
    key_config,
    problem_of,
    query_config,
)
from pico_kernels._attention_documents import Attended, as_one_row, default_scale, lse_per_row
from pico_kernels._attention_kernels import attention_forward_kernel
from pico_kernels._triton import (
    COMPILE_OPTIONS,
    PICO_SHAPES,
    AotCase,
    PicoShape,
    on_device,
    register_op,
    triton_name,
)
from pico_kernels.attention import attention_reference
from pico_kernels.attention_decode_triton import combine, combine_aot_case, split_length

_WIDEST = 256  # head dimension whose tiles fit
_UNIT = 8  # elements in one of the strides passed, where that divides them all: 16 bytes in half precision


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: AttentionConfig,
    problem: AttentionProblem,
    pointers: tuple[torch.Tensor, ...],
    strided: tuple[torch.Tensor, ...],
    flags: dict[str, Any],
) -> None:
    """Run a kernel whose arguments are pointers, sizes and the first three strides of ``strided``."""
    strides = [stride for x in strided for stride in x.stride()[:3]]
    unit = 1 if any(stride % _UNIT for stride in strides) else _UNIT
    with on_device(pointers[0]):
        kernel[grid](
            *pointers,
            problem.queries,
            problem.keys,
            problem.kv_heads,
            *(stride // unit for stride in strides),
            UNIT=unit,
            **flags,
            **problem.constants(config),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **COMPILE_OPTIONS,
        )


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied if the elements of a row are not next to each other (the gradient of ``.sum()``)."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _first_and_last(bounds: torch.Tensor | None, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pointers of documents; without documents they are not followed."""
    return (unused, unused) if bounds is None else (bounds[0], bounds[1])


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in base 2. ``bounds``: (2, queries) int32, first and one-past-last key of each."""
    problem = problem_of(q, k, causal, scale, bounds)
    batch, queries, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    strided = tuple(_side_by_side(x) for x in (q, k, v))
    split = split_length(problem.rows, problem.keys) if bounds is None else 0
    splits = triton.cdiv(problem.keys, split) if split else 1
    parts = [torch.empty((splits, *x.shape), dtype=torch.float32, device=q.device) for x in (out, lse)] if split else []
    config = forward_config(head_dim, q.element_size(), problem.rows)
    tiles = triton.cdiv(problem.rows, config.block_m)
    pointers = (*strided, *(parts or (out, lse)), *_first_and_last(bounds, lse))
    grid = (tiles * batch * problem.kv_heads, splits)
    _launch(attention_forward_kernel, grid, config, problem, pointers, strided, {"SPLIT": split})
    if split:
        combine(parts[0], parts[1], out, lse)
    return out, lse


def _backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bounds: torch.Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    """The gradients asked for (at least one), in the order q, k, v."""
    problem = problem_of(q, k, causal, scale, bounds)
    need_q, need_k, need_v = needs
    grads = {
        name: torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for name, x, needed in zip("qkv", (q, k, v), needs, strict=True)
        if needed
    }
    strided = tuple(_side_by_side(x) for x in (grad, q, k, v))
    first_last = _first_and_last(bounds, lse)
    delta = torch.empty_like(lse)
    pairs = problem.batch * problem.kv_heads
    if q.numel() and (need_q or need_k):
        config = query_config(problem.head_dim, problem.dtype.itemsize)
        lse_upstream = lse if grad_lse is None else grad_lse.contiguous()  # without one its pointer is not followed
        pointers = (*strided, out, lse, lse_upstream, *first_last, delta, grads.get("q", q))
        flags = {"GRAD_LSE": grad_lse is not None, "QUERY": need_q}
        grid = (triton.cdiv(problem.rows, config.block_m) * pairs,)
        _launch(attention_query_gradient_kernel, grid, config, problem, pointers, strided, flags)
    if k.numel() and (need_k or need_v):
        config = key_config(problem.head_dim, problem.dtype.itemsize)
        pointers = (*strided, lse, delta, *first_last, grads.get("k", k), grads.get("v", v))
        grid = (triton.cdiv(problem.keys, config.block_n) * pairs,)
        flags = {"KEY": need_k, "VALUE": need_v}
        _launch(attention_key_gradient_kernel, grid, config, problem, pointers, strided, flags)
    return list(grads.values())


Gradients = tuple[torch.Tensor | None, ...]


def _gradients(
    ctx: Any,
    grad: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    backward: Callable[..., list[torch.Tensor]],
) -> Gradients:
    """One entry for each of q, k and v; a gradient that did not come in is None."""
    q, k, v, out, lse, bounds = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs) or (grad is None and grad_lse is None):
        return None, None, None
    grad = torch.zeros_like(out) if grad is None else grad
    found = iter(backward(grad, grad_lse, q, k, v, out, lse, bounds, ctx.causal, ctx.scale, needs))
    return tuple(next(found) if needed else None for needed in needs)


class _Attention(torch.autograd.Function):
    """The eager path; saves the inputs, the output and the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bounds: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _forward(q, k, v, bounds, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, bounds)
        ctx.causal, ctx.scale = causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Gradients:
        return *_gradients(ctx, grad, grad_lse, _backward), None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, bounds, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.set_materialize_grads(False)


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads = q.shape[:3]
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


def _backward_fake(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bounds: torch.Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip((q, k, v), needs, strict=True) if needed]


_backward_op = register_op(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? bounds, bool causal, float scale, bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _traced_backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    return *_gradients(ctx, grad, grad_lse, _backward_op), None, None, None


_attention_op = register_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bounds, bool causal, float scale) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _traced_backward,
    _setup_context,
)


def _document_bounds(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """(2, tokens) int32, first and one-past-last token of every token's document; nothing waits for the device."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    end = torch.searchsorted(cu_seqlens, token, right=True)  # an empty document starts where the next one does
    return cu_seqlens[torch.stack((end - 1, end))].int()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """:func:`pico_kernels.attention` in Triton; arguments are trusted.

    Packed documents are one sequence of B * Sq tokens; a batch whose rows do not follow one another is copied for it.
    """
    if q.dtype == torch.float64 or q.shape[3] > _WIDEST:
        return attention_reference(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, return_lse=return_lse)
    shape = q.shape
    scale = default_scale(q) if scale is None else float(scale)
    if scale <= 0:  # the kernels take the largest score before it is scaled
        q, scale = q * -float(scale < 0), -scale or 1.0
    bounds = None
    if cu_seqlens is not None:
        bounds = _document_bounds(cu_seqlens, shape[0] * shape[1])
        q, k, v = as_one_row(q), as_one_row(k), as_one_row(v)
    if torch.compiler.is_compiling():
        out, lse = _attention_op(q, k, v, bounds, causal, scale)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _Attention.apply(q, k, v, bounds, causal, scale)
    else:
        out, lse = _forward(q, k, v, bounds, causal, scale)
    if cu_seqlens is not None:
        out, lse = out.view(shape), lse_per_row(lse, shape[0])
    return (out, lse * math.log(2)) if return_lse else out


def _aot_case(
    name: str,
    kernel: Any,
    config: AttentionConfig,
    problem: AttentionProblem,
    dtype: torch.dtype,
    flags: dict[str, Any],
) -> AotCase:
    """A launch on contiguous tensors: an integer of 1 is a constant, one that 16 divides is declared so."""
    strides = {}
    for tensor in ("grad", "q", "k", "v"):
        length, heads = (problem.keys, problem.kv_heads) if tensor in "kv" else (problem.queries, problem.heads)
        width = problem.head_dim // _UNIT
        strides[f"{tensor}_batch_stride"] = length * heads * width
        strides[f"{tensor}_stride"] = heads * width
        strides[f"{tensor}_head_stride"] = width
    sizes = {"queries": problem.queries, "keys": problem.keys, "kv_heads": problem.kv_heads}
    integers = {key: value for key, value in {**sizes, **strides}.items() if key in kernel.arg_names}
    ones = {key: 1 for key, value in integers.items() if value == 1}
    constants = {**flags, "UNIT": _UNIT, **problem.constants(config), "WIDEN": False, **ones}
    pointers = [key for key in kernel.arg_names if key.endswith("_ptr")]
    typed = {
        **{key: "*i32" if key in ("first_ptr", "last_ptr") else f"*{triton_name(dtype)}" for key in pointers},
        **{key: "*fp32" for key in pointers if "lse" in key or "delta" in key},
        **({"out_ptr": "*fp32"} if flags.get("SPLIT") else {}),
        **dict.fromkeys(integers, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = (*pointers, *(key for key, value in integers.items() if value % 16 == 0))
    return AotCase(name, kernel, typed, constants, config.num_warps, config.num_stages, aligned)


AOT_SHAPES = (
    *PICO_SHAPES,
    *(PicoShape(f"head_{head_dim}", 12 * head_dim, 48 * head_dim) for head_dim in (16, 96, 256)),
)
"""The published sizes, and the head dimensions that are none of theirs but have tiles of their own."""


def aot_cases(shape: PicoShape) -> list[AotCase]:
    """Causal training at 2048 tokens in bfloat16; of published sizes also in float32, packed documents (of the smallest
    and largest), and one query against 8192 keys."""
    published, extreme = shape in PICO_SHAPES, shape in (PICO_SHAPES[0], PICO_SHAPES[-1])
    variants = [(torch.bfloat16, False)]
    variants += [(torch.bfloat16, True)] if extreme else []
    variants += [(torch.float32, False)] if published else []
    cases = [case for variant in variants for case in _training_cases(shape, *variant)]
    return [*cases, *_decoding_cases(shape)] if published else cases


def _training_cases(shape: PicoShape, dtype: torch.dtype, documents: bool) -> list[AotCase]:
    head_dim = shape.head_dim
    problem = AttentionProblem(
        8, 2048, 2048, shape.n_heads, shape.n_kv_heads, head_dim, dtype, True, head_dim**-0.5, documents
    )
    label = f"{'documents-' if documents else ''}{triton_name(dtype)}"
    forward = forward_config(head_dim, dtype.itemsize, problem.rows)
    query, key = query_config(head_dim, dtype.itemsize), key_config(head_dim, dtype.itemsize)
    return [
        _aot_case(f"attention_{name}-{label}", kernel, config, problem, dtype, flags)
        for name, kernel, config, flags in (
            ("forward", attention_forward_kernel, forward, {"SPLIT": 0}),
            ("query_gradient", attention_query_gradient_kernel, query, {"GRAD_LSE": False, "QUERY": True}),
            ("key_gradient", attention_key_gradient_kernel, key, {"KEY": True, "VALUE": True}),
        )
    ]


def _decoding_cases(shape: PicoShape) -> list[AotCase]:
    dtype, keys, head_dim = torch.bfloat16, 8192, shape.head_dim
    problem = AttentionProblem(
        1, 1, keys, shape.n_heads, shape.n_kv_heads, head_dim, dtype, True, head_dim**-0.5, False
    )
    config = forward_config(head_dim, dtype.itemsize, problem.rows)
    flags = {"SPLIT": split_length(problem.rows, keys)}
    split = _aot_case("attention_forward-split-bf16", attention_forward_kernel, config, problem, dtype, flags)
    return [split, combine_aot_case(head_dim, keys, dtype)]
