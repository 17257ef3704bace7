"""RMSNorm, RoPE and SwiGLU: `torch` against the float64 reference, gradients, layouts, messages."""

import re
from collections.abc import Callable

import pico_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = ["reference", "torch"]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs_and_grads(call: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [rand(*out.shape, seed=7 + i).to(out.dtype) for i, out in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


def assert_flash_rule(call: Callable, inputs: list[torch.Tensor], narrow: list[int] | None = None) -> None:
    """Error against float64 at most twice the reference's own error in this dtype, plus one output ulp."""
    wide = [t.double() for t in inputs]
    truth = outputs_and_grads(lambda *a: call(*a, impl="reference"), wide)
    plain = outputs_and_grads(lambda *a: call(*a, impl="reference"), inputs)
    ours = outputs_and_grads(lambda *a: call(*a, impl="torch"), inputs)
    for index, (want, base, got) in enumerate(zip(truth, plain, ours, strict=True)):
        assert got.dtype == base.dtype
        assert got.shape == base.shape
        ulp = torch.finfo(got.dtype).eps * want.abs().max().clamp(min=1e-3)
        bound = 2 * (base.double() - want).abs().max() + ulp
        assert (got.double() - want).abs().max() <= bound, f"output {index}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 96), (7, 131), (2, 1536)])
def test_rms_norm_accuracy(dtype: torch.dtype, weight_dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    inputs = [rand(*shape, dtype=dtype), rand(shape[-1], seed=1, dtype=weight_dtype or dtype)]
    assert_flash_rule(pk.rms_norm, inputs)
    assert_flash_rule(pk.add_rms_norm, [inputs[0], rand(*shape, dtype=dtype, seed=2), inputs[1]])


def test_rms_norm_rounds_before_the_weight_and_once_after() -> None:
    x, weight = rand(64, 96, dtype=torch.bfloat16), rand(96, seed=1)
    normalised = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    expected = (normalised.float() * weight).bfloat16()
    for impl in IMPLEMENTATIONS:
        assert torch.equal(pk.rms_norm(x, weight, impl=impl), expected)


def test_rms_norm_in_float32_is_picos_formula_exactly() -> None:
    x, weight = rand(8, 96), rand(96, seed=1)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    for impl in IMPLEMENTATIONS:
        assert torch.equal(pk.rms_norm(x, weight, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_equals_the_two_ops_apart(dtype: torch.dtype, impl: str) -> None:
    x, residual, weight = rand(9, 33, dtype=dtype), rand(9, 33, dtype=dtype, seed=1), rand(33, seed=2)
    normed, total = pk.add_rms_norm(x, residual, weight, impl=impl)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, pk.rms_norm(x + residual, weight, impl=impl))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 4, 513)])
def test_swiglu_accuracy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_flash_rule(pk.swiglu, [rand(*shape, dtype=dtype) * 4, rand(*shape, dtype=dtype, seed=1)])


def test_swiglu_rounds_as_silu_times_up() -> None:
    gate, up = rand(1000, dtype=torch.bfloat16), rand(1000, dtype=torch.bfloat16, seed=1)
    expected = torch.nn.functional.silu(gate) * up
    for impl in IMPLEMENTATIONS:
        assert torch.equal(pk.swiglu(gate, up, impl=impl), expected)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    seq_len=st.integers(1, 17),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half_dim=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    style=st.sampled_from(["interleaved", "half"]),
)
def test_rope_accuracy(
    batch: int, seq_len: int, kv_heads: int, group: int, half_dim: int, dtype: torch.dtype, style: str
) -> None:
    q = rand(batch, seq_len, kv_heads * group, 2 * half_dim, dtype=dtype)
    k = rand(batch, seq_len, kv_heads, 2 * half_dim, dtype=dtype, seed=1)
    cos, sin = pk.rope_tables(seq_len + 3, 2 * half_dim)
    assert_flash_rule(lambda q, k, impl: pk.rope(q, k, cos, sin, style=style, impl=impl), [q, k])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rope_interleaved_is_complex_multiplication_as_in_pico(impl: str) -> None:
    q, k = rand(2, 11, 3, 8), rand(2, 11, 1, 8, seed=1)
    angles = torch.outer(torch.arange(11).float(), 1.0 / (10000.0 ** (torch.arange(0, 8, 2)[:4].float() / 8)))
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
    cos, sin = pk.rope_tables(11, 8)
    for x, got in zip((q, k), pk.rope(q, k, cos, sin, impl=impl), strict=True):
        expected = torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:-1], 4, 2)) * rotation).flatten(3)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rope_styles_differ_by_a_permutation_of_features(impl: str) -> None:
    q, k = rand(1, 5, 2, 8), rand(1, 5, 1, 8, seed=1)
    cos, sin = pk.rope_tables(5, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    interleaved, _ = pk.rope(q, k, cos, sin, style="interleaved", impl=impl)
    half, _ = pk.rope(q[..., order], k[..., order], cos, sin, style="half", impl=impl)
    torch.testing.assert_close(half, interleaved[..., order], rtol=1e-6, atol=1e-6)


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one shape whose strides are expanded, transposed, sliced, offset by one element."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    wide[..., 1::2] = x
    sliced = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    sliced[..., 1:-2] = x
    return [x[:1].expand_as(x), x.transpose(0, -1).contiguous().transpose(0, -1), wide[..., 1::2], sliced[..., 1:-2]]


@pytest.mark.parametrize("index", range(4))
def test_any_layout_of_inputs_and_gradients(index: int) -> None:
    x, y, weight = rand(4, 6, 3, 8), rand(4, 6, 3, 8, seed=1), rand(8, seed=2)
    cos, sin = pk.rope_tables(6, 8)
    calls = {
        "rms_norm": lambda a, b: pk.rms_norm(a, weight, impl="torch"),
        "add_rms_norm": lambda a, b: pk.add_rms_norm(a, b, weight, impl="torch")[0],
        "swiglu": lambda a, b: pk.swiglu(a, b, impl="torch"),
        "rope": lambda a, b: torch.cat(pk.rope(a, b, cos, sin, impl="torch")),
    }
    for name, call in calls.items():
        strided = [layouts(t)[index].detach().requires_grad_() for t in (x, y)]
        dense = [t.detach().contiguous().requires_grad_() for t in strided]
        want, got = call(*dense), call(*strided)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=name)  # strided loops are not vectorised
        upstream = rand(*want.shape, seed=3)
        grad = layouts(upstream)[index]
        want_grads = torch.autograd.grad(want, dense, grad.contiguous(), allow_unused=True)
        for a, b in zip(torch.autograd.grad(got, strided, grad, allow_unused=True), want_grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zero_rows(impl: str) -> None:
    x, weight = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    pk.rms_norm(x, weight, impl=impl).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    assert x.grad.shape == (0, 8)
    assert pk.swiglu(torch.empty(0, 8), torch.empty(0, 8), impl=impl).shape == (0, 8)
    q, k = torch.empty(0, 3, 2, 4), torch.empty(0, 3, 1, 4)
    assert [t.shape for t in pk.rope(q, k, *pk.rope_tables(3, 4), impl=impl)] == [q.shape, k.shape]


def test_only_the_gradients_asked_for() -> None:
    x, weight = rand(4, 8), rand(8, seed=1)
    pk.rms_norm(x, weight.requires_grad_(), impl="torch").sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    gate, up = rand(4, 8).requires_grad_(), rand(4, 8, seed=1)
    pk.swiglu(gate, up, impl="torch").sum().backward()
    assert gate.grad is not None
    q, k = rand(1, 3, 2, 4), rand(1, 3, 1, 4, seed=1).requires_grad_()
    rotated_q, rotated_k = pk.rope(q, k, *pk.rope_tables(3, 4), impl="torch")
    (rotated_q.sum() + rotated_k.sum()).backward()
    assert q.grad is None
    assert k.grad is not None


def test_backward_twice_gives_the_same_and_leaves_inputs_alone() -> None:
    x, weight = rand(4, 8).requires_grad_(), rand(8, seed=1).requires_grad_()
    before = x.detach().clone()
    upstream = rand(4, 8, seed=2)
    kept = upstream.clone()
    for out in (pk.rms_norm(x, weight, impl="torch"), pk.swiglu(x, x * 2, impl="torch")):
        first = torch.autograd.grad(out, x, upstream, retain_graph=True)
        second = torch.autograd.grad(out, x, upstream)
        assert torch.equal(first[0], second[0])
    assert torch.equal(upstream, kept)
    assert torch.equal(x.detach(), before)


X = torch.zeros(2, 8)
Q, K = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 8)
COS, SIN = pk.rope_tables(4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.rms_norm(X, torch.ones(7)), "rms_norm: weight: expected shape (8,), got shape (7,)"),
        (
            lambda: pk.rms_norm(X.int(), torch.ones(8)),
            "rms_norm: x: expected float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (lambda: pk.rms_norm(X, torch.ones(8, device="meta")), "weight: expected the device of x (cpu), got meta"),
        (lambda: pk.rms_norm(X, torch.ones(8), impl="cuda"), "no implementation 'cuda'; it has auto, reference,"),
        (lambda: pk.add_rms_norm(X, X[:1], torch.ones(8)), "residual: expected shape (2, 8), got shape (1, 8)"),
        (lambda: pk.add_rms_norm(X, X.half(), torch.ones(8)), "residual: expected the dtype of x (torch.float32)"),
        (lambda: pk.swiglu(X, X[:, :4]), "swiglu: up: expected shape (2, 8), got shape (2, 4)"),
        (lambda: pk.swiglu(X, X.half()), "swiglu: up: expected the dtype of gate (torch.float32), got torch.float16"),
        (lambda: pk.swiglu(X, X, impl="tritn"), "it has auto, reference, torch"),
        (lambda: pk.rope(Q[..., :7], K, COS, SIN), "rope: q: expected an even head dimension, got 7"),
        (lambda: pk.rope(Q, K[:, :3], COS, SIN), "k: expected shape (1, 4, Hkv, 8), got shape (1, 3, 1, 8)"),
        (lambda: pk.rope(Q, K, COS[:3], SIN), "rope: cos: expected shape (at least 4, 4), got shape (3, 4)"),
        (lambda: pk.rope(Q, K, COS, SIN.half()), "rope: sin: expected float32, got torch.float16"),
        (lambda: pk.rope(Q, K, COS, SIN, style="gptj"), "style: expected one of interleaved, half, got 'gptj'"),
        (lambda: pk.rope_tables(4, 7), "head_dim: expected an even positive number, got 7"),
    ],
)
def test_bad_arguments(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_rope_tables_are_picos() -> None:
    cos, sin = pk.rope_tables(2048, 8, 10000.0)
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, 8, 2)[:4].float() / 8))
    angles = torch.outer(torch.arange(2048), frequencies)
    rotation = torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(torch.complex(cos, sin), rotation, rtol=0, atol=1e-7)
