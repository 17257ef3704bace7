"""``attention`` by PyTorch's scaled_dot_product_attention.

On Hopper PyTorch's own order of backends has flash first, though cuDNN is 1.7 to 2.3 times faster there at training
shapes and slower or equal elsewhere (huggingface/transformers#48163); the order is changed for the one call, and flash,
efficient and math remain for what cuDNN cannot do. No process-wide switch is left turned.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.backends import cuda
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pico_kernels._attention_documents import (
    Attended,
    as_one_row,
    document_mask,
    host_reads,
    lower_right_mask,
    per_document,
)
from pico_kernels._autocast import in_argument_dtype
from pico_kernels._device import constant_when_traced, cuda_capability
from pico_kernels._dispatch import require

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CUDNN_HEAD_DIM = 128  # the largest whose backward cuDNN has on Hopper


@constant_when_traced
def _nothing_switched_off() -> bool:
    switches = (cuda.cudnn_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    return all(enabled() for enabled in switches)


def prefers_cudnn(q: torch.Tensor) -> bool:
    """Whether cuDNN goes first: Hopper, half precision, head_dim a multiple of 8 and at most 128.

    A process that has switched a backend off has chosen for itself.
    """
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= _CUDNN_HEAD_DIM
        and cuda_capability(q.device) == 9
        and _nothing_switched_off()
    )


def _backends(q: torch.Tensor) -> AbstractContextManager[Any]:
    """The order of backends for one call; changing it costs 20 us of host time."""
    return sdpa_kernel(_CUDNN_FIRST, set_priority=True) if prefers_cudnn(q) else nullcontext()


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    with _backends(q):
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2)


@in_argument_dtype
def attention_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """:func:`pico_kernels.attention` by PyTorch's scaled_dot_product_attention.

    No mask is built when every query sees every key or when there are as many queries as keys. Documents are computed
    one by one on a CPU; elsewhere, and in a traced graph, they are a dense boolean mask of (B * S) ** 2 bytes, with
    which PyTorch leaves out its flash kernels. Raises ValueError for ``return_lse``: PyTorch returns none.
    """
    expected = "False with impl='sdpa', as PyTorch returns no log-sum-exp; triton, flash_attn, torch and reference do"
    require(not return_lse, "attention", "return_lse", expected, return_lse)
    if cu_seqlens is not None and host_reads(cu_seqlens):
        return per_document(partial(_attend, scale=scale, mask=None, causal=causal), q, k, v, cu_seqlens)
    if cu_seqlens is not None:
        mask = document_mask(cu_seqlens, q.shape[0] * q.shape[1], causal)
        return _attend(as_one_row(q), as_one_row(k), as_one_row(v), scale, mask, False).reshape(q.shape)
    queries, keys = q.shape[1], k.shape[1]
    masked = causal and queries > 1
    lower_right = lower_right_mask(queries, keys, q.device) if masked and queries != keys else None
    return _attend(q, k, v, scale, lower_right, masked and lower_right is None)
