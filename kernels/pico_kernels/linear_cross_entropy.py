"""Cross entropy of a linear head without the logits in memory.

``loss_i = logsumexp(z_i) - z_i[label_i] + z_loss * logsumexp(z_i)^2`` with ``z = hidden @ weight^T``; ignored tokens
have loss and gradient zero. The whole matrix ``z`` (N, V) never exists: ``torch`` holds a chunk of its rows
(:mod:`pico_kernels._linear_cross_entropy`), ``triton`` a chunk or nothing
(:mod:`pico_kernels.linear_cross_entropy_triton`).

Rounding points: ``weight`` is rounded to ``hidden.dtype`` and the logits to that dtype, as ``F.linear`` there does;
softmax, log-sum-exp and losses in float32 (float64 for float64 input). In ``torch`` the gradient of the logits is
rounded to ``hidden.dtype`` for the products; the weight's gradient is summed over chunks in float32 and rounded once
to ``weight.dtype``. ``triton`` may keep the logits in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from pico_kernels._autocast import in_argument_dtype
from pico_kernels._dispatch import (
    Implementations,
    compute_dtype,
    require,
    require_floating,
    require_same,
    require_shape,
    resolve,
)
from pico_kernels._linear_cross_entropy import FusedLoss, Run, TokenLosses, run_chunks

REDUCTIONS = ("mean", "sum", "none")


def check_labels(labels: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Refuse labels outside [0, vocab_size) other than ``ignore_index``.

    On a CPU ValueError names the first one. Elsewhere, and in a traced graph, the check is an assertion on the device:
    the host does not wait. On CUDA the message stands on standard error, in ``Assertion `...` failed``; the next call
    that synchronises raises ``torch.AcceleratorError`` (``device-side assert triggered``), and the process cannot use
    the GPU any more.
    """
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if bad.any():
            position = int(bad.nonzero()[0])
            expected = f"ids in [0, {vocab_size}) or ignore_index {ignore_index}"
            got = f"{int(labels[position])} at position {position}"
            require(False, "linear_cross_entropy", "labels", expected, got)
    else:
        message = "linear_cross_entropy: labels: an id outside the vocabulary that is not ignore_index"
        torch._assert_async(~bad.any(), message)


def divisor(counted: torch.Tensor, reduction: str, denominator: float | torch.Tensor | None) -> torch.Tensor | float:
    """What the sum of the losses is divided by: no counted token and no given denominator gives 0 / 0, NaN."""
    if denominator is not None:
        return denominator.detach() if isinstance(denominator, torch.Tensor) else denominator
    return counted.sum() if reduction == "mean" else 1.0


@in_argument_dtype
def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The specification of :func:`linear_cross_entropy`: all logits at once."""
    check_labels(labels, weight.shape[0], ignore_index)
    logits = functional.linear(hidden, weight.to(hidden.dtype)).to(compute_dtype(hidden.dtype))
    counted = labels != ignore_index
    losses = functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    losses = losses + z_loss * torch.logsumexp(logits, -1).square() * counted
    return losses if reduction == "none" else losses.sum() / divisor(counted, reduction, denominator)


def linear_cross_entropy_torch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """:func:`linear_cross_entropy` on ATen, chunk by chunk."""
    check_labels(labels, weight.shape[0], ignore_index)
    return in_chunks(hidden, weight, labels, ignore_index, reduction, denominator, z_loss, run_chunks)


def in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
    denominator: float | torch.Tensor | None,
    z_loss: float,
    run: Run,
) -> torch.Tensor:
    """The loss of checked labels by ``run``, which computes as :func:`run_chunks` does."""
    counted = labels != ignore_index
    targets = torch.where(counted, labels, 0)
    if reduction == "none":
        return TokenLosses.apply(hidden, weight, targets, counted, z_loss, run)
    total = FusedLoss.apply(hidden, weight, targets, counted, z_loss, torch.is_grad_enabled(), run)
    return total / divisor(counted, reduction, denominator)


def linear_cross_entropy_triton(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """:func:`linear_cross_entropy` with Triton kernels; Triton is imported by the first call."""
    from pico_kernels import linear_cross_entropy_triton as kernels

    return kernels.linear_cross_entropy(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        z_loss=z_loss,
    )


LINEAR_CROSS_ENTROPY: Implementations = {
    "reference": linear_cross_entropy_reference,
    "torch": linear_cross_entropy_torch,
    "triton": linear_cross_entropy_triton,
}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross entropy of ``hidden @ weight^T`` against ``labels``.

    Args:
        hidden: (N, d), any floating dtype; the products run in it.
        weight: (V, d), any floating dtype; its gradient comes back in that dtype.
        labels: (N,) int64, ids in [0, V) or ``ignore_index``.
        ignore_index: the label of tokens that do not count.
        reduction: ``mean`` over counted tokens (NaN if there is none, as in PyTorch), ``sum``, or ``none``.
        denominator: the sum of the losses is divided by it in place of the count, so that micro-batches and ranks
            share one; a number or a 0-d tensor (no gradient). Not with ``reduction="none"``.
        z_loss: coefficient of the squared log-sum-exp (PaLM, arXiv 2204.02311), added to each counted token.
        impl: ``auto``, ``reference``, ``torch`` or ``triton``.

    Returns a 0-d float32 tensor, or (N,) for ``none`` (float64 for float64 input); differentiable in ``hidden`` and
    ``weight``. Raises ValueError for wrong arguments and, on a CPU, for a label outside the vocabulary; on a GPU such a
    label is a device-side assertion.
    """
    call = resolve("linear_cross_entropy", LINEAR_CROSS_ENTROPY, impl, hidden.device.type)
    _check(hidden, weight, labels, reduction, denominator)
    return call(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        z_loss=z_loss,
    )


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    reduction: str,
    denominator: float | torch.Tensor | None,
) -> None:
    op = "linear_cross_entropy"
    require_floating(op, hidden=hidden, weight=weight)
    require_same(op, "device", hidden=hidden, weight=weight, labels=labels)
    require(hidden.dim() == 2, op, "hidden", "shape (N, d)", f"shape {tuple(hidden.shape)}")
    require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.shape[0] > 0,
        op,
        "weight",
        f"shape (V, {hidden.shape[1]}) with V >= 1",
        f"shape {tuple(weight.shape)}",
    )
    require_shape(op, "labels", labels, (hidden.shape[0],))
    require(labels.dtype == torch.int64, op, "labels", "int64", labels.dtype)
    require(reduction in REDUCTIONS, op, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
    if denominator is None:
        return
    require(reduction != "none", op, "denominator", "None with reduction='none'", denominator)
    if isinstance(denominator, torch.Tensor):
        require_shape(op, "denominator", denominator, ())
        require_same(op, "device", hidden=hidden, denominator=denominator)
