"""Which keys a query may see, and packed documents: what the implementations of ``attention`` share."""

from __future__ import annotations

from collections.abc import Callable

import torch

Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""The output, or the output and the log-sum-exps."""


def default_scale(q: torch.Tensor) -> float:
    """``D ** -0.5``."""
    return q.shape[-1] ** -0.5


def lower_right_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """(queries, keys) bool, True where a query may look."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def document_mask(cu_seqlens: torch.Tensor, tokens: int, causal: bool) -> torch.Tensor:
    """(tokens, tokens) bool, True where a query may look."""
    position = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens[1:], position, right=True)
    same = document[:, None] == document[None, :]
    return same & lower_right_mask(tokens, tokens, same.device) if causal else same


def as_one_row(x: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D) as (1, B * S, H, D), in which ``cu_seqlens`` counts."""
    return x.reshape(1, -1, *x.shape[2:])


def lse_per_row(lse: torch.Tensor, batch: int) -> torch.Tensor:
    """(1, H, B * S) of :func:`as_one_row` as (B, H, S)."""
    return lse.view(lse.shape[1], batch, -1).transpose(0, 1).contiguous()


def host_reads(cu_seqlens: torch.Tensor) -> bool:
    """Whether the host can read the values at no cost: on a CPU, outside tracing."""
    return cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


def per_document(
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Attended],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> Attended:
    """``call`` on every document (1, n, H, D) by itself, put together again; ``cu_seqlens`` is read by the host."""
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    if not lengths:
        return call(q, k, v)
    # split, not slices: its backward is one concatenation, that of every slice a tensor of all tokens.
    documents = zip(*(as_one_row(t).split(lengths, 1) for t in (q, k, v)), strict=True)
    results = [call(*document) for document in documents]
    if isinstance(results[0], torch.Tensor):
        return torch.cat(results, 1).reshape(q.shape)  # type: ignore[arg-type]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 1).reshape(q.shape), lse_per_row(torch.cat(lses, 2), q.shape[0])
