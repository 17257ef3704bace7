"""RoPE in Triton: float64 accuracy, layouts, launches, gradients asked for, int64 offsets, tracing.

Runs on a GPU where there is one, else in Triton's interpreter (see conftest.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico_kernels as pk
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico_kernels import rope_triton
from pico_kernels._triton import PICO_SHAPES, interpreting

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STYLES = ["interleaved", "half"]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def heads(
    batch: int, seq_len: int, n_heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    return [rand(batch, seq_len, n_heads, dim, dtype=dtype), rand(batch, seq_len, kv_heads, dim, dtype=dtype, seed=1)]


def with_grads(call: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    upstream = [rand(*out.shape, seed=7 + i).to(out.dtype) for i, out in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


class Launches:
    """Stands in for a kernel and records the keyword arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.keywords: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **keywords: Any) -> None:
            self.keywords.append(keywords)
            self.kernel[grid](*args, **keywords)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    recorder = Launches(rope_triton.rope_kernel)
    monkeypatch.setattr(rope_triton, "rope_kernel", recorder)
    return recorder


@pytest.mark.usefixtures("nan_poisoned")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    seq_len=st.integers(1, 40),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 10, 12, 32, 64, 96, 256]),
    dtype=st.sampled_from(DTYPES),
    style=st.sampled_from(STYLES),
)
def test_accuracy(
    batch: int, seq_len: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, style: str
) -> None:
    """Error against float64 at most twice the reference's own error in this dtype, plus one output ulp."""
    inputs = heads(batch, seq_len, kv_heads * group, kv_heads, dim, dtype)
    cos, sin = pk.rope_tables(seq_len + 3, dim, device=DEVICE)

    def run(impl: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return with_grads(lambda q, k: pk.rope(q, k, cos, sin, style=style, impl=impl), tensors)

    truth = run("reference", [t.double() for t in inputs])
    for want, base, got in zip(truth, run("reference", inputs), run("triton", inputs), strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        ulp = torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= 2 * (base.double() - want).abs().max() + ulp


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_where_the_twin_does(dtype: torch.dtype, style: str) -> None:
    """All but the few values that a fused multiply-add rounds the other way; a second rounding would move a quarter."""
    inputs = heads(2, 40, 6, 2, 32, dtype)
    cos, sin = pk.rope_tables(40, 32, device=DEVICE)
    got, want = (
        with_grads(lambda q, k, impl=impl: pk.rope(q, k, cos, sin, style=style, impl=impl), inputs)
        for impl in ("triton", "reference")
    )
    allowed = 0.0 if interpreting() else 0.5 if dtype == torch.float32 else 0.01
    for a, b in zip(got, want, strict=True):
        assert (a != b).double().mean() <= allowed


@pytest.mark.parametrize("style", STYLES)
def test_gradcheck(style: str) -> None:
    inputs = [t.double().requires_grad_() for t in heads(1, 3, 2, 1, 6)]
    cos, sin = pk.rope_tables(3, 6, device=DEVICE)
    assert torch.autograd.gradcheck(lambda q, k: pk.rope(q, k, cos, sin, style=style, impl="triton"), inputs)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the shape of ``x`` and other strides."""
    every_second = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    every_second[..., 1::2] = x
    packed = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    packed[..., 1:-2] = x
    return {
        "batch_expanded": x[:1].expand_as(x),
        "all_expanded": x[:1, :1, :1, :1].expand_as(x),
        "heads_first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "every_second": every_second[..., 1::2],
        "packed": packed[..., 1:-2],
    }


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_any_layout_of_inputs_tables_and_gradients(kind: str, style: str) -> None:
    strided = [layouts(t)[kind].detach().requires_grad_() for t in heads(3, 5, 4, 2, 8)]
    dense = [t.detach().contiguous().requires_grad_() for t in strided]
    cos, sin = (table[:, ::2] for table in pk.rope_tables(9, 16, device=DEVICE))
    got = pk.rope(*strided, cos, sin, style=style, impl="triton")
    want = pk.rope(*dense, cos.contiguous(), sin.contiguous(), style=style, impl="triton")
    grads = [layouts(rand(*out.shape, seed=3 + i))[kind] for i, out in enumerate(want)]
    got_grads = torch.autograd.grad(got, strided, grads)
    want_grads = torch.autograd.grad(want, dense, [grad.contiguous() for grad in grads])
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert torch.equal(a, b)
    reference = pk.rope(*dense, cos, sin, style=style, impl="reference")
    torch.testing.assert_close(got, reference, rtol=1e-6, atol=1e-6)


def test_tables_in_float64_are_used_in_float32() -> None:
    q, k = heads(1, 4, 2, 1, 8)
    cos, sin = pk.rope_tables(4, 8, device=DEVICE)
    got = pk.rope(q, k, cos.double(), sin.double(), impl="triton")
    for a, b in zip(got, pk.rope(q, k, cos, sin, impl="triton"), strict=True):
        assert torch.equal(a, b)


def test_one_launch_forward_and_one_backward(launches: Launches) -> None:
    q, k = (t.requires_grad_() for t in heads(2, 5, 4, 2, 8))
    rotated = pk.rope(q, k, *pk.rope_tables(5, 8, device=DEVICE), impl="triton")
    assert len(launches.keywords) == 1
    torch.autograd.grad(rotated, (q, k), [torch.ones_like(out) for out in rotated])
    assert [keywords["NEGATE_SINE"] for keywords in launches.keywords] == [False, True]


@pytest.mark.parametrize("needed", ["q", "k"])
def test_only_the_gradients_asked_for(needed: str, launches: Launches) -> None:
    tensors = dict(zip("qk", heads(2, 5, 4, 2, 8), strict=True))
    tables = pk.rope_tables(5, 8, device=DEVICE)
    every = with_grads(lambda q, k: pk.rope(q, k, *tables, impl="triton"), list(tensors.values()))[2:]
    tensors[needed].requires_grad_()
    rotated = pk.rope(*tensors.values(), *tables, impl="triton")
    torch.autograd.backward(rotated, [rand(*out.shape, seed=7 + i) for i, out in enumerate(rotated)])
    assert {name: t.grad is not None for name, t in tensors.items()} == {"q": needed == "q", "k": needed == "k"}
    assert torch.equal(tensors[needed].grad, dict(zip("qk", every, strict=True))[needed])
    rotated_heads = {launches.keywords[-1]["Q_HEADS"], launches.keywords[-1]["K_HEADS"]}
    assert rotated_heads == {0, 4 if needed == "q" else 2}


def test_an_output_that_is_not_used_costs_no_rotation(launches: Launches) -> None:
    q, k = (t.requires_grad_() for t in heads(1, 3, 2, 1, 4))
    rotated_q, _ = pk.rope(q, k, *pk.rope_tables(3, 4, device=DEVICE), impl="triton")
    rotated_q.sum().backward()
    assert k.grad is None or not k.grad.any()
    assert launches.keywords[-1]["Q_HEADS"] * launches.keywords[-1]["K_HEADS"] == 0


@pytest.mark.parametrize("shape", [(0, 3, 2, 1, 4), (2, 0, 2, 1, 4), (2, 3, 0, 2, 4), (2, 3, 2, 0, 4)])
def test_zero_rows(shape: tuple[int, int, int, int, int]) -> None:
    q, k = (t.requires_grad_() for t in heads(*shape))
    tables = pk.rope_tables(3, 4, device=DEVICE)
    rotated = pk.rope(q, k, *tables, impl="triton")
    (rotated[0].sum() + rotated[1].sum()).backward()
    assert (rotated[0].shape, rotated[1].shape) == (q.shape, k.shape)
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)
    for got, want in zip(rotated, pk.rope(q, k, *tables, impl="reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_backward_twice_has_the_same_bits_and_overwrites_nothing() -> None:
    inputs = [t.requires_grad_() for t in heads(2, 33, 4, 2, 8, torch.bfloat16)]
    upstream = [torch.ones_like(t) for t in inputs]
    before = [t.detach().clone() for t in (*inputs, *upstream)]
    rotated = pk.rope(*inputs, *pk.rope_tables(33, 8, device=DEVICE), impl="triton")
    again = pk.rope(*inputs, *pk.rope_tables(33, 8, device=DEVICE), impl="triton")
    first = torch.autograd.grad(rotated, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(rotated, inputs, upstream)
    for a, b in zip((*rotated, *first, *inputs, *upstream), (*again, *second, *before), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused() -> None:
    q, k = (t.requires_grad_() for t in heads(1, 2, 1, 1, 4))
    rotated, _ = pk.rope(q, k, *pk.rope_tables(2, 4, device=DEVICE), impl="triton")
    upstream = torch.ones_like(rotated, requires_grad=True)
    (grad,) = torch.autograd.grad(rotated, q, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(not interpreting(), reason="a sparse file stands for 8 GiB of memory")
@pytest.mark.parametrize("axis", ["batch", "token", "head"])
def test_offsets_beyond_int32(axis: str, tmp_path: Path) -> None:
    # The view starts in the middle: an offset that wrapped would read zeros below it instead of crashing.
    start, stride = 2**31, 2**30 + 8
    sparse = tmp_path / "sparse"
    storage = torch.from_file(str(sparse), shared=True, size=2**32 + 128, dtype=torch.float16)
    sparse.unlink()  # the mapping keeps it
    strides = {"batch": (stride, 16, 8, 1), "token": (32, stride, 8, 1), "head": (32, 16, stride, 1)}[axis]
    shape = {"batch": (3, 2, 2, 8), "token": (2, 3, 2, 8), "head": (2, 2, 3, 8)}[axis]
    far = storage.as_strided(shape, strides, start)
    far.copy_(rand(*shape))
    tables = pk.rope_tables(3, 8)
    got = pk.rope(far, far, *tables, impl="triton")
    want = pk.rope(far.contiguous(), far.contiguous(), *tables, impl="triton")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_a_dtype_without_arithmetic_is_refused() -> None:
    q, k = (t.to(torch.float8_e5m2) for t in heads(1, 2, 1, 1, 4))
    with pytest.raises(ValueError, match="rope: q: expected float32, bfloat16, float16 or float64, got"):
        pk.rope(q, k, *pk.rope_tables(2, 4, device=DEVICE), impl="triton")


@pytest.mark.parametrize("needed", ["q", "k", "qk"])
@pytest.mark.parametrize("style", STYLES)
def test_traces_as_one_graph(style: str, needed: str) -> None:
    tables = pk.rope_tables(6, 8, device=DEVICE)
    q, k = heads(2, 6, 4, 2, 8)
    inputs = [t.requires_grad_() for name, t in (("q", q), ("k", k)) if name in needed]

    def mixed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rotated_q, rotated_k = pk.rope(q * 2, k, *tables, style=style, impl="triton")
        return (rotated_q.sin() @ rotated_k.transpose(-1, -2)).sum()

    eager, traced = mixed(q, k), torch.compile(mixed, backend="aot_eager", fullgraph=True)(q, k)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced, inputs), torch.autograd.grad(eager, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_registered_ops_pass_opcheck() -> None:
    q, k = heads(2, 3, 4, 2, 8)
    cos, sin = pk.rope_tables(3, 8, device=DEVICE)
    strided = layouts(q)["heads_first"].detach().requires_grad_()
    ops = torch.ops.pico_kernels
    torch.library.opcheck(ops.rope.default, (q.requires_grad_(), k.requires_grad_(), cos, sin, "interleaved"))
    torch.library.opcheck(ops.rope.default, (strided, k.detach(), cos, sin, "half"))
    torch.library.opcheck(ops.rope_rotate.default, ([q.detach()], cos, sin, "half", True))


@pytest.mark.parametrize("shape", PICO_SHAPES, ids=lambda shape: shape.name)
def test_ahead_of_time_cases_are_what_is_launched(shape: Any, launches: Launches) -> None:
    cases = {case.name: case for case in rope_triton.aot_cases(shape)}
    inputs = [t.requires_grad_() for t in heads(1, 2, shape.n_heads, shape.n_kv_heads, shape.head_dim, torch.bfloat16)]
    rotated = pk.rope(*inputs, *pk.rope_tables(2, shape.head_dim, device=DEVICE), impl="triton")
    torch.autograd.grad(rotated, inputs, [torch.ones_like(t) for t in rotated])
    for keywords, direction in zip(launches.keywords, ("forward", "backward"), strict=True):
        case = cases[f"rope_{direction}_interleaved-bf16"]
        assert set(case.signature) == set(launches.kernel.arg_names)
        assert case.constexprs.items() <= keywords.items()
        assert case.num_warps == keywords["num_warps"]


@pytest.mark.parametrize("heads_and_dim", [(12, 4, 8), (12, 4, 128), (7, 7, 8), (1, 1, 256), (6, 2, 96), (0, 4, 64)])
def test_tiles_cover_the_heads_exactly(heads_and_dim: tuple[int, int, int]) -> None:
    n_heads, kv_heads, dim = heads_and_dim
    config = rope_triton.rope_config(n_heads, kv_heads, dim, 2)
    assert n_heads % config.block_heads == kv_heads % config.block_heads == 0
    assert dim <= 2 * config.block_pairs < 2 * dim
    assert config.block_tokens * config.block_heads * 2 * config.block_pairs == 1024
