"""The packages of FlashAttention (github.com/Dao-AILab/flash-attention) behind one pair of functions.

FlashAttention-2 (``flash-attn`` 2.7 or newer), FlashAttention-3 (``flash_attn_interface``) and ``flash-attn-4``
(``flash_attn.cute``) have different modules, argument orders and results. Their inner forward and backward are called,
not their autograd functions, which ``torch.compile`` cannot trace in every one of them. In all three the causal mask is
aligned to the lower right, query heads are grouped, and log-sum-exps are natural logarithms in float32.

Written from the sources of flash-attn 2.8, of FlashAttention-3 and of flash-attn-4 4.0.0b36; not yet run against them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class FlashCall(NamedTuple):
    """What a call is besides its tensors. With ``cu_seqlens`` (int32) the tensors are (tokens, heads, head_dim).

    ``longest`` bounds the length of a document; the number of all tokens, as the true one would need a host sync.
    """

    scale: float
    causal: bool
    cu_seqlens: torch.Tensor | None = None
    longest: int = 0


Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FlashPackage:
    """One package.

    Attributes:
        name: as its authors call it.
        module: what is imported.
        functions: what the module must have.
        capabilities: major compute capabilities of the GPUs it has kernels for.
        max_head_dim: the widest head; every multiple of 8 up to it works.
        deterministic: whether its deterministic backward, always asked for, keeps its promise.
        forward: (module, q, k, v, call) to (out, log-sum-exp).
        backward: (module, grad, q, k, v, out, lse, call) to the gradients of q, k and v.
    """

    name: str
    module: str
    functions: tuple[str, ...]
    capabilities: tuple[int, ...]
    max_head_dim: int
    deterministic: bool
    forward: Callable[..., Pair]
    backward: Callable[..., Triple]


def _lengths_if_packed(call: FlashCall) -> dict[str, Any]:
    if call.cu_seqlens is None:
        return {}
    return {
        "cu_seqlens_q": call.cu_seqlens,
        "cu_seqlens_k": call.cu_seqlens,
        "max_seqlen_q": call.longest,
        "max_seqlen_k": call.longest,
    }


def _empty_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in (("dq", q), ("dk", k), ("dv", v))}


def _forward_2(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashCall) -> Pair:
    function = module._flash_attn_forward if call.cu_seqlens is None else module._flash_attn_varlen_forward
    out, lse, *_ = function(
        q,
        k,
        v,
        **_lengths_if_packed(call),
        dropout_p=0.0,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out, lse


def _backward_2(
    module: Any,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: FlashCall,
) -> Triple:
    function = module._flash_attn_backward if call.cu_seqlens is None else module._flash_attn_varlen_backward
    grads = _empty_gradients(q, k, v)
    function(
        grad,
        q,
        k,
        v,
        out,
        lse,
        **grads,
        **_lengths_if_packed(call),
        dropout_p=0.0,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return grads["dq"], grads["dk"], grads["dv"]


def _forward_3(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashCall) -> Pair:
    out, lse, *_ = module._flash_attn_forward(
        q, k, v, **_lengths_if_packed(call), softmax_scale=call.scale, causal=call.causal
    )
    return out, lse


def _backward_3(
    module: Any,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: FlashCall,
) -> Triple:
    grads = _empty_gradients(q, k, v)
    module._flash_attn_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        **_lengths_if_packed(call),
        **grads,
        softmax_scale=call.scale,
        is_causal=call.causal,
        deterministic=True,
    )
    return grads["dq"], grads["dk"], grads["dv"]


def _forward_4(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashCall) -> Pair:
    out, lse, *_ = module._flash_attn_fwd(
        q, k, v, **_lengths_if_packed(call), softmax_scale=call.scale, causal=call.causal, return_lse=True
    )
    return out, lse


def _backward_4(
    module: Any,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: FlashCall,
) -> Triple:
    grad_q, grad_k, grad_v = module._flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        lse,
        softmax_scale=call.scale,
        causal=call.causal,
        **_lengths_if_packed(call),
        deterministic=True,
    )
    return grad_q, grad_k, grad_v


PACKAGES = (
    FlashPackage(
        "FlashAttention-3",
        "flash_attn_interface",
        ("_flash_attn_forward", "_flash_attn_backward"),
        capabilities=(9,),
        max_head_dim=256,
        deterministic=False,  # Dao-AILab/flash-attention#2244
        forward=_forward_3,
        backward=_backward_3,
    ),
    FlashPackage(
        "flash-attn-4",
        "flash_attn.cute.interface",
        ("_flash_attn_fwd", "_flash_attn_bwd"),
        capabilities=(9, 10, 11),  # on 8 it has no backward, on 12 no deterministic one
        max_head_dim=128,  # 192 and 256 on some GPUs only
        deterministic=True,
        forward=_forward_4,
        backward=_backward_4,
    ),
    FlashPackage(
        "flash-attn 2.7 or newer",
        "flash_attn.flash_attn_interface",
        (
            "_flash_attn_forward",
            "_flash_attn_backward",
            "_flash_attn_varlen_forward",
            "_flash_attn_varlen_backward",
        ),
        capabilities=(8, 9, 10, 11, 12),
        max_head_dim=256,
        deterministic=True,
        forward=_forward_2,
        backward=_backward_2,
    ),
)
"""In order of preference: the first that is importable and has kernels for a GPU is the one it gets (predicted)."""


@functools.cache
def import_package(package: FlashPackage) -> Any:
    """The imported module, or a str: why it cannot be used."""
    try:
        module = importlib.import_module(package.module)
    except Exception as error:  # an extension built for another PyTorch raises anything
        return f"{package.name}: cannot import {package.module}: {type(error).__name__}: {error}"
    missing = [name for name in package.functions if not hasattr(module, name)]
    return f"{package.name}: {package.module} lacks {', '.join(missing)}" if missing else module


def flash_package(capability: int, head_dim: int) -> FlashPackage | None:
    """The preferred package for a GPU of this major compute capability and heads of this width."""
    if head_dim % 8:
        return None
    for package in PACKAGES:
        fits = capability in package.capabilities and head_dim <= package.max_head_dim
        if fits and not isinstance(import_package(package), str):
            return package
    return None


def flash_attn_problem(device_type: str = "cuda") -> str | None:
    """Why no package can run on tensors of this device type, or None if one is importable."""
    if device_type != "cuda":
        return f"FlashAttention needs a GPU; the device is {device_type}"
    problems = [found for found in map(import_package, PACKAGES) if isinstance(found, str)]
    return "; ".join(problems) if len(problems) == len(PACKAGES) else None
