"""Every op on a CPU, forward and backward: `torch` against the reference and PyTorch's own, at Pico-tiny's shapes.

``pytest benchmarks/test_ops_cpu.py`` prints a table per op; ``--benchmark-json FILE`` keeps it. A result is checked
against the reference before it is timed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pico_kernels as pk
import pytest
import torch
from torch.nn import functional

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN_WIDTH, VOCAB = 12, 4, 8, 96, 384, 50304
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The documented figures are for two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Seeded normal values that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def measure(benchmark: Any, call: Callable, truth: Callable, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Check outputs and gradients against ``truth`` (relative to the largest value), then time forward and backward."""

    def run(function: Callable) -> list[torch.Tensor]:
        out = function(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])]

    for got, want in zip(run(call), run(truth), strict=True):
        assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()
    benchmark.pedantic(run, (call,), rounds=5, warmup_rounds=1)


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest value of a result."""
    return 1e-4 if dtype == torch.float32 else 5e-2


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="rms_norm 4096 x 96")
def test_rms_norm(benchmark: Any, dtype: torch.dtype, impl: str) -> None:
    """bfloat16 input has a float32 weight, as in bf16-mixed training."""
    inputs = [draw(4096, WIDTH, dtype=dtype), draw(WIDTH, seed=1)]
    call = pk.OPS["rms_norm"]
    measure(benchmark, call[impl], call["reference"], inputs, tolerance(dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="add_rms_norm 4096 x 96")
def test_add_rms_norm(benchmark: Any, dtype: torch.dtype, impl: str) -> None:
    """The norm with its residual addition."""
    inputs = [draw(4096, WIDTH, dtype=dtype), draw(4096, WIDTH, dtype=dtype, seed=2), draw(WIDTH, seed=1)]
    call = pk.OPS["add_rms_norm"]
    measure(benchmark, call[impl], call["reference"], inputs, tolerance(dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="swiglu 4096 x 384")
def test_swiglu(benchmark: Any, dtype: torch.dtype, impl: str) -> None:
    """The activation between the feed-forward products."""
    inputs = [draw(4096, HIDDEN_WIDTH, dtype=dtype, seed=seed) for seed in range(2)]
    call = pk.OPS["swiglu"]
    measure(benchmark, call[impl], call["reference"], inputs, tolerance(dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="rope 2 x 2048 x 12 (4 kv) x 8")
def test_rope(benchmark: Any, dtype: torch.dtype, impl: str) -> None:
    """Interleaved, queries and keys."""
    inputs = [draw(2, 2048, heads, HEAD_DIM, dtype=dtype) for heads in (HEADS, KV_HEADS)]
    cos, sin = pk.rope_tables(2048, HEAD_DIM)
    call = pk.OPS["rope"]
    measure(
        benchmark,
        lambda q, k: call[impl](q, k, cos, sin),
        lambda q, k: call["reference"](q, k, cos, sin),
        inputs,
        tolerance(dtype),
    )


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "seq_len"), [(2, 512), (8, 256), (2, 2048)])
@pytest.mark.benchmark(group="attention, 12 heads, 4 kv, head_dim 8")
def test_attention(benchmark: Any, batch: int, seq_len: int, dtype: torch.dtype, impl: str) -> None:
    """Row tiles against PyTorch's flash kernel for CPUs."""
    inputs = [
        draw(batch, seq_len, heads, HEAD_DIM, dtype=dtype, seed=seed)
        for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    ]
    call = pk.OPS["attention"]
    measure(benchmark, call[impl], call["reference"], inputs, tolerance(dtype))


def native_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PyTorch's own, which without options writes all logits, in the input dtype.

    Its chunks (``LinearCrossEntropyOptions()``) are no opponent in bfloat16: torch 2.13 adds up the losses in it on a
    CPU and gives 4.0 for 11.35.
    """
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy is new in torch 2.13")
    return functional.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels)


@pytest.mark.parametrize("impl", ["torch", "reference", "native"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="linear_cross_entropy 2048 x 96 x 50304, fp32 weight")
def test_linear_cross_entropy(benchmark: Any, dtype: torch.dtype, impl: str) -> None:
    """Chunks against all logits at once and PyTorch's own."""
    inputs = [draw(2048, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, seed=1)]
    labels = torch.randint(0, VOCAB, (2048,), generator=torch.Generator().manual_seed(2))
    table = {**pk.OPS["linear_cross_entropy"], "native": native_loss}
    measure(
        benchmark,
        lambda h, w: table[impl](h, w, labels),
        lambda h, w: table["reference"](h, w, labels),
        inputs,
        tolerance(dtype),
    )
