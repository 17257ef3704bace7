"""Kernels that are wrong in one way each, for test_conformance.py; every other property of theirs is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


def swiglu_of(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """An op of (gate, up) from its forward and from its backward (grad, gate, up) -> both gradients."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> Any:
            ctx.save_for_backward(gate, up)
            return forward(gate, up)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return backward(grad, *ctx.saved_tensors)

    return Function.apply


def right(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def right_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


def _without_the_derivative_of_the_sigmoid(grad: Any, gate: Any, up: Any) -> Any:
    return grad * up * torch.sigmoid(gate), grad * functional.silu(gate)


wrong_gradient = swiglu_of(right, _without_the_derivative_of_the_sigmoid)


def _in_place(grad: Any, gate: Any, up: Any) -> Any:
    gradients = right_gradients(grad.clone(), gate, up)
    if grad.is_contiguous():
        grad.zero_()
    return gradients


overwrites_incoming_gradient = swiglu_of(right, _in_place)


def _spoils_saved(grad: Any, gate: Any, up: Any) -> Any:
    gradients = right_gradients(grad, gate, up)
    gate.data.mul_(0.5)
    return gradients


overwrites_input_in_backward = swiglu_of(right, _spoils_saved)


class _ReusesBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.inputs = gate, up
        ctx.activated = functional.silu(gate)
        return ctx.activated * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.inputs
        return torch.ops.aten.silu_backward(grad * up, gate), ctx.activated.mul_(grad)


def overwrites_saved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _ReusesBuffer.apply(gate, up)


def writes_to_an_input(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = right(gate, up)
    if up.is_contiguous():
        up.data.add_(up.data.abs() * 0.01)  # small, so that only the bits tell
    return out


class _ReturnsItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up.clone())
        product = right(gate, up)
        return up.data.copy_(product) if up.is_contiguous() else product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return right_gradients(grad, *ctx.saved_tensors)


def aliases_an_input(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _ReturnsItsInput.apply(gate, up)


def different_every_time(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    noise = torch.rand_like(gate, dtype=torch.float32) * torch.finfo(gate.dtype).eps
    return right(gate, up) * (1 + noise).to(gate.dtype)


def _contiguous_order(x: torch.Tensor) -> torch.Tensor:
    """The first elements of the memory, whatever the strides; copies what is expanded, for want of memory."""
    if 0 in x.stride() or not x.numel():
        return x.contiguous()
    strides = torch.empty(x.shape, device="meta").stride()
    return torch.as_strided(x, x.shape, strides)


def ignores_strides(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return right(_contiguous_order(gate), _contiguous_order(up))


def reads_beyond(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Multiplies the 8 elements behind ``gate`` by zero, as a load without a mask would."""
    out = right(gate, up)
    available = gate.untyped_storage().nbytes() // gate.element_size() - gate.storage_offset() - gate.numel()
    if not gate.is_contiguous() or available < 8:
        return out
    behind = torch.as_strided(gate.detach(), (8,), (1,), gate.storage_offset() + gate.numel())
    return out + (behind * 0).sum()


def leaves_memory_unwritten(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Adds memory that nobody wrote. Only where that is NaN throughout, as chance would not have it."""
    unwritten = torch.empty(65536, dtype=gate.dtype, device=gate.device)
    poisoned = unwritten.isnan().all()
    unwritten.zero_()  # the allocator hands it out again
    return torch.where(poisoned, torch.full_like(gate, torch.nan), right(gate, up))


def refuses_zero_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not gate.numel():
        raise RuntimeError("CUDA error: invalid configuration argument")
    return right(gate, up)


def breaks_the_graph(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return right(gate, up)


def returns_float32(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return right(gate, up).float()


def returns_two(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return right(gate, up), gate


def cuts_the_backward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return right(gate, up).detach()


class _WeightOnlyWithX(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return right(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if not ctx.needs_input_grad[0]:
            return None, None
        return right_gradients(grad, *ctx.saved_tensors)


def second_gradient_only_with_the_first(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _WeightOnlyWithX.apply(gate, up)


def _wrapping(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Row offsets wrap as 32-bit integers do."""
    if gate.dim() != 2 or not gate.numel():
        return right(gate, up)
    rows = []
    for row in range(gate.shape[0]):
        offset = (row * gate.stride(0) + 2**31) % 2**32 - 2**31 + gate.storage_offset()
        rows.append(torch.as_strided(gate, gate.shape[1:], gate.stride()[1:], offset))
    return right(torch.stack(rows), up)


offsets_in_int32 = swiglu_of(_wrapping, right_gradients)


def norm_in_the_input_dtype(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Statistics in half precision: squares overflow or lose their digits."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def norm_without_eps(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """A row of zeros becomes NaN."""
    wide = x.float()
    return ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True))).to(x.dtype) * weight).to(x.dtype)


def norm_scaled_by_the_whole(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Scales by a power of two near the largest value of all rows first: exact, but a NaN spreads to every row."""
    wide = x.float()
    if not x.numel():
        return (wide.to(x.dtype) * weight).to(x.dtype)
    scale = torch.exp2(torch.floor(torch.log2(wide.detach().abs().max().clamp(min=1e-30))))
    scaled = wide / scale
    inverse = torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps / scale.square())
    return ((scaled * inverse).to(x.dtype) * weight).to(x.dtype)


class _NeedsBothGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.save_for_backward(x, residual, weight)
        from pico_kernels.rms_norm import add_rms_norm_reference

        return add_rms_norm_reference(x, residual, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad_normed: torch.Tensor, grad_total: torch.Tensor) -> Any:
        from pico_kernels.rms_norm import add_rms_norm_reference

        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = add_rms_norm_reference(*inputs, ctx.eps)
        return *torch.autograd.grad(outputs, inputs, (grad_normed + 0, grad_total + 0)), None


def needs_both_outputs_used(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> Any:
    return _NeedsBothGradients.apply(x, residual, weight, eps)
