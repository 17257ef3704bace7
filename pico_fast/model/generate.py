"""Sampling from a decoder through its key-value cache."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pico_fast.model.cache import KVCache
from pico_fast.model.decoder import PicoDecoder


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with -inf outside the ``top_k`` most likely tokens and outside the nucleus of mass ``top_p``.

    The nucleus (Holtzman et al., arXiv 1904.09751) is the smallest set of tokens whose probabilities sum to at least
    ``top_p``; the most likely token always stays.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        outside = (mass_before >= top_p).scatter(-1, order, mass_before >= top_p)
        outside.scatter_(-1, order[:, :1], False)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def generate(
    model: PicoDecoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continue ``prompt`` (B, S) int64 by up to ``max_new_tokens``; returns (B, S + new) int64.

    ``temperature`` 0 takes the most likely token. A sequence that has written ``eos_id`` is filled with it; generation
    ends when all have. The same seed gives the same tokens on one machine. Ranks that share the model (along tp and
    dp_shard) call it together with the same arguments, and all get what the first of them samples. Raises ValueError
    for an empty prompt, settings out of range, and lengths beyond the model's ``max_seq_len``.
    """
    length = prompt.shape[1]
    limit = model.config.max_seq_len
    if length < 1 or max_new_tokens < 0 or length + max_new_tokens > limit:
        raise ValueError(
            f"{length} prompt + {max_new_tokens} new tokens: 1 to max_seq_len = {limit} in all are possible"
        )
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} >= 0, top_k {top_k} >= 1 and 0 < top_p {top_p} <= 1 expected")
    generator = torch.Generator(prompt.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    # FSDP2 (known by its method: importing its class takes a second) reuses what it gathers into, also for training,
    # where tensors of inference mode cannot be; elsewhere that mode makes a small model's token 14 % cheaper
    with torch.no_grad() if hasattr(model, "unshard") else torch.inference_mode():
        return _continued(model, prompt, max_new_tokens, temperature, top_k, top_p, generator, eos_id)


def _continued(
    model: PicoDecoder,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
    eos_id: int | None,
) -> Tensor:
    batch, capacity = prompt.shape[0], prompt.shape[1] + max_new_tokens
    cache = KVCache(model.config, batch, capacity, dtype=model.compute_dtype, device=prompt.device, tp=model.tp.size)
    tokens, finished = prompt, torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    unread = prompt
    for _ in range(max_new_tokens):
        logits = model.next_token_logits(unread, cache).float()
        if temperature == 0:
            unread = logits.argmax(dim=-1, keepdim=True)
        else:
            best = logits.amax(dim=-1, keepdim=True)
            scaled = ((logits.double() - best) / temperature).float()  # a tiny temperature must not make inf - inf
            probabilities = filter_logits(scaled, top_k, top_p).softmax(dim=-1)
            unread = torch.multinomial(probabilities, 1, generator=generator)
        for group in model.shared_over:
            dist.broadcast(unread, group=group, group_src=0)
        if eos_id is not None:
            unread = torch.where(finished[:, None], eos_id, unread)
            finished = finished | (unread[:, 0] == eos_id)
        tokens = torch.cat([tokens, unread], dim=1)
        if eos_id is not None and bool(finished.all()):  # a host sync per token: generation is not the training loop
            break
    return tokens
