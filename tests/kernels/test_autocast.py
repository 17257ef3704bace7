"""Autocast changes no op: the same bits, inside a region and outside, from every implementation."""

import sys
from contextlib import nullcontext

import pico_kernels as pk
import pytest
import torch
from pico_kernels import rope_tables
from pico_kernels._triton import interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
PYTORCHS_BACKWARD = ("reference", "sdpa")  # to be called outside of a region, as PyTorch's documentation asks


def draw(op: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Differentiable arguments of an op, and the others."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    if op == "attention":
        return [normal(2, 20, 4, 8), normal(2, 20, 2, 8), normal(2, 20, 2, 8)], []
    if op == "linear_cross_entropy":
        return [normal(9, 16), normal(40, 16)], [torch.arange(9, device=DEVICE)]
    if op == "rope":
        return [normal(2, 5, 4, 8), normal(2, 5, 2, 8)], list(rope_tables(5, 8, device=DEVICE))
    norm = {"rms_norm": [normal(9, 16), normal(16)], "add_rms_norm": [normal(9, 16), normal(9, 16), normal(16)]}
    return norm.get(op, [normal(9, 16), normal(9, 16)]), []


def results(op: str, impl: str, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
    """Outputs and gradients."""

    def region(wanted: bool) -> torch.autocast | nullcontext:
        return torch.autocast(DEVICE, dtype=torch.bfloat16) if wanted else nullcontext()

    differentiable, others = draw(op)
    leaves = [x.to(dtype).requires_grad_() for x in differentiable]
    with region(autocast):
        out = getattr(pk, op)(*leaves, *others, impl=impl)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    with region(autocast and impl not in PYTORCHS_BACKWARD):
        grads = torch.autograd.grad(outputs, leaves, [torch.full_like(x, 0.3) for x in outputs])
    return [*outputs, *grads]


CASES = [(op, impl) for op in pk.OPS for impl in pk.OPS[op] if impl not in ("auto", "flash_attn")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("op", "impl"), CASES)
def test_autocast_changes_nothing(op: str, impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and sys.platform != "linux":
        pytest.skip("Triton has no packages for other systems")
    for inside, outside in zip(results(op, impl, dtype, True), results(op, impl, dtype, False), strict=True):
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("impl", ["reference", "torch", "sdpa"])
def test_a_graph_of_a_region_computes_in_the_dtype_of_its_arguments(impl: str) -> None:
    torch.compiler.reset()
    inputs, _ = draw("attention")

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return pk.attention(*tensors, impl=impl)

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        traced = torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(traced, call(*inputs))
