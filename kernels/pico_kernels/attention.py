"""Causal softmax attention with grouped key-value heads (arXiv 1706.03762 and 2305.13245).

``softmax(scale * q k^T + mask) v`` per head; query head ``h`` reads key-value head ``h // (H / Hkv)``. With fewer
queries than keys the queries are the *last* positions (the causal mask is aligned to the lower right), as KV-cache
decoding needs.

Rounding points of the reference: everything in float32 (float64 for float64 input), one rounding to the input dtype.
``torch`` and ``sdpa`` may round scores and probabilities to the input dtype, as plain PyTorch in that dtype does;
``triton`` and ``flash_attn`` round the probabilities for their product with v. Log-sum-exps are float32 throughout.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch

from pico_kernels._attention_auto import choose
from pico_kernels._attention_cpu import one_query_attention, tiled_attention, tiled_attention_with_lse
from pico_kernels._attention_documents import (
    Attended,
    as_one_row,
    default_scale,
    document_mask,
    host_reads,
    lower_right_mask,
    lse_per_row,
    per_document,
)
from pico_kernels._autocast import in_argument_dtype
from pico_kernels._dispatch import (
    Implementations,
    compute_dtype,
    require,
    require_floating,
    require_same,
    resolve,
)
from pico_kernels.attention_flash import attention_flash
from pico_kernels.attention_sdpa import attention_sdpa

_FEW_QUERIES = 16


@in_argument_dtype
def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """The specification of :func:`attention`: the whole score matrix, one softmax."""
    wide = compute_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    query, key, value = q.to(wide), *(t.to(wide).repeat_interleave(group, 2) for t in (k, v))
    mask = lower_right_mask(q.shape[1], k.shape[1], q.device) if causal else None
    if cu_seqlens is not None:
        query, key, value = as_one_row(query), as_one_row(key), as_one_row(value)
        mask = document_mask(cu_seqlens, query.shape[1], causal)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (default_scale(q) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    out = (torch.softmax(scores, -1) @ value).transpose(1, 2).reshape(q.shape).to(q.dtype)
    if not return_lse:
        return out
    lse = torch.logsumexp(scores, -1)
    return out, lse if cu_seqlens is None else lse_per_row(lse, q.shape[0])


@in_argument_dtype
def attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """:func:`attention` on ATen: row tiles on a CPU, document by document; elsewhere, and when traced, PyTorch's own.

    PyTorch's own gives no log-sum-exp: there ``return_lse`` takes the reference with its whole score matrix.
    """
    if q.device.type != "cpu" or q.numel() == 0 or torch.compiler.is_compiling():
        call = attention_reference if return_lse else attention_sdpa
        return call(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, return_lse=return_lse)
    factor = default_scale(q) if scale is None else scale
    tiled = tiled_attention_with_lse if return_lse else tiled_attention
    if cu_seqlens is not None:
        return per_document(partial(tiled, causal=causal, scale=factor), q, k, v, cu_seqlens)
    if return_lse or not _few_queries(q, k, v):
        return tiled(q, k, v, causal, factor)
    if q.shape[1] == 1 and q.dtype == torch.bfloat16:
        return one_query_attention(q, k, v, factor)
    return attention_sdpa(q, k, v, causal=causal, scale=scale)


def _few_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether this is decoding, where copying the keys for tiles costs more than tiles save.

    4 float32 queries on 2,048 keys of head_dim 8, one core: 355 us by SDPA, 515 in tiles. With a gradient only for a
    single query: the gradient of k that PyTorch's kernel accumulates in float32 is less exact than the tiles'.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return q.shape[1] == 1 or (q.shape[1] < min(_FEW_QUERIES, k.shape[1]) and not needs_grad)


def attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """:func:`attention` as Triton kernels; Triton is imported by the first call."""
    from pico_kernels import attention_triton as kernels

    return kernels.attention(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, return_lse=return_lse)


def attention_auto(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Attended:
    """:func:`attention` on a GPU by the implementation that the table in ``_attention_auto.py`` names for the call."""
    call = ATTENTION[choose(q, k, cu_seqlens, return_lse)]
    return call(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, return_lse=return_lse)


ATTENTION: Implementations = {
    "auto": attention_auto,
    "reference": attention_reference,
    "torch": attention_torch,
    "triton": attention_triton,
    "sdpa": attention_sdpa,
    "flash_attn": attention_flash,
}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Attended:
    """Softmax attention.

    Args:
        q: (B, Sq, H, D), any floating dtype, any strides.
        k: (B, Sk, Hkv, D), Hkv divides H, dtype of ``q``.
        v: as ``k``.
        causal: query i of Sq sees keys 0 to ``Sk - Sq + i``; needs Sq <= Sk.
        scale: of the scores; ``D ** -0.5`` if None.
        cu_seqlens: (documents + 1,) int32 or int64 on the device of ``q``: where each document begins among the
            B * S tokens in row-major order, from 0 to B * S, never decreasing. A token sees only its own document.
            A row end is no boundary unless it is listed. Needs Sq == Sk.
        return_lse: also return the log-sum-exp of each query's scaled, masked scores.
        impl: ``auto``, ``reference``, ``torch``, ``triton``, ``sdpa`` or ``flash_attn``.

    Returns (B, Sq, H, D) like ``q``, and with ``return_lse`` the pair of it and (B, H, Sq) float32 (float64 for float64
    input), natural logarithms; both differentiable in q, k and v. Raises ValueError for wrong arguments; wrong values
    in ``cu_seqlens`` on a GPU are a device-side assertion instead.
    """
    call = resolve("attention", ATTENTION, impl, q.device.type)
    _check(q, k, v, causal)
    if cu_seqlens is not None:
        _check_documents(q, k, cu_seqlens)
        if q.numel() == 0:  # without a token there is no document, and an empty row per batch has no size to be told
            cu_seqlens = None
    return call(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, return_lse=return_lse)


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


def _check_documents(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """The values are read on a CPU; elsewhere, and in a traced graph, they are asserted on the device, unwaited for."""
    op, name = "attention", "cu_seqlens"
    require(q.shape[1] == k.shape[1], op, name, f"as many queries as keys ({k.shape[1]}) in a row", q.shape[1])
    require(cu_seqlens.dtype in (torch.int32, torch.int64), op, name, "int32 or int64", cu_seqlens.dtype)
    require_same(op, "device", q=q, cu_seqlens=cu_seqlens)
    got_shape = f"shape {tuple(cu_seqlens.shape)}"
    require(cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0, op, name, "shape (documents + 1,)", got_shape)
    tokens = q.shape[0] * q.shape[1]
    if host_reads(cu_seqlens):
        starts = cu_seqlens.tolist()
        require(starts[0] == 0, op, name, "a first entry of 0", starts[0])
        require(starts[-1] == tokens, op, name, f"a last entry of B * S = {tokens}", starts[-1])
        for position, (start, end) in enumerate(pairwise(starts)):
            require(start <= end, op, name, "entries that never decrease", f"{start}, {end} at position {position}")
    else:
        good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        message = f"attention: cu_seqlens: entries must go from 0 to B * S = {tokens} and never decrease"
        torch._assert_async(good, message)
