"""``attention`` by whichever package of FlashAttention is installed (:mod:`pico_kernels._flash_packages`).

The packages' kernels are wrapped in ops of our own, so that ``torch.compile(fullgraph=True)`` traces them all, with the
deterministic backward asked for. They ignore a gradient into the log-sum-exp; its part is added here by the identities
``d lse_i / d q_i = scale * sum_j p_ij k_j``, which is attention with the keys as values, and
``sum_i g_i d lse_i / d k_j = scale * sum_i p_ij g_i q_i``, which is that attention's gradient of its values for the
incoming gradient ``scale * g_i q_i``: one more forward and backward, only where such a gradient arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pico_kernels._attention_documents import Attended, default_scale, lse_per_row
from pico_kernels._device import cuda_capability
from pico_kernels._dispatch import require
from pico_kernels._flash_packages import (
    FlashCall,
    FlashPackage,
    flash_attn_problem,
    flash_package,
    import_package,
)
from pico_kernels._triton import on_device, register_op


def _package(q: torch.Tensor) -> FlashPackage:
    capability = cuda_capability(q.device)
    package = flash_package(capability, q.shape[-1])
    if package is None:
        problem = flash_attn_problem() or "no installed package has kernels for it"
        expected = "for impl='flash_attn' a head_dim that is a multiple of 8 and a GPU a package has kernels for"
        got = f"head_dim {q.shape[-1]} on a GPU of compute capability {capability}.x ({problem})"
        require(False, "attention", "q", expected, got)
    assert package is not None
    return package


def _flat(cu_seqlens: torch.Tensor | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """As (tokens, heads, head_dim) where there are documents."""
    return list(tensors) if cu_seqlens is None else [x.reshape(-1, *x.shape[2:]) for x in tensors]


def _call(q: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float, causal: bool) -> FlashCall:
    if cu_seqlens is None:
        return FlashCall(scale, causal)
    return FlashCall(scale, causal, cu_seqlens.to(torch.int32).contiguous(), q.shape[0] * q.shape[1])


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.numel() == 0:
        return _forward_fake(q, k, v, cu_seqlens, scale, causal)
    package = _package(q)
    with on_device(q):
        out, lse = package.forward(
            import_package(package), *_flat(cu_seqlens, q, k, v), _call(q, cu_seqlens, scale, causal)
        )
    lse = lse if cu_seqlens is None else lse_per_row(lse[None], q.shape[0])
    return out.reshape(q.shape).contiguous(), lse.contiguous()


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    package = _package(q)
    flat_lse = lse if cu_seqlens is None else lse.transpose(0, 1).reshape(q.shape[2], -1)
    with on_device(q):
        grad_q, grad_k, grad_v = package.backward(
            import_package(package),
            *_flat(cu_seqlens, grad, q, k, v, out),
            flat_lse,
            _call(q, cu_seqlens, scale, causal),
        )
    return (
        grad_q.reshape(q.shape).contiguous(),
        grad_k.reshape(k.shape).contiguous(),
        grad_v.reshape(v.shape).contiguous(),
    )


def _gradients(
    ctx: Any,
    grad: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    rest = (cu_seqlens, ctx.scale, ctx.causal)
    grads: list[torch.Tensor | None] = [None, None, None]
    if grad is not None:
        grads = list(backward(grad, q, k, v, out, lse, *rest))
    if grad_lse is not None:
        mean_key, _ = forward(q, k, k, *rest)
        weight = (grad_lse * ctx.scale).transpose(1, 2)[..., None]
        _, _, of_keys = backward((weight * q).to(q.dtype), q, k, k, mean_key, lse, *rest)
        for index, part in enumerate((weight * mean_key, of_keys)):
            first = grads[index]
            grads[index] = (part if first is None else first + part).to(q.dtype)
    return (*grads, None, None, None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_seqlens, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


class _FlashAttention(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grad, grad_lse, _forward, _backward)


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


def _backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_backward_op = register_op(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, "
    "float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _traced_backward(
    ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, grad, grad_lse, _flash_attention_op, _backward_op)


_flash_attention_op = register_op(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool causal) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _traced_backward,
    _save,
)


def attention_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """:func:`pico_kernels.attention` by FlashAttention-3, flash-attn-4 or flash-attn 2, the first that fits the GPU.

    Documents are computed as such; the packages are told the number of all tokens as the longest length, since the true
    one would need a host sync, and start some programs that end at once. Raises ValueError for a dtype other than
    bfloat16 and float16, and for a head_dim or a GPU that no installed package has kernels for.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    require(half, "attention", "q", "for impl='flash_attn' bfloat16 or float16", q.dtype)
    scale = default_scale(q) if scale is None else float(scale)
    if scale <= 0:  # the packages take the largest score before it is scaled
        q, scale = q * -float(scale < 0), -scale or 1.0
    inputs = (q, k, v, cu_seqlens, scale, causal)
    if torch.compiler.is_compiling():
        out, lse = _flash_attention_op(*inputs)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _FlashAttention.apply(*inputs)
    else:
        out, lse = _forward(*inputs)
    return (out, lse) if return_lse else out
