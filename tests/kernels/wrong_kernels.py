"""Kernels that are wrong in one way each, for test_conformance.py; every other property of theirs is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pico_kernels.attention import attention_reference
from pico_kernels.linear_cross_entropy import linear_cross_entropy_reference
from torch.nn import functional


def swiglu_of(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """An op of (gate, up) from its forward and from its backward (grad, gate, up) -> both gradients."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> Any:
            ctx.save_for_backward(gate, up)
            return forward(gate, up)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return backward(grad, *ctx.saved_tensors)

    return Function.apply


def right(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def right_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


def _without_the_derivative_of_the_sigmoid(grad: Any, gate: Any, up: Any) -> Any:
    return grad * up * torch.sigmoid(gate), grad * functional.silu(gate)


wrong_gradient = swiglu_of(right, _without_the_derivative_of_the_sigmoid)


def _in_place(grad: Any, gate: Any, up: Any) -> Any:
    gradients = right_gradients(grad.clone(), gate, up)
    if grad.is_contiguous():
        grad.zero_()
    return gradients


overwrites_incoming_gradient = swiglu_of(right, _in_place)


def _spoils_saved(grad: Any, gate: Any, up: Any) -> Any:
    gradients = right_gradients(grad, gate, up)
    gate.data.mul_(0.5)
    return gradients


overwrites_input_in_backward = swiglu_of(right, _spoils_saved)


class _ReusesBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.inputs = gate, up
        ctx.activated = functional.silu(gate)
        return ctx.activated * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.inputs
        return torch.ops.aten.silu_backward(grad * up, gate), ctx.activated.mul_(grad)


def overwrites_saved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _ReusesBuffer.apply(gate, up)


def writes_to_an_input(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = right(gate, up)
    if up.is_contiguous():
        up.data.add_(up.data.abs() * 0.01)  # small, so that only the bits tell
    return out


class _ReturnsItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up.clone())
        product = right(gate, up)
        return up.data.copy_(product) if up.is_contiguous() else product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return right_gradients(grad, *ctx.saved_tensors)


def aliases_an_input(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _ReturnsItsInput.apply(gate, up)


def different_every_time(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    noise = torch.rand_like(gate, dtype=torch.float32) * torch.finfo(gate.dtype).eps
    return right(gate, up) * (1 + noise).to(gate.dtype)


def _contiguous_order(x: torch.Tensor) -> torch.Tensor:
    """The first elements of the memory, whatever the strides; copies what is expanded, for want of memory."""
    if 0 in x.stride() or not x.numel():
        return x.contiguous()
    strides = torch.empty(x.shape, device="meta").stride()
    return torch.as_strided(x, x.shape, strides)


def ignores_strides(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return right(_contiguous_order(gate), _contiguous_order(up))


def reads_beyond(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Multiplies the 8 elements behind ``gate`` by zero, as a load without a mask would."""
    out = right(gate, up)
    available = gate.untyped_storage().nbytes() // gate.element_size() - gate.storage_offset() - gate.numel()
    if not gate.is_contiguous() or available < 8:
        return out
    behind = torch.as_strided(gate.detach(), (8,), (1,), gate.storage_offset() + gate.numel())
    return out + (behind * 0).sum()


def leaves_memory_unwritten(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Adds memory that nobody wrote. Only where that is NaN throughout, as chance would not have it."""
    unwritten = torch.empty(65536, dtype=gate.dtype, device=gate.device)
    poisoned = unwritten.isnan().all()
    unwritten.zero_()  # the allocator hands it out again
    return torch.where(poisoned, torch.full_like(gate, torch.nan), right(gate, up))


def refuses_zero_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not gate.numel():
        raise RuntimeError("CUDA error: invalid configuration argument")
    return right(gate, up)


def breaks_the_graph(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return right(gate, up)


def returns_float32(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return right(gate, up).float()


def returns_two(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return right(gate, up), gate


def cuts_the_backward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return right(gate, up).detach()


class _WeightOnlyWithX(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return right(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if not ctx.needs_input_grad[0]:
            return None, None
        return right_gradients(grad, *ctx.saved_tensors)


def second_gradient_only_with_the_first(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _WeightOnlyWithX.apply(gate, up)


def _wrapping(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Row offsets wrap as 32-bit integers do."""
    if gate.dim() != 2 or not gate.numel():
        return right(gate, up)
    rows = []
    for row in range(gate.shape[0]):
        offset = (row * gate.stride(0) + 2**31) % 2**32 - 2**31 + gate.storage_offset()
        rows.append(torch.as_strided(gate, gate.shape[1:], gate.stride()[1:], offset))
    return right(torch.stack(rows), up)


offsets_in_int32 = swiglu_of(_wrapping, right_gradients)


def norm_in_the_input_dtype(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Statistics in half precision: squares overflow or lose their digits."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def norm_without_eps(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """A row of zeros becomes NaN."""
    wide = x.float()
    return ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True))).to(x.dtype) * weight).to(x.dtype)


def norm_scaled_by_the_whole(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Scales by a power of two near the largest value of all rows first: exact, but a NaN spreads to every row."""
    wide = x.float()
    if not x.numel():
        return (wide.to(x.dtype) * weight).to(x.dtype)
    scale = torch.exp2(torch.floor(torch.log2(wide.detach().abs().max().clamp(min=1e-30))))
    scaled = wide / scale
    inverse = torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps / scale.square())
    return ((scaled * inverse).to(x.dtype) * weight).to(x.dtype)


class _NeedsBothGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.save_for_backward(x, residual, weight)
        from pico_kernels.rms_norm import add_rms_norm_reference

        return add_rms_norm_reference(x, residual, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad_normed: torch.Tensor, grad_total: torch.Tensor) -> Any:
        from pico_kernels.rms_norm import add_rms_norm_reference

        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = add_rms_norm_reference(*inputs, ctx.eps)
        return *torch.autograd.grad(outputs, inputs, (grad_normed + 0, grad_total + 0)), None


def needs_both_outputs_used(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> Any:
    return _NeedsBothGradients.apply(x, residual, weight, eps)


def _mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, seen: torch.Tensor) -> torch.Tensor:
    """Attention under the mask ``seen`` (queries, keys), with as many key-value heads as query heads."""
    query, key, value = (t.float().transpose(1, 2) for t in (q, k, v))
    scores = query @ key.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value).transpose(1, 2).to(q.dtype)


def _mask(q: torch.Tensor, k: torch.Tensor, causal: bool, shift: int) -> torch.Tensor:
    """Keys that each query sees; ``shift`` more than the lower-right alignment gives."""
    every = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    return every.tril(k.shape[1] - q.shape[1] + shift) if causal else every


def _repeated(t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(q.shape[2] // t.shape[2], 2)


def attention_sees_one_key_too_many(q: Any, k: Any, v: Any, *, causal: bool = True, scale: Any = None) -> Any:
    return _mixed(q, _repeated(k, q), _repeated(v, q), scale, _mask(q, k, causal, 1))


def attention_masks_from_the_upper_left(q: Any, k: Any, v: Any, *, causal: bool = True, scale: Any = None) -> Any:
    """Right where there are as many queries as keys."""
    return _mixed(q, _repeated(k, q), _repeated(v, q), scale, _mask(q, k, causal, q.shape[1] - k.shape[1]))


def attention_reads_the_wrong_kv_head(q: Any, k: Any, v: Any, *, causal: bool = True, scale: Any = None) -> Any:
    """Query head h reads head h % Hkv."""
    group = q.shape[2] // k.shape[2]
    return _mixed(q, k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1), scale, _mask(q, k, causal, 0))


def attention_of(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The op from its backward (grad, q, k, v, causal, scale) -> gradients of q, k and v."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> torch.Tensor:
            ctx.save_for_backward(q, k, v)
            ctx.options = causal, scale
            return attention_reference(q, k, v, causal=causal, scale=scale).contiguous()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return *backward(grad, *ctx.saved_tensors, *ctx.options), None, None

    def attention(q: Any, k: Any, v: Any, *, causal: bool = True, scale: float | None = None) -> torch.Tensor:
        return Function.apply(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale)

    return attention


def _attention_gradients(
    grad: Any, q: Any, k: Any, v: Any, causal: bool, scale: float, order: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """In float32, each key-value head summed over its group, and the keys' gradient over queries in an ``order``."""
    query, key, value, out = (t.float() for t in (q, k, v, grad))
    scores = torch.einsum("bihd,bjhd->bhij", query, _repeated(key, query)) * scale
    p = torch.softmax(scores.masked_fill(~_mask(q, k, causal, 0), -torch.inf), -1)
    dp = torch.einsum("bihd,bjhd->bhij", out, _repeated(value, query))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    groups = (*k.shape[:3], q.shape[2] // k.shape[2], k.shape[3])
    grad_q = torch.einsum("bhij,bjhd->bihd", ds, _repeated(key, query))
    if order is not None:
        ds, query = ds.index_select(2, order), query.index_select(1, order)
    wide = [torch.einsum("bhij,bihd->bjhd", one, other) for one, other in ((ds, query), (p, out))]
    return [grad_q.to(q.dtype), *(t.view(groups).sum(3).to(q.dtype) for t in wide)]


def _without_the_scale(grad: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> list[torch.Tensor]:
    grad_q, grad_k, grad_v = _attention_gradients(grad, q, k, v, causal, scale)
    return [grad_q / scale, grad_k, grad_v]


attention_forgets_the_scale_of_dq = attention_of(_without_the_scale)


def _in_any_order(grad: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> list[torch.Tensor]:
    """As atomic additions do."""
    return _attention_gradients(grad, q, k, v, causal, scale, torch.randperm(q.shape[1], device=q.device))


attention_adds_in_any_order = attention_of(_in_any_order)


def loss_divides_by_all_tokens(hidden: Any, weight: Any, labels: Any, **options: Any) -> torch.Tensor:
    """The mean of a batch with ignored tokens is too small."""
    if options["reduction"] == "mean" and options["denominator"] is None:
        options["denominator"] = float(max(1, labels.numel()))
    return linear_cross_entropy_reference(hidden, weight, labels, **options)


def loss_of(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The op from its backward (grad per token, hidden, weight, labels, options) -> gradients of hidden and weight.

    The gradient per token is that of the losses before reduction, 0 for ignored tokens.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, labels: Any, options: dict[str, Any]) -> torch.Tensor:
            ctx.save_for_backward(hidden, weight, labels)
            ctx.options = options
            return linear_cross_entropy_reference(hidden, weight, labels, **options)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            hidden, weight, labels = ctx.saved_tensors
            counted = labels != ctx.options["ignore_index"]
            denominator = ctx.options["denominator"]
            if denominator is None:
                denominator = counted.sum() if ctx.options["reduction"] == "mean" else 1
            token_grad = torch.where(counted, grad / denominator, 0)
            return *backward(token_grad, hidden, weight, labels, ctx.options), None, None

    return lambda hidden, weight, labels, **options: Function.apply(hidden, weight, labels, options)


def _gradient_of_the_logits(token_grad: Any, hidden: Any, weight: Any, labels: Any, z_loss: float) -> torch.Tensor:
    logits = functional.linear(hidden, weight.to(hidden.dtype)).float()
    lse = torch.logsumexp(logits, -1, keepdim=True)
    one_hot = labels[:, None] == torch.arange(weight.shape[0], device=labels.device)
    return token_grad[:, None] * (torch.exp(logits - lse) * (1 + 2 * z_loss * lse) - one_hot.float())


def _loss_gradients(token_grad: Any, hidden: Any, weight: Any, labels: Any, z_loss: float) -> tuple[Any, Any]:
    wide = _gradient_of_the_logits(token_grad, hidden, weight, labels, z_loss)
    grad_hidden = wide @ weight.to(hidden.dtype).float()
    return grad_hidden.to(hidden.dtype), (wide.t() @ hidden.float()).to(weight.dtype)


def _ignored_too(token_grad: Any, hidden: Any, weight: Any, labels: Any, options: Any) -> Any:
    """Ignored tokens push all logits down."""
    ignored = labels == options["ignore_index"]
    known = torch.where(ignored, -1, labels)
    shared = token_grad.amax() if token_grad.numel() else 0
    return _loss_gradients(torch.where(ignored, shared, token_grad), hidden, weight, known, options["z_loss"])


loss_lets_ignored_tokens_push = loss_of(_ignored_too)


def _one_for_all(token_grad: Any, hidden: Any, weight: Any, labels: Any, options: Any) -> Any:
    """The sum's gradient, computed in the forward as for a scalar, times the first token's incoming gradient."""
    counted = (labels != options["ignore_index"]).float()
    first = token_grad.flatten()[0] if token_grad.numel() else 0
    return _loss_gradients(counted * first, hidden, weight, labels, options["z_loss"])


loss_takes_one_gradient_for_all_tokens = loss_of(_one_for_all)


def _without_z_loss(token_grad: Any, hidden: Any, weight: Any, labels: Any, options: Any) -> Any:
    return _loss_gradients(token_grad, hidden, weight, labels, 0.0)


loss_forgets_the_gradient_of_z_loss = loss_of(_without_z_loss)


def _sums_in_bfloat16(token_grad: Any, hidden: Any, weight: Any, labels: Any, options: Any) -> Any:
    """The weight's gradient is added up over tiles of 16 tokens in the dtype of ``hidden``."""
    wide = _gradient_of_the_logits(token_grad, hidden, weight, labels, options["z_loss"])
    grad_weight = torch.zeros_like(weight, dtype=hidden.dtype)
    for rows in range(0, hidden.shape[0], 16):
        grad_weight += (wide[rows : rows + 16].t() @ hidden[rows : rows + 16].float()).to(hidden.dtype)
    return (wide @ weight.to(hidden.dtype).float()).to(hidden.dtype), grad_weight.to(weight.dtype)


loss_sums_the_weight_gradient_in_half_precision = loss_of(_sums_in_bfloat16)


def loss_holds_the_logits(hidden: Any, weight: Any, labels: Any, **options: Any) -> torch.Tensor:
    """Right in every number."""
    return linear_cross_entropy_reference(hidden, weight, labels, **options)
