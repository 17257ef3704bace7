"""What ``impl="auto"`` means for attention on a GPU: one table, read from top to bottom."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from pico_kernels._device import constant_when_traced, cuda_capability
from pico_kernels._dispatch import triton_is_fast
from pico_kernels._flash_packages import flash_package

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rule:
    """An implementation and the calls it is for; bounds are inclusive, an empty tuple is any GPU."""

    impl: str
    why: str
    capabilities: tuple[int, ...] = ()
    head_dim: tuple[int, int] = (1, 1 << 30)
    queries: tuple[int, int] = (0, 1 << 30)
    keys: tuple[int, int] = (0, 1 << 30)


RULES = (
    Rule("triton", "predicted: the others pad heads to 32 (flash-attn 2, SDPA) or 64 (Hopper)", head_dim=(1, 32)),
    Rule("triton", "predicted: few queries; the keys are split over programs, no mask", queries=(1, 15)),
    Rule("flash_attn", "predicted: FlashAttention-3 or flash-attn-4 leads on Hopper", (9,), head_dim=(33, 256)),
    Rule("sdpa", "cuDNN first, 1.7 to 2.3x SDPA's flash on Hopper: huggingface/transformers#48163", (9,)),
    Rule("flash_attn", "predicted: flash-attn-4 on Blackwell", (10, 11), head_dim=(33, 128)),
    Rule("sdpa", "predicted: SDPA's flash kernel is flash-attn 2's"),
    Rule("triton", "documents, log-sum-exps, float32 with grouped heads: SDPA has no fused kernel for them"),
    Rule("torch", "what is left: float64, heads wider than 256, or no Triton"),
)
"""The first rule that holds and whose implementation can take the call. No entry is measured here yet."""


@dataclass(frozen=True)
class Wanted:
    """What the choice depends on. ``capability``: major, 0 if not NVIDIA; ``fused``: SDPA's fused kernels can do it."""

    capability: int
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int
    fused: bool
    deterministic: bool


def choose(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None, return_lse: bool) -> str:
    """The name of the implementation for these arguments, on a GPU."""
    wanted = Wanted(
        cuda_capability(q.device),
        q.dtype,
        q.shape[-1],
        q.shape[1],
        k.shape[1],
        cu_seqlens is None and not return_lse,
        torch.are_deterministic_algorithms_enabled(),
    )
    return next(rule.impl for rule in RULES if _holds(rule, wanted) and _can(rule.impl, wanted))


def _holds(rule: Rule, wanted: Wanted) -> bool:
    return (
        (not rule.capabilities or wanted.capability in rule.capabilities)
        and rule.head_dim[0] <= wanted.head_dim <= rule.head_dim[1]
        and rule.queries[0] <= wanted.queries <= rule.queries[1]
        and rule.keys[0] <= wanted.keys <= rule.keys[1]
    )


def _can(impl: str, wanted: Wanted) -> bool:
    if impl == "triton":
        return wanted.dtype != torch.float64 and wanted.head_dim <= 256 and _has_triton()
    if impl == "flash_attn":
        return wanted.dtype in _HALF and _has_flash(wanted.capability, wanted.head_dim, wanted.deterministic)
    if impl == "sdpa":
        return wanted.dtype in _HALF and wanted.fused
    return True


@constant_when_traced
def _has_triton() -> bool:
    return _installed_triton()


@functools.cache
def _installed_triton() -> bool:
    return triton_is_fast()


@constant_when_traced
def _has_flash(capability: int, head_dim: int, deterministic: bool) -> bool:
    """Where PyTorch is asked for deterministic algorithms, only a package whose backward is deterministic."""
    package = flash_package(capability, head_dim)
    return package is not None and (package.deterministic or not deterministic)
