"""RMSNorm on Triton, interpreted: accuracy against float64, layouts, partitions, int64 offsets, tracing, messages."""

import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pico_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico_kernels import _rms_norm_kernels as kernels
from pico_kernels import rms_norm_triton
from pico_kernels._triton import PICO_SHAPES, as_rows, triton_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts on the interpreter")


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, impl: str = "triton") -> torch.Tensor:
    return pk.rms_norm(x, weight, eps, impl=impl)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, impl: str = "triton"
) -> tuple[torch.Tensor, torch.Tensor]:
    return pk.add_rms_norm(x, residual, weight, eps, impl=impl)


def outputs_and_grads(call: Callable, inputs: list[torch.Tensor], impl: str) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves, impl=impl)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [rand(*out.shape, seed=7 + i).to(out.dtype) for i, out in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


def rounding_slack(x: torch.Tensor, weight: torch.Tensor) -> float:
    """float32 rounding before a cancellation (the gradient of x vanishes at d = 1) and of a sum over rows.

    Unavoidable, but the reference's own error in one or two columns may be smaller by luck.
    """
    rows = x.flatten(0, -2).double()
    inverse_rms = rows.square().mean(-1).add(1e-6).rsqrt().max()
    gradient = 5.0  # of standard normal numbers
    largest = gradient * max(weight.abs().max().item() * inverse_rms.item(), len(rows) ** 0.5)
    return 4 * torch.finfo(torch.float32).eps * largest


def assert_flash_rule(call: Callable, inputs: list[torch.Tensor]) -> None:
    """Error against float64 at most twice the reference's own error in this dtype, plus one output ulp."""
    slack = rounding_slack(sum(inputs[:-1]), inputs[-1])
    truth = outputs_and_grads(call, [t.double() for t in inputs], "reference")
    plain = outputs_and_grads(call, inputs, "reference")
    ours = outputs_and_grads(call, inputs, "triton")
    for index, (want, base, got) in enumerate(zip(truth, plain, ours, strict=True)):
        assert got.dtype == base.dtype
        assert got.shape == base.shape
        ulp = torch.finfo(got.dtype).eps * want.abs().max().clamp(min=1e-3)
        bound = 2 * (base.double() - want).abs().max() + ulp + slack
        assert (got.double() - want).abs().max() <= bound, f"output {index}"


def assert_both_accurate(rows: tuple[int, ...], d: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, residual = rand(*rows, d, dtype=dtype), rand(*rows, d, dtype=dtype, seed=1)
    weight = rand(d, dtype=weight_dtype, seed=2)
    assert_flash_rule(norm, [x, weight])
    assert_flash_rule(add_norm, [x, residual, weight])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 70),
    d=st.one_of(st.integers(1, 40), st.sampled_from([96, 131, 384, 768, 1000, 1536])),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
)
def test_accuracy(rows: int, d: int, dtype: torch.dtype, same: bool) -> None:
    assert_both_accurate((rows,), d, dtype, dtype if same else torch.float32)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code of very wide rows and of many rows a program, at sizes the interpreter can do."""
    values = {"_FORWARD_HELD": 64, "_BACKWARD_HELD": 64, "_WIDE_BLOCK": 32, "_PARTITIONS": 3, "_WIDE_PARTITIONS": 2}
    for name, value in values.items():
        monkeypatch.setattr(kernels, name, value)
    caches = (kernels.forward_config, kernels.backward_config)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("small_limits", "nan_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [((7,), 131), ((1,), 96), ((2, 3), 128), ((300,), 40)])
def test_accuracy_of_wide_rows_and_of_many_tiles_a_program(rows: tuple[int, ...], d: int, dtype: torch.dtype) -> None:
    config = kernels.backward_config(d, dtype.itemsize)
    assert config.held == (d == 40)
    assert kernels.partitions(300, config) == (3 if d == 40 else 2)
    assert_both_accurate(rows, d, dtype, torch.float32)


def test_the_widest_row() -> None:
    assert_both_accurate((1,), 65536, torch.bfloat16, torch.float32)


def test_rounding_points_in_bfloat16_are_the_twins() -> None:
    x, residual = rand(64, 96, dtype=torch.bfloat16), rand(64, 96, dtype=torch.bfloat16, seed=1)
    weight = rand(96, seed=2)
    ours, twin = norm(x, weight), norm(x, weight, impl="reference")
    assert (ours != twin).float().mean() < 0.01  # ties that another order of the sum of squares moves
    normed, total = add_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(total, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_gradient_of_a_row_is_the_gradient_times_the_rounded_row(dtype: torch.dtype) -> None:
    x, grad, weight = rand(1, 96, dtype=dtype), rand(1, 96, dtype=dtype, seed=1), torch.ones(96, device=DEVICE)
    rounded = norm(x, weight).float()
    got = torch.autograd.grad(norm(x, weight.requires_grad_()), weight, grad)[0]
    assert torch.equal(got, grad[0].float() * rounded[0])


def test_gradcheck() -> None:
    x, residual, weight = (t.double().requires_grad_() for t in (rand(3, 5), rand(3, 5, seed=1), rand(5, seed=2)))
    assert torch.autograd.gradcheck(norm, (x, weight))
    assert torch.autograd.gradcheck(add_norm, (x, residual, weight))


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The shape of ``x``: expanded in the first and in the middle dimension, transposed, every second, sliced."""
    spread = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    spread[..., 1::2] = x
    sliced = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    sliced[..., 1:-2] = x
    return [
        x[:1].expand_as(x),
        x[:, :1].expand_as(x),
        x.transpose(0, -1).contiguous().transpose(0, -1),
        spread[..., 1::2],
        sliced[..., 1:-2],
    ]


@pytest.mark.parametrize("index", range(5))
def test_any_layout_of_inputs_and_gradients(index: int) -> None:
    def strided_tensor(seed: int) -> torch.Tensor:  # no two tensors of a call share a layout
        return layouts(rand(4, 3, 40, seed=seed))[(index + seed) % 5].detach()

    x, residual = strided_tensor(0).requires_grad_(), strided_tensor(1).requires_grad_()
    weight = layouts(rand(3, 1, 40, seed=2))[index].detach()[0, 0].requires_grad_()
    grads = [strided_tensor(3), strided_tensor(4)]
    strided = (x, residual, weight)
    dense = tuple(t.detach().contiguous().requires_grad_() for t in strided)
    got, want = add_norm(*strided), add_norm(*dense)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    expected = torch.autograd.grad(want, dense, [g.contiguous() for g in grads])
    for a, b in zip(torch.autograd.grad(got, strided, grads), expected, strict=True):
        assert torch.equal(a, b)


def test_rows_are_a_view_where_one_stride_describes_them() -> None:
    x = rand(4, 6)
    for view in (x, x[:, 1:5], x[::2], x[:1].expand(4, 6), x[:, :1]):
        rows = as_rows(view)
        assert rows.data_ptr() == view.data_ptr()
        assert torch.equal(rows, view)
    assert as_rows(x.T).stride() == (4, 1)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_zero_rows(shape: tuple[int, ...]) -> None:
    x, weight = rand(*shape).requires_grad_(), rand(8).requires_grad_()
    out = norm(x, weight)
    normed, total = add_norm(x, x.detach(), weight)
    assert out.shape == normed.shape == total.shape == shape
    grads = torch.autograd.grad((out, normed), (x, weight), (out, normed))
    assert grads[0].shape == shape
    assert torch.equal(grads[1], torch.zeros_like(weight))


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_only_the_gradients_asked_for_of_the_outputs_used(needed: tuple[int, ...], used: tuple[int, ...]) -> None:
    inputs = [rand(5, 40), rand(5, 40, seed=1), rand(40, seed=2)]
    results = []
    for impl in ("torch", "triton"):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        outputs = add_norm(*leaves, impl=impl)
        chosen = [outputs[i] for i in used]
        if any(out.requires_grad for out in chosen):
            torch.autograd.backward(
                [out for out in chosen if out.requires_grad],
                [rand(5, 40, seed=5 + i) for i, out in zip(used, chosen, strict=True) if out.requires_grad],
            )
        results.append([t.grad for t in leaves])
    for index, (want, got) in enumerate(zip(*results, strict=True)):
        if got is not None:
            assert index in needed
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-5, atol=1e-6)
        else:
            assert want is None


def test_weight_gradient_alone_of_rms_norm() -> None:
    x, weight = rand(5, 40), rand(40, seed=1).requires_grad_()
    got, want = (torch.autograd.grad(norm(x, weight, impl=impl).sum(), weight)[0] for impl in ("triton", "torch"))
    torch.testing.assert_close(got, want)


def test_backward_twice_gives_the_same_bits_and_overwrites_nothing() -> None:
    x, residual = (rand(70, 96, seed=s).requires_grad_() for s in (0, 1))
    weight = rand(96, seed=2).requires_grad_()
    grads = [rand(70, 96, seed=3), rand(70, 96, seed=4)]
    watched = [x, residual, weight, *grads]
    before = [t.detach().clone() for t in watched]
    outputs = add_norm(x, residual, weight)
    first = torch.autograd.grad(outputs, (x, residual, weight), grads, retain_graph=True)
    second = torch.autograd.grad(outputs, (x, residual, weight), grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a.detach(), b) for a, b in zip(watched, before, strict=True))


def test_pico_rows_are_cut_without_padding_and_share_a_program() -> None:
    cuts = {s.d_model: kernels.backward_config(s.d_model, 2) for s in PICO_SHAPES}
    assert {d: (c.rows, c.block, c.steps) for d, c in cuts.items()} == {
        96: (32, 32, 3),
        384: (8, 128, 3),
        768: (4, 256, 3),
        1536: (2, 512, 3),
    }
    assert [kernels.partitions(rows, cuts[1536]) for rows in (1, 100, 16384, 65536)] == [1, 50, 512, 512]


@interpreted
def test_offsets_beyond_int32() -> None:
    """Three rows 2**30 elements apart in untouched memory; a wrapped offset would reach 4 GiB before the first row."""
    stride, columns, half = 2**30, 4, 2 * 2**31
    memory = mmap.mmap(-1, 2 * half + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE

    def row(index: int, part: int) -> torch.Tensor:
        return torch.frombuffer(memory, dtype=torch.float16, count=4, offset=half + 2 * index * stride + 64 * part)

    weight, rstd, partial = rand(columns), torch.zeros(4), torch.zeros(columns)
    x, grad, out, grad_x = ([row(index, part) for index in range(3)] for part in range(4))
    for index in range(3):
        x[index].copy_(rand(columns, seed=index))
        grad[index].copy_(rand(columns, seed=10 + index))
    cut = {"D": stride, "ROWS": 4, "BLOCK": columns, "STEPS": 1}
    kernels.rms_norm_forward[(1,)](
        x[0], x[0], weight, out[0], out[0], rstd, 3, stride, stride, EPS=1.0, ADD=False, HELD=True, **cut
    )
    kernels.rms_norm_backward[(1,)](
        *(grad[0], grad[0], x[0], weight, rstd, grad_x[0], partial, 3, stride, stride, stride),
        **cut,
        NEED_X=True,
        NEED_WEIGHT=True,
        HAS_TOTAL=False,
        STAGES=1,
    )
    for index in range(3):
        wide = x[index].float()
        torch.testing.assert_close(rstd[index], torch.rsqrt(wide.square().sum() / stride + 1))
        torch.testing.assert_close(out[index], ((wide * rstd[index]).half() * weight).half())
        torch.testing.assert_close(grad_x[index], (grad[index] * weight * rstd[index]).half(), rtol=2e-3, atol=1e-4)
    want = sum(g.float() * (a.float() * r).half().float() for g, a, r in zip(grad, x, rstd, strict=False))
    torch.testing.assert_close(partial, want)


def both(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (norm(x, weight), *add_norm(x, residual, weight))


def test_traces_as_one_graph_with_the_registered_ops() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(str(graph.code))
        return graph.forward

    inputs = [rand(6, 40).requires_grad_(), rand(6, 40, seed=1).requires_grad_(), rand(40, seed=2).requires_grad_()]
    eager = both(*inputs)
    seeds = [rand(6, 40, seed=5 + i) for i in range(3)]
    expected = torch.autograd.grad(eager, inputs, seeds)
    torch.compile(both, backend=backend, fullgraph=True)(*inputs)
    assert "pico_kernels.rms_norm" in graphs[0]
    assert "pico_kernels.add_rms_norm" in graphs[0]
    traced = torch.compile(both, backend="aot_eager", fullgraph=True)(*inputs)
    for a, b in zip(traced, eager, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(traced, inputs, seeds), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    x, weight = rand(2, 5, 12).transpose(0, 1), rand(12, seed=1)
    ops = torch.ops.pico_kernels
    leaves = [t.clone().requires_grad_() for t in (x, x, weight)]
    torch.library.opcheck(ops.rms_norm.default, (leaves[0], leaves[2], 1e-6))
    torch.library.opcheck(ops.add_rms_norm.default, (*leaves, 1e-6))
    _, rstd = ops.rms_norm(x, weight, 1e-6)
    for total, need_x, need_weight in ((None, True, True), (x, True, False), (None, False, True)):
        torch.library.opcheck(ops.rms_norm_backward.default, (x, total, x, weight, rstd, need_x, need_weight))


def test_aot_cases_name_every_argument() -> None:
    for shape in PICO_SHAPES:
        cases = rms_norm_triton.aot_cases(shape)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            constexprs = [name for name, kind in case.signature.items() if kind == "constexpr"]
            assert sorted(constexprs) == sorted(case.constexprs)
            assert list(case.signature) == case.kernel.arg_names


def test_a_wrong_dtype_is_an_error() -> None:
    x = rand(2, 16).to(torch.float8_e4m3fn)
    message = "rms_norm: x: expected float32, bfloat16, float16 or float64, got torch.float8_e4m3fn"
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.rms_norm(x, rand(16), impl="triton")


@interpreted
def test_asking_for_triton_where_it_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_problem("cpu") is None
    monkeypatch.delenv("TRITON_INTERPRET")
    for device, reason in (("cpu", "the device is cpu"), ("cuda", "PyTorch finds no GPU")):
        with pytest.raises(
            ValueError, match=rf"rms_norm: .*Triton kernels need a GPU, or TRITON_INTERPRET=1.*{reason}"
        ):
            pk.KernelSet.from_config({"rms_norm": "triton"}, device)
    assert pk.KernelSet.from_config(device="cuda").describe()["rms_norm"] == "torch"


def test_triton_is_imported_late_and_may_be_missing() -> None:
    code = (
        "import sys, torch, pico_kernels as pk; pk.rms_norm(torch.ones(2, 4), torch.ones(4))\n"
        "assert 'triton' not in sys.modules\n"
        "sys.modules['triton'] = None\n"
        "assert pk.KernelSet.from_config().describe()['rms_norm'] == 'torch'\n"
        "try: pk.rms_norm(torch.ones(2, 4), torch.ones(4), impl='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "rms_norm: implementation 'triton' cannot run: Triton cannot be imported" in done.stdout

    late = (
        "import triton, os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from pico_kernels._triton import triton_problem; print(triton_problem())"
    )
    environment.pop("TRITON_INTERPRET")
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, check=True, env=environment)
    assert "TRITON_INTERPRET was set after Triton had been imported" in done.stdout
