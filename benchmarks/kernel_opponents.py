"""Who is measured on each op: our implementations, the twin compiled, ATen's own, and other libraries where they are.

An opponent computes the same function, but may round elsewhere, want its heads transposed or its weight in the input's
dtype, or write over its arguments; :class:`~benchmarks.kernel_opponent.Opponent` says which. Those of attention and
the loss: :mod:`benchmarks.kernel_matrix_opponents`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pico_kernels as pk
import torch
from torch.nn import functional

from benchmarks.kernel_cases import EPS, OURS, Case
from benchmarks.kernel_matrix_opponents import attention_opponents, loss_opponents
from benchmarks.kernel_opponent import Opponent, Tensors, gather, narrow_weight


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    """Normal values for the op's differentiable arguments, in the shapes of a training step.

    Weights are float32 but representable in ``dtype``, so that an opponent that wants them narrow gets the same values.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    shape = case.shape
    if case.op == "linear_cross_entropy":  # logits of unit variance
        weight = draw(shape.vocab, shape.d_model).float() * shape.d_model**-0.5
        return draw(case.tokens, shape.d_model), weight.to(dtype).float()
    if case.op in ("rope", "attention"):
        batch = max(1, case.tokens // case.seq_len)
        heads = (shape.n_heads, shape.n_kv_heads, *((shape.n_kv_heads,) if case.op == "attention" else ()))
        return tuple(draw(batch, case.tokens // batch, count, shape.head_dim) for count in heads)
    if case.op == "swiglu":
        return draw(case.tokens, shape.hidden), draw(case.tokens, shape.hidden)
    rows = 2 if case.op == "add_rms_norm" else 1
    return *(draw(case.tokens, shape.d_model) for _ in range(rows)), draw(shape.d_model).float()


def _tuple(outputs: torch.Tensor | Tensors) -> Tensors:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def bind(case: Case, function: Callable[..., Any], device: torch.device, style: str = "interleaved") -> Callable:
    """``function``, an implementation of the case's op, as a function of the differentiable arguments alone."""
    if case.op == "rope":
        seq_len = min(case.seq_len, case.tokens)
        cos, sin = pk.rope_tables(seq_len, case.shape.head_dim, device=device)
        return lambda q, k: function(q, k, cos, sin, style=style)
    if case.op == "swiglu":
        return lambda gate, up: _tuple(function(gate, up))
    return lambda *tensors: _tuple(function(*tensors, EPS))


def _heads_first(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return tuple(tensor.transpose(1, 2) for tensor in inputs)


def opponents(case: Case, device: torch.device) -> tuple[list[Opponent], dict[str, str]]:
    """Those who can be had here, and for the others by name the reason why not."""
    if case.op == "attention":
        return attention_opponents(case, device)
    if case.op == "linear_cross_entropy":
        return loss_opponents(case, device)
    truth = bind(case, pk.OPS[case.op]["reference"], device)
    theirs = {"torch.compile": _compiled, "aten": _aten, "liger": _liger, "apex": _apex}
    return gather(
        {name: partial(_ours, name, case, device, truth) for name in OURS[case.op]}
        | {name: partial(make, case, device, truth) for name, make in theirs.items()}
    )


# Each maker returns the opponent, or why it cannot be had here.


def _ours(name: str, case: Case, device: torch.device, truth: Callable) -> Opponent | str:
    """The bare implementation: what a decoder calls through its KernelSet."""
    try:
        kernels = pk.KernelSet.from_config({"default": "reference", case.op: name}, device)
    except ValueError as error:
        return str(error)
    return Opponent(name, bind(case, getattr(kernels, case.op), device), truth)


def _compiled(case: Case, device: torch.device, truth: Callable) -> Opponent | str:
    if device.type == "cpu":
        return "a GPU opponent: not compiled for a CPU"
    # Every case starts from an empty cache: past eight shapes of one function dynamo would fall back to eager, unseen.
    torch._dynamo.reset()
    return Opponent("torch.compile", torch.compile(truth, dynamic=False, fullgraph=True), truth)


def _aten(case: Case, device: torch.device, truth: Callable) -> Opponent | str:
    width = (case.shape.d_model,)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> Tensors:
        return (functional.rms_norm(x, width, weight, EPS),)

    def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Tensors:
        total = x + residual
        return functional.rms_norm(total, width, weight, EPS), total

    if case.op == "rms_norm":  # the fused kernel takes one dtype only, so the weight is narrow
        return Opponent("aten", norm, truth, narrow_weight)
    if case.op == "add_rms_norm":
        return Opponent("aten", add_norm, truth, narrow_weight)
    return f"ATen has no {case.op} of its own (the twin and `torch` are built of ATen)"


def _liger(case: Case, device: torch.device, truth: Callable) -> Opponent | str:
    """Liger-Kernel with its defaults, which write dx over dy."""
    try:
        if case.op == "rms_norm":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Function
        elif case.op == "add_rms_norm":
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Function
        elif case.op == "rope":
            from liger_kernel.ops.rope import LigerRopeFunction as Function
        else:
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Function
    except Exception as error:  # Liger's import may fail in more ways than by absence
        return f"liger_kernel cannot be imported: {type(error).__name__}: {error}"
    if case.op == "rope":  # half-split pairs only, heads before positions, angles (1, S, D)
        tables = pk.rope_tables(min(case.seq_len, case.tokens), case.shape.head_dim, device=device)
        cos, sin = (torch.cat([table, table], -1)[None] for table in tables)
        half = bind(case, pk.OPS["rope"]["reference"], device, style="half")

        def half_heads_first(q: torch.Tensor, k: torch.Tensor) -> Tensors:
            return tuple(tensor.transpose(1, 2) for tensor in half(q.transpose(1, 2), k.transpose(1, 2)))

        return Opponent("liger", lambda q, k: Function.apply(q, k, cos, sin), half_heads_first, _heads_first, True)
    if case.op == "swiglu":
        return Opponent("liger", lambda gate, up: (Function.apply(gate, up),), truth, overwrites=True)
    return Opponent("liger", lambda *tensors: _tuple(Function.apply(*tensors, EPS)), truth, overwrites=True)


def _apex(case: Case, device: torch.device, truth: Callable) -> Opponent | str:
    """NVIDIA's apex; a package of that name on an index is something else, so only the class itself counts."""
    if case.op != "rms_norm":
        return f"apex has no {case.op} kernel that fits"
    try:
        from apex.normalization import FusedRMSNorm
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        FusedRMSNorm(case.shape.d_model)  # loads the CUDA extension
    except Exception as error:
        return f"no apex.normalization.FusedRMSNorm: {type(error).__name__}: {error}"
    width = (case.shape.d_model,)
    return Opponent("apex", lambda x, weight: (fused_rms_norm_affine(x, weight, width, EPS),), truth, narrow_weight)
