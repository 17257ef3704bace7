"""SwiGLU in Triton: float64 accuracy, layouts, launches, gradients asked for, int64 offsets, tracing.

Runs on a GPU where there is one, else in Triton's interpreter (see conftest.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico_kernels as pk
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico_kernels import swiglu_triton
from pico_kernels._triton import PICO_SHAPES, interpreting
from torch.nn import functional

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gate_and_up(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    return [(rand(*shape) * scale).to(dtype), rand(*shape, dtype=dtype, seed=1)]


def with_grads(call: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, rand(*out.shape, seed=7).to(out.dtype))]


def run(impl: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return with_grads(lambda gate, up: pk.swiglu(gate, up, impl=impl), inputs)


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
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    recorders = {}
    for direction in ("forward", "backward"):
        recorders[direction] = Launches(getattr(swiglu_triton, f"swiglu_{direction}_kernel"))
        monkeypatch.setattr(swiglu_triton, f"swiglu_{direction}_kernel", recorders[direction])
    return recorders


def assert_flash_rule(inputs: list[torch.Tensor]) -> None:
    """Error against float64 at most twice the reference's own error in this dtype, plus one output ulp."""
    truth = run("reference", [t.double() for t in inputs])
    for want, base, got in zip(truth, run("reference", inputs), run("triton", inputs), strict=True):
        assert got.dtype == base.dtype
        assert got.shape == want.shape
        ulp = torch.finfo(got.dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= 2 * (base.double() - want).abs().max() + ulp


@pytest.mark.usefixtures("nan_poisoned")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 7), max_size=3),
    hidden=st.one_of(st.integers(1, 40), st.sampled_from([128, 384, 513, 1536, 4100])),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    packed=st.booleans(),
)
def test_accuracy(shape: list[int], hidden: int, dtype: torch.dtype, scale: float, packed: bool) -> None:
    gate, up = gate_and_up(*shape, hidden, dtype=dtype, scale=scale)
    if packed:
        gate, up = torch.cat([gate, up], -1).split(hidden, -1)
    assert_flash_rule([gate, up])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
def test_numbers_that_overflow_the_exponential() -> None:
    gate = torch.tensor([-200.0, -88.8, 0.0, 88.8, 200.0, 3e38], device=DEVICE)
    up = torch.full_like(gate, 0.5)
    for got, want in zip(run("triton", [gate, up]), run("reference", [gate, up]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_where_the_twin_does(dtype: torch.dtype) -> None:
    """All but the few values that another exponential rounds the other way; a rounding left out moves about a tenth."""
    gate, up = gate_and_up(4000, dtype=dtype)
    grad = rand(4000, seed=7).to(dtype)
    out, grad_gate, grad_up = run("triton", [gate, up])
    sigmoid = torch.sigmoid(gate.float())
    expected = {
        "out": functional.silu(gate) * up,
        "grad_gate": ((grad * up).float() * sigmoid * (1 + gate.float() * (1 - sigmoid))).to(dtype),
        "grad_up": grad * functional.silu(gate),
    }
    for got, (name, want) in zip((out, grad_gate, grad_up), expected.items(), strict=True):
        assert (got != want).double().mean() <= 0.005, name


def test_gradcheck() -> None:
    inputs = [t.double().requires_grad_() for t in gate_and_up(3, 5)]
    assert torch.autograd.gradcheck(lambda gate, up: pk.swiglu(gate, up, impl="triton"), inputs)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the shape of ``x`` and other strides."""
    every_second = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    every_second[..., 1::2] = x
    packed = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    packed[..., 1:-2] = x
    return {
        "rows_expanded": x[:1].expand_as(x),
        "all_expanded": x[:1, :1, :1].expand_as(x),
        "middle_expanded": x[:, :1].expand_as(x),
        "rows_swapped": x.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "every_second": every_second[..., 1::2],
        "packed": packed[..., 1:-2],
    }


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("where", ["gate", "up", "grad", "all"])
@pytest.mark.parametrize("kind", list(layouts(torch.zeros(1, 1, 1))))
def test_any_layout_of_inputs_and_gradient(kind: str, where: str) -> None:
    tensors = [rand(3, 5, 9, seed=i) for i in range(3)]
    strided = [
        layouts(t)[kind] if where in (name, "all") else t
        for name, t in zip(("gate", "up", "grad"), tensors, strict=True)
    ]
    dense = [t.contiguous() for t in strided]
    results = []
    for gate, up, grad in (strided, dense):
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        out = pk.swiglu(*leaves, impl="triton")
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert not results[0][0].isnan().any()
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_one_launch_forward_and_one_backward(launches: dict[str, Launches]) -> None:
    run("triton", gate_and_up(4, 8))
    assert [len(recorder.keywords) for recorder in launches.values()] == [1, 1]


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradients_asked_for(needed: int, launches: dict[str, Launches]) -> None:
    inputs = gate_and_up(4, 8)
    every = run("triton", inputs)[1:]
    inputs[needed].requires_grad_()
    out = pk.swiglu(*inputs, impl="triton")
    out.backward(rand(*out.shape, seed=7))
    assert inputs[1 - needed].grad is None
    assert torch.equal(inputs[needed].grad, every[needed])
    keywords = launches["backward"].keywords[-1]
    assert (keywords["GATE"], keywords["UP"]) == (needed == 0, needed == 1)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)])
def test_zero_rows(shape: tuple[int, ...]) -> None:
    gate, up = (t.requires_grad_() for t in gate_and_up(*shape))
    out = pk.swiglu(gate, up, impl="triton")
    out.sum().backward()
    assert out.shape == gate.grad.shape == up.grad.shape == shape


def test_a_scalar() -> None:
    assert_flash_rule(gate_and_up())


def test_the_same_tensor_twice() -> None:
    x = rand(3, 8).requires_grad_()
    (got,) = torch.autograd.grad(pk.swiglu(x, x, impl="triton").sum(), x)
    (want,) = torch.autograd.grad(pk.swiglu(x, x, impl="reference").sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_backward_twice_has_the_same_bits_and_overwrites_nothing() -> None:
    inputs = [t.requires_grad_() for t in gate_and_up(9, 300, dtype=torch.bfloat16)]
    upstream = rand(9, 300, dtype=torch.bfloat16, seed=2)
    before = [t.detach().clone() for t in (*inputs, upstream)]
    out, again = (pk.swiglu(*inputs, impl="triton") for _ in range(2))
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream)
    for a, b in zip((out, *first, *inputs, upstream), (again, *second, *before), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused() -> None:
    gate, up = (t.requires_grad_() for t in gate_and_up(2, 4))
    out = pk.swiglu(gate, up, impl="triton")
    upstream = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, gate, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(not interpreting(), reason="a sparse file stands for 8 GiB of memory")
@pytest.mark.parametrize("index", range(3))
def test_offsets_beyond_int32(index: int, tmp_path: Path) -> None:
    # The view starts in the middle: an offset that wrapped would read zeros below it instead of crashing.
    start, stride = 2**31, 2**30 + 8
    sparse = tmp_path / "sparse"
    storage = torch.from_file(str(sparse), shared=True, size=2**32 + 128, dtype=torch.float16)
    sparse.unlink()  # the mapping keeps it
    far = storage.as_strided((3, 8), (stride, 1), start)
    far.copy_(rand(3, 8))
    results = []
    for tensor in (far, far.contiguous()):
        gate, up, grad = (tensor if i == index else rand(3, 8, seed=i + 3).half() for i in range(3))
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        out = pk.swiglu(*leaves, impl="triton")
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_a_dtype_without_arithmetic_is_refused() -> None:
    gate, up = (t.to(torch.float8_e5m2) for t in gate_and_up(2, 4))
    with pytest.raises(ValueError, match="swiglu: gate: expected float32, bfloat16, float16 or float64, got"):
        pk.swiglu(gate, up, impl="triton")


@triton.jit
def columns_of_last_program(out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0) + (columns - 1) // COLUMNS
    _, column, mask = swiglu_triton._tile(program, rows, columns, ROWS, COLUMNS)
    tl.store(out_ptr + tl.arange(0, COLUMNS)[None, :], tl.where(mask, column, -1))


def test_a_flat_vector_longer_than_int32() -> None:
    columns, block = 2**31 + 5, 16
    out = torch.zeros(block, dtype=torch.int64, device=DEVICE)
    columns_of_last_program[(1,)](out, 1, columns, 1, block)
    assert out.tolist() == [2**31 + i if i < 5 else -1 for i in range(block)]


@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1)])
def test_traces_as_one_graph(needed: tuple[int, ...]) -> None:
    inputs = gate_and_up(2, 3, 8)
    leaves = [inputs[index].requires_grad_() for index in needed]

    def mixed(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (pk.swiglu(gate * 2, up.transpose(0, 1).contiguous().transpose(0, 1), impl="triton").sin()).sum()

    eager, traced = mixed(*inputs), torch.compile(mixed, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_registered_ops_pass_opcheck() -> None:
    gate, up = (t.requires_grad_() for t in gate_and_up(2, 3, 8))
    ops = torch.ops.pico_kernels
    torch.library.opcheck(ops.swiglu.default, (gate, up))
    torch.library.opcheck(ops.swiglu.default, (layouts(gate)["packed"].detach().requires_grad_(), up.detach()))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.swiglu_backward.default, (up.detach(), gate.detach(), up.detach(), *needs))


@pytest.mark.parametrize("shape", PICO_SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_ahead_of_time_cases_are_what_is_launched(layout: str, shape: Any, launches: dict[str, Launches]) -> None:
    cases = {case.name: case for case in swiglu_triton.aot_cases(shape)}
    gate, up = gate_and_up(2, shape.hidden, dtype=torch.bfloat16)
    if layout == "rows":
        gate, up = torch.cat([gate, up], -1).split(shape.hidden, -1)
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    out = pk.swiglu(*leaves, impl="triton")
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    for direction, recorder in launches.items():
        (keywords,) = recorder.keywords
        case = cases[f"swiglu_{direction}_{layout}-bf16"]
        constants = {name: value for name, value in case.constexprs.items() if name != "rows"}
        assert set(case.signature) == set(recorder.kernel.arg_names)
        assert constants.items() <= keywords.items()
        assert case.num_warps == keywords["num_warps"]


@pytest.mark.parametrize("columns", [1, 7, 128, 384, 513, 1536, 3072, 6144])
def test_tiles_of_rows(columns: int) -> None:
    config = swiglu_triton.swiglu_config(64, columns, 2)
    assert config.block_rows * config.block_columns == 2048
    if columns in {shape.hidden for shape in PICO_SHAPES}:
        assert columns % config.block_columns == 0
