"""The gated activation of SwiGLU (Shazeer, arXiv 2002.05202): ``silu(gate) * up``.

Rounding points: those of ``torch.nn.functional.silu(gate) * up`` in the input dtype. silu is computed in float32 and
rounded to the input dtype, then the product is rounded once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pico_kernels._dispatch import Implementations, require_floating, require_same, require_shape, resolve


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The specification of :func:`swiglu`."""
    return functional.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Saves the inputs only: silu is computed again in the backward, a third less memory than plain autograd."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate) if ctx.needs_input_grad[0] else None
        grad_up = functional.silu(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        return grad_gate, grad_up


def swiglu_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """:func:`swiglu` on ATen."""
    return _SwiGLU.apply(gate, up)


def swiglu_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """:func:`swiglu` as one Triton kernel; Triton is imported by the first call."""
    from pico_kernels import swiglu_triton as kernels

    return kernels.swiglu(gate, up)


SWIGLU: Implementations = {"reference": swiglu_reference, "torch": swiglu_torch, "triton": swiglu_triton}


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate: (..., h), any floating dtype, any strides.
        up: shape, dtype and device of ``gate``.
        impl: ``auto``, ``reference``, ``torch`` or ``triton``.

    Returns a tensor like ``gate``; differentiable in both. Raises ValueError for wrong arguments.
    """
    call = resolve("swiglu", SWIGLU, impl, gate.device.type)
    require_floating("swiglu", gate=gate, up=up)
    require_same("swiglu", "device", gate=gate, up=up)
    require_same("swiglu", "dtype", gate=gate, up=up)
    require_shape("swiglu", "up", up, tuple(gate.shape))
    return call(gate, up)
