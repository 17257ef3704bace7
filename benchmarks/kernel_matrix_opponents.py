"""Who is measured on attention and on the loss of a linear head.

None of the other libraries' wheels has run beside ours yet: their calls are written against the signatures in
liger_kernel 0.8.5 and cut_cross_entropy 25.1.1. An opponent that raises or computes something else is named, not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pico_kernels as pk
import torch
from pico_kernels._dispatch import resolve
from pico_kernels.attention import attention_reference
from pico_kernels.conformance_cases import attention_in_its_dtype
from pico_kernels.linear_cross_entropy import linear_cross_entropy_reference
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.kernel_cases import OURS, Case
from benchmarks.kernel_opponent import Maker, Opponent, Tensors, gather, narrow_weight

SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_WIDEST_TILES = 384  # d_model; beyond it the strategy is neither chosen nor compiled ahead of time
# Tokens. Its loss is a bfloat16 sum over chunks: by those it takes itself, of 2 at tiny and 1k tokens, 4.0 for 11.3.
_ATEN_CHUNK = 8192
_CUT_SLACK = 0.1  # its sums, simulated at d 96 and a vocabulary of 50304: 0.055 of the norm, 0.08 of the largest
_TRUTH_TOKENS = 4096  # rows whose float32 logits the truth holds at once: 0.8 GB


def _implementation(op: str, name: str, device: torch.device) -> Callable[..., Any] | str:
    """Ours of that name, or why it cannot be had."""
    try:
        return resolve(op, pk.OPS[op], name, device.type)
    except ValueError as error:
        return str(error)


def _compiled(call: Callable[..., Any], device: torch.device, bytes_per_call: int, truth: Callable) -> Opponent | str:
    if device.type == "cpu":
        return "a GPU opponent: not compiled for a CPU"
    # Every case starts from an empty cache: past eight shapes of one function dynamo would fall back to eager, unseen.
    torch._dynamo.reset()
    compiled = torch.compile(call, dynamic=False, fullgraph=True)
    return Opponent("torch.compile", compiled, truth, bytes_per_call=bytes_per_call)


def attention_truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Plain PyTorch in the inputs' dtype, a sequence at a time, whose scores the backward computes again."""
    rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
    return (torch.cat([checkpoint(attention_in_its_dtype, *row, use_reentrant=False) for row in rows]),)


def attention_opponents(case: Case, device: torch.device) -> tuple[list[Opponent], dict[str, str]]:
    """Ours, PyTorch's by backend, flash-attn through our wrapper, and the compiled twin."""

    def ours(name: str) -> Opponent | str:
        found = _implementation("attention", name, device)
        if isinstance(found, str):
            return found
        return Opponent(name, lambda q, k, v: (found(q, k, v, causal=True),), attention_truth)

    def sdpa(name: str) -> Opponent | str:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
            group = q.shape[2] // k.shape[2]
            grouped = name != "sdpa efficient"  # which has no grouped heads: its users repeat them
            if not grouped:
                k, v = (t.repeat_interleave(group, 2) for t in (k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            with sdpa_kernel(SDPA_BACKENDS[name]):
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return (out.transpose(1, 2),)

        return Opponent(name, call, attention_truth)

    def compiled() -> Opponent | str:
        # Scores, probabilities and their gradients in float32, and what Inductor does not fuse away.
        score_bytes = 5 * 4 * case.tokens * case.seq_len * case.shape.n_heads
        return _compiled(lambda q, k, v: (attention_reference(q, k, v),), device, score_bytes, attention_truth)

    makers: dict[str, Maker] = {name: partial(ours, name) for name in (*OURS["attention"], "flash_attn")}
    makers |= {name: partial(sdpa, name) for name in SDPA_BACKENDS}
    return gather(makers | {"torch.compile": compiled})


def make_labels(case: Case, device: torch.device) -> torch.Tensor:
    """Any ids, none ignored: what an ignored token saves is not compared."""
    generator = torch.Generator(device).manual_seed(2)
    return torch.randint(0, case.shape.vocab, (case.tokens,), generator=generator, device=device)


def plain_loss(labels: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> Tensors:
    """The loss as models write it, with one float32 copy of the logits."""
    return (functional.cross_entropy(functional.linear(hidden, weight.to(hidden.dtype)).float(), labels),)


def loss_opponents(case: Case, device: torch.device) -> tuple[list[Opponent], dict[str, str]]:
    """Ours, by both strategies; the loss in PyTorch, plain, compiled and chunked; Liger; cut cross-entropy."""
    labels = make_labels(case, device)
    logits = case.tokens * case.shape.vocab
    plain_bytes = logits * (2 + 3 * 4)  # bfloat16 logits; in float32 they, their log-softmax and gradient

    def truth(hidden: torch.Tensor, weight: torch.Tensor) -> Tensors:
        """The twin, a part of the tokens at a time, whose logits the backward computes again."""

        def part(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy_reference(rows, weight, ids, reduction="sum")

        pairs = zip(hidden.split(_TRUTH_TOKENS), labels.split(_TRUTH_TOKENS), strict=True)
        parts = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
        return (torch.stack(parts).sum() / case.tokens,)

    def ours(name: str) -> Opponent | str:
        found = _implementation("linear_cross_entropy", name, device)
        if isinstance(found, str):
            return found
        return Opponent(name, lambda hidden, weight: (found(hidden, weight, labels),), truth)

    def strategy(name: str) -> Opponent | str:
        problem = _implementation("linear_cross_entropy", "triton", device)
        if isinstance(problem, str):
            return problem
        from pico_kernels import linear_cross_entropy_triton as kernels

        if name == kernels.choose_strategy(case.shape.d_model, 2):
            return "the strategy that `triton` chooses here"
        if name == "tiles" and case.shape.d_model > _WIDEST_TILES:
            return f"not made for d_model above {_WIDEST_TILES}"
        call = partial(kernels.linear_cross_entropy, strategy=name)
        return Opponent(name, lambda hidden, weight: (call(hidden, weight, labels),), truth)

    def plain() -> Opponent | str:
        return Opponent("plain", partial(plain_loss, labels), truth, bytes_per_call=plain_bytes)

    def compiled() -> Opponent | str:
        return _compiled(partial(plain_loss, labels), device, plain_bytes, truth)

    def aten() -> Opponent | str:
        function = getattr(functional, "linear_cross_entropy", None)
        if function is None:
            return f"torch {torch.__version__} has none"
        chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_ATEN_CHUNK)
        # Its loss comes back in bfloat16; a trainer widens it.
        return Opponent(
            "F.linear_cross_entropy",
            lambda hidden, weight: (function(hidden, weight, labels, options=chunked).float(),),
            truth,
            narrow_weight,
            output_dtype=torch.bfloat16,
        )

    makers: dict[str, Maker] = {name: partial(ours, name) for name in ("triton", "auto", "torch")}
    makers |= {name: partial(strategy, name) for name in ("tiles", "chunks")}
    makers |= {"plain": plain, "torch.compile": compiled, "F.linear_cross_entropy": aten}
    makers |= {"liger": partial(_liger, labels, truth), "cut_cross_entropy": partial(_cut, labels, truth)}
    return gather(makers)


def _liger(labels: torch.Tensor, truth: Callable) -> Opponent | str:
    """With its weight gradient accumulated in float32, as ours is; its default is the weight's dtype."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function
    except Exception as error:
        return f"no liger_kernel: {type(error).__name__}: {error}"
    # bias, class weights, ignore_index, squared log-sum-exp, smoothing, reduction, softcap, z-loss wanted, accumulator
    options = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)
    return Opponent("liger", lambda *two: (Function.apply(*two, labels, *options)[0],), truth, narrow_weight)


def _cut(labels: torch.Tensor, truth: Callable) -> Opponent | str:
    """Without its filter, which leaves out gradients of unlikely ids: with random weights, nearly all of them.

    It adds hundreds of partial sums of a gradient in bfloat16, and this version has no other way.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy
    except Exception as error:
        return f"no cut_cross_entropy: {type(error).__name__}: {error}"
    return Opponent(
        "cut_cross_entropy",
        lambda *two: (linear_cross_entropy(*two, labels, filter_eps=None).float(),),
        truth,
        narrow_weight,
        gradient_slack=_CUT_SLACK,
    )
