"""Causal softmax attention with grouped key-value heads (arXiv 1706.03762 and 2305.13245).

``softmax(scale * q k^T + mask) v`` per head; query head ``h`` reads key-value head ``h // (H / Hkv)``. With fewer
queries than keys the queries are the *last* positions (the causal mask is aligned to the lower right), as KV-cache
decoding needs.

Rounding points of the reference: everything in float32 (float64 for float64 input), one rounding to the input dtype.
``torch`` may round scores and probabilities to the input dtype, as plain PyTorch in that dtype does.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from pico_kernels._attention_cpu import tiled_attention
from pico_kernels._dispatch import (
    Implementations,
    compute_dtype,
    require,
    require_floating,
    require_same,
    resolve,
)


def _lower_right_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """(queries, keys) bool, True where a query may look."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """The specification of :func:`attention`: the whole score matrix, one softmax."""
    wide = compute_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    query = q.to(wide).transpose(1, 2)
    key, value = (t.to(wide).repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    scores = query @ key.transpose(-1, -2) * (_default_scale(q) if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~_lower_right_mask(q.shape[1], k.shape[1], q.device), -math.inf)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).to(q.dtype)


def _default_scale(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5


def attention_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """:func:`attention` by PyTorch's scaled_dot_product_attention.

    No mask is built when every query sees every key or when there are as many queries as keys.
    """
    queries, keys = q.shape[1], k.shape[1]
    masked = causal and queries > 1
    mask = _lower_right_mask(queries, keys, q.device) if masked and queries != keys else None
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=masked and mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """:func:`attention` on ATen: row tiles on a CPU, PyTorch's own elsewhere, for one query, and when traced."""
    if q.device.type != "cpu" or q.shape[1] == 1 or q.numel() == 0 or torch.compiler.is_compiling():
        return attention_sdpa(q, k, v, causal=causal, scale=scale)
    return tiled_attention(q, k, v, causal, _default_scale(q) if scale is None else scale)


ATTENTION: Implementations = {"reference": attention_reference, "torch": attention_torch, "sdpa": attention_sdpa}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention.

    Args:
        q: (B, Sq, H, D), any floating dtype, any strides.
        k: (B, Sk, Hkv, D), Hkv divides H, dtype of ``q``.
        v: as ``k``.
        causal: query i of Sq sees keys 0 to ``Sk - Sq + i``; needs Sq <= Sk.
        scale: of the scores; ``D ** -0.5`` if None.
        impl: ``auto``, ``reference``, ``torch`` or ``sdpa``.

    Returns (B, Sq, H, D) like ``q``; differentiable in q, k and v. Raises ValueError for wrong arguments.
    """
    call = resolve("attention", ATTENTION, impl, q.device.type)
    _check(q, k, v, causal)
    return call(q, k, v, causal=causal, scale=scale)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    require_floating("attention", q=q, k=k, v=v)
    require_same("attention", "device", q=q, k=k, v=v)
    require_same("attention", "dtype", q=q, k=k, v=v)
    require(q.dim() == 4, "attention", "q", "shape (B, Sq, H, D)", f"shape {tuple(q.shape)}")
    batch, queries, heads, head_dim = q.shape
    require(head_dim > 0, "attention", "q", "a head dimension of at least 1", head_dim)
    require(
        k.dim() == 4 and (k.shape[0], k.shape[3]) == (batch, head_dim),
        "attention",
        "k",
        f"shape ({batch}, Sk, Hkv, {head_dim})",
        f"shape {tuple(k.shape)}",
    )
    require(v.shape == k.shape, "attention", "v", f"the shape of k {tuple(k.shape)}", f"shape {tuple(v.shape)}")
    keys, kv_heads = k.shape[1:3]
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        "attention",
        "k",
        f"a number of key-value heads that divides the {heads} query heads",
        kv_heads,
    )
    require(keys > 0 or queries == 0, "attention", "k", "at least one key", keys)
    require(
        not causal or queries <= keys,
        "attention",
        "q",
        f"at most as many queries as keys ({keys}) when causal",
        queries,
    )
