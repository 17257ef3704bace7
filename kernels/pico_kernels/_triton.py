"""What the Triton implementations share: whether they can run here, op registration, launch and compile settings.

Imports torch only; Triton is imported when a Triton kernel is first used. The kernels are in ``<op>_triton.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

COMPILE_OPTIONS: Mapping[str, Any] = MappingProxyType({"enable_fp_fusion": True})
"""Options of every launch and every ahead-of-time compile. Pinned: Triton 3.10 turns FP fusion off by default."""


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1``: kernels run in Triton's interpreter, on any device, some 1000 times slower."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_problem(device_type: str = "cuda") -> str | None:
    """Why Triton kernels cannot run on tensors of this device type, or None if they can.

    The variable is read at every call; Triton is imported only where a GPU or the interpreter could run a kernel.
    """
    if not interpreting():
        needs = "Triton kernels need a GPU, or TRITON_INTERPRET=1 for its slow interpreter"
        if device_type != "cuda":
            return f"{needs}; the device is {device_type}"
        if not torch.cuda.is_available():
            return f"{needs}; PyTorch finds no GPU"
    try:
        import triton.language
    except Exception as error:  # a broken installation raises anything; `auto` then means torch
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    # Triton's own functions (tl.sum) are compiled or interpreted from the moment Triton is imported.
    if interpreting() != (type(triton.language.sum).__name__ == "InterpretedFunction"):
        return f"TRITON_INTERPRET was {'set' if interpreting() else 'unset'} after Triton had been imported"
    return None


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of ``x`` current, where a launch goes; nothing for a CPU tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., d) as (rows, d) with unit stride in the last dimension.

    A view where one row stride describes ``x`` (contiguous, sliced, one leading dimension expanded), else a copy.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width) if x.numel() else x.new_empty(0, width)
    return rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()


_LIBRARY = torch.library.Library("pico_kernels", "FRAGMENT")


def register_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register ``pico_kernels::<schema>``, which is what tracing sees, and return it.

    Library.define and .impl cost 6 us a call, torch.library.custom_op 11 (pytorch/pytorch#177109); eager calls use
    neither but a plain ``autograd.Function``. The op takes any strides and returns contiguous tensors.

    Args:
        schema: name and types, ``"swiglu(Tensor gate, Tensor up) -> Tensor"``.
        implementation: computes, for tensors of any device.
        fake: makes outputs of the right shape, dtype and strides.
        backward: gradients from ``(ctx, *grads)``, one for each input; without it the op is not differentiable.
        setup_context: saves for backward, called with keywords ``ctx``, ``inputs``, ``output``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pico_kernels::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"pico_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.pico_kernels, name).default


@dataclass(frozen=True)
class PicoShape:
    """The sizes of one published Pico decoder."""

    name: str
    d_model: int
    hidden: int
    n_heads: int = 12
    n_kv_heads: int = 4
    vocab: int = 50304

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


PICO_SHAPES = (
    PicoShape("tiny", 96, 384),
    PicoShape("small", 384, 1536),
    PicoShape("medium", 768, 3072),
    PicoShape("large", 1536, 6144),
)


@dataclass(frozen=True)
class AotCase:
    """One kernel as a launch would specialise it, for compilation without a GPU.

    Attributes:
        name: unique among the cases of a shape, such as ``rms_norm_forward-bf16``.
        kernel: the ``triton.jit`` function.
        signature: argument to Triton type, ``"*bf16"``, ``"i64"``, ``"constexpr"``.
        constexprs: values of the constexpr arguments.
        num_warps: warps of a program.
        num_stages: software pipeline stages.
        aligned: arguments a launch specialises as divisible by 16 (addresses and strides).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    aligned: tuple[str, ...] = ()


def triton_name(dtype: torch.dtype) -> str:
    """Triton's short name of a dtype of :data:`pico_kernels._dispatch.KERNEL_DTYPES`."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
