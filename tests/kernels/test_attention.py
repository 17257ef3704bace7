"""Attention: `torch` and `sdpa` against the float64 reference; causality, decoding, layouts, documents, messages."""

import re
import sys
from collections.abc import Callable
from itertools import pairwise

import pico_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico_kernels import _attention_cpu
from pico_kernels._triton import interpreting

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """Attention as written in plain PyTorch, every op in the input dtype."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    scores = (q.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[1])
        scores = scores.masked_fill(future, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def with_grads(call: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = call(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def assert_flash_rule(inputs: list[torch.Tensor], impl: str, causal: bool = True, scale: float | None = None) -> None:
    """Error against float64 at most twice plain PyTorch's in this dtype, plus one ulp of the largest value.

    Five times for PyTorch's own kernel, whose float32 key gradient is less exact (FlashAttention's tests allow 3 to 5).
    """
    factor = 5 if impl == "sdpa" else 2
    q, k, v = (t.double().abs().max() for t in inputs)
    # p * (dp - sum(p * dp)) cancels, wholly for a single key: the float32 rounding of dp is always allowed.
    cancelled = torch.finfo(torch.float32).eps * 4 * inputs[0].shape[-1] ** 0.5 * v * torch.maximum(q, k)
    wide = [t.double() for t in inputs]
    truth = with_grads(lambda *a: pk.attention(*a, causal=causal, scale=scale, impl="reference"), wide)
    base = with_grads(lambda *a: plain(*a, causal=causal, scale=scale), inputs)
    ours = with_grads(lambda *a: pk.attention(*a, causal=causal, scale=scale, impl=impl), inputs)
    for name, want, other, got in zip(("out", "dq", "dk", "dv"), truth, base, ours, strict=True):
        assert got.dtype == other.dtype
        assert got.shape == other.shape
        ulp = torch.finfo(got.dtype).eps * want.abs().max().clamp(min=1)
        assert (got.double() - want).abs().max() <= factor * (other.double() - want).abs().max() + ulp + cancelled, name


def test_the_reference_equals_a_dense_mask() -> None:
    inputs = draw(2, 5, 9, 6, 2, 8, torch.float64)
    torch.testing.assert_close(pk.attention(*inputs, impl="reference"), plain(*inputs))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    cached=st.integers(0, 30),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 8, 16, 20]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    rows=st.sampled_from([1, 8, 128]),
)
def test_accuracy(
    batch: int,
    queries: int,
    cached: int,
    kv_heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    causal: bool,
    scale: float | None,
    rows: int,
) -> None:
    inputs = draw(batch, queries, queries + cached, kv_heads * group, kv_heads, dim, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attention_cpu, "_MAX_ROWS", rows)
        patch.setattr(_attention_cpu, "_MIN_ROWS", min(rows, 16))
        assert_flash_rule(inputs, "torch", causal, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["torch", "sdpa"])
@pytest.mark.parametrize("shape", [(1, 130, 130, 12, 4, 8), (2, 65, 65, 3, 3, 32), (1, 33, 100, 2, 1, 8)])
def test_accuracy_over_several_tiles(shape: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
    assert_flash_rule(draw(*shape, dtype), impl)


@pytest.mark.parametrize("impl", ["reference", "torch", "sdpa"])
@pytest.mark.parametrize("prompt", [1, 7, 20])
def test_decoding_with_a_cache_equals_the_whole(impl: str, prompt: int) -> None:
    q, k, v = draw(2, 20, 20, 4, 2, 8, torch.float32)
    whole = pk.attention(q, k, v, impl=impl)
    parts = [pk.attention(q[:, :prompt], k[:, :prompt], v[:, :prompt], impl=impl)]
    parts += [pk.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], impl=impl) for t in range(prompt, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_the_future_has_no_influence(impl: str) -> None:
    q, k, v = draw(1, 40, 40, 4, 2, 8, torch.float32)
    before = pk.attention(q, k, v, impl=impl)
    k[:, 25:], v[:, 25:] = 30.0, 1e4
    after = pk.attention(q, k, v, impl=impl)
    assert torch.equal(after[:, :25], before[:, :25])
    assert (after[:, 25:] != before[:, 25:]).any()


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "packed":
        packed = torch.zeros(*x.shape[:-1], 3 * x.shape[-1], dtype=x.dtype)
        packed[..., x.shape[-1] : 2 * x.shape[-1]] = x
        return packed[..., x.shape[-1] : 2 * x.shape[-1]]
    return x[:1].expand_as(x)


@pytest.mark.parametrize("kind", ["heads_first", "packed", "expanded"])
def test_any_layout_of_inputs_and_gradient(kind: str) -> None:
    views = [strided(t, kind).detach().requires_grad_() for t in draw(2, 37, 37, 6, 2, 8, torch.float32)]
    dense = [t.detach().contiguous().requires_grad_() for t in views]
    got, want = pk.attention(*views, impl="torch"), pk.attention(*dense, impl="torch")
    assert torch.equal(got, want)
    grad = strided(torch.randn(got.shape, generator=torch.Generator().manual_seed(3)), kind)
    expected = torch.autograd.grad(want, dense, grad.contiguous())
    for a, b in zip(torch.autograd.grad(got, views, grad), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(needed: tuple[int, ...]) -> None:
    inputs = draw(1, 20, 20, 2, 1, 8, torch.float32)
    every = with_grads(lambda *a: pk.attention(*a, impl="torch"), inputs)
    for index in needed:
        inputs[index].requires_grad_()
    out = pk.attention(*inputs, impl="torch")
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
    for index, tensor in enumerate(inputs):
        if index in needed:
            assert torch.equal(tensor.grad, every[1 + index])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_have_the_same_bits(dtype: torch.dtype) -> None:
    inputs = draw(2, 70, 70, 6, 2, 8, dtype)
    first, second = (with_grads(lambda *a: pk.attention(*a, impl="torch"), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in draw(1, 5, 7, 4, 2, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: pk.attention(*a, impl="torch"), inputs)


@pytest.mark.parametrize("impl", ["reference", "torch", "sdpa"])
@pytest.mark.parametrize("batch", [0, 2])
def test_zero_rows(impl: str, batch: int) -> None:
    queries = 3 if batch == 0 else 0
    q, k, v = (t.requires_grad_() for t in draw(batch, queries, queries, 4, 2, 8, torch.float32))
    out = pk.attention(q, k, v, impl=impl)
    assert out.shape == q.shape
    out.sum().backward()
    assert k.grad.shape == k.shape


def test_equal_lengths_and_single_queries_build_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a dense mask")

    monkeypatch.setattr(sys.modules["pico_kernels.attention_sdpa"], "lower_right_mask", refuse)
    for impl in ("torch", "sdpa"):
        pk.attention(*draw(1, 9, 9, 2, 1, 8, torch.float32), impl=impl)
        pk.attention(*draw(1, 1, 9, 2, 1, 8, torch.float32), impl=impl)


DOCUMENT_IMPLS = ["reference", "torch", "sdpa"]


def loop_over_documents(inputs: list[torch.Tensor], starts: list[int], causal: bool, lse: bool) -> tuple:
    """Output and log-sum-exp of every document by itself."""
    flat = [t.flatten(0, 1)[None] for t in inputs]
    pairs = [(a, b) for a, b in pairwise(starts) if a < b]
    parts = [
        pk.attention(*(t[:, a:b] for t in flat), causal=causal, return_lse=True, impl="reference") for a, b in pairs
    ]
    batch, _, heads, _ = inputs[0].shape
    out = torch.cat([part for part, _ in parts], 1).reshape(inputs[0].shape)
    joined = torch.cat([part for _, part in parts], 2)[0]
    return (out, joined.unflatten(1, (batch, -1)).transpose(0, 1).reshape(batch, heads, -1)) if lse else (out,)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 24),
    cuts=st.lists(st.integers(0, 72), max_size=5),
    causal=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_documents_equal_a_loop_over_them(
    batch: int, length: int, cuts: list[int], causal: bool, index_dtype: torch.dtype
) -> None:
    tokens = batch * length
    starts = sorted([0, tokens, *(min(cut, tokens) for cut in cuts)])
    cu_seqlens = torch.tensor(starts, dtype=index_dtype)
    inputs = draw(batch, length, length, 4, 2, 8, torch.float64)
    for impl in DOCUMENT_IMPLS:
        lse = impl != "sdpa"

        def ours(*a: torch.Tensor, impl: str = impl, lse: bool = lse) -> tuple:
            found = pk.attention(*a, causal=causal, cu_seqlens=cu_seqlens, return_lse=lse, impl=impl)
            return found if lse else (found,)

        def loop(*a: torch.Tensor, lse: bool = lse) -> tuple:
            return loop_over_documents(list(a), starts, causal, lse)

        for got, want in zip(all_results(ours, inputs), all_results(loop, inputs), strict=True):
            torch.testing.assert_close(got, want)


def all_results(call: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs, and the gradients of a weighted sum of them all."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    generator = torch.Generator().manual_seed(7)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_log_sum_exp_is_wide_and_accurate(impl: str, dtype: torch.dtype) -> None:
    inputs = draw(2, 70, 90, 6, 2, 8, dtype)
    out, lse = pk.attention(*inputs, return_lse=True, impl=impl)
    _, exact = pk.attention(*(t.double() for t in inputs), return_lse=True, impl="reference")
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (2, 6, 70)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("needed", [(0, 1, 2), (0,), (1,)])
def test_gradcheck_of_the_log_sum_exp(causal: bool, needed: tuple[int, ...]) -> None:
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(draw(1, 5, 7, 4, 2, 4, torch.float64))]
    call = lambda *a: pk.attention(*a, causal=causal, return_lse=True, impl="torch")  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradcheck(lambda *a: call(*a)[1], inputs)


def test_values_get_no_gradient_from_the_log_sum_exp() -> None:
    inputs = [t.requires_grad_() for t in draw(1, 20, 20, 2, 1, 8, torch.float32)]
    _, lse = pk.attention(*inputs, return_lse=True, impl="torch")
    assert not torch.autograd.grad(lse.sum(), inputs[2])[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5])
def test_decoding_has_the_accuracy_of_plain_pytorch(queries: int, dtype: torch.dtype) -> None:
    inputs = draw(3, queries, 130, 6, 2, 8, dtype)
    got = pk.attention(*inputs, impl="torch")
    exact = pk.attention(*(t.double() for t in inputs), impl="reference")
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= 2 * (plain(*inputs).double() - exact).abs().max() + ulp
    assert torch.equal(got, pk.attention(*inputs, impl="torch"))


@pytest.mark.parametrize(("impl", "lse"), [("reference", True), ("torch", True), ("torch", False), ("sdpa", False)])
def test_documents_trace_as_one_graph(impl: str, lse: bool) -> None:
    cu_seqlens = torch.tensor([0, 5, 9, 14])
    inputs = draw(2, 7, 7, 4, 2, 8, torch.float32)

    def call(*a: torch.Tensor) -> tuple:
        found = pk.attention(*a, cu_seqlens=cu_seqlens, return_lse=lse, impl=impl)
        return found if lse else (found,)

    traced = all_results(torch.compile(call, backend="aot_eager", fullgraph=True), inputs)
    for got, want in zip(traced, all_results(call, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_a_traced_graph_asserts_the_documents() -> None:
    traced = torch.compile(pk.attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(
        RuntimeError, match="attention: cu_seqlens: entries must go from 0 to B \\* S = 8 and never decr"
    ):
        traced(Q, K, K, cu_seqlens=torch.tensor([0, 6, 5, 8]))


@pytest.mark.parametrize("impl", DOCUMENT_IMPLS)
def test_no_tokens_in_no_documents(impl: str) -> None:
    q, k, v = draw(2, 0, 0, 4, 2, 8, torch.float32)
    for starts in ([0], [0, 0, 0]):
        assert pk.attention(q, k, v, cu_seqlens=torch.tensor(starts), impl=impl).shape == q.shape


NOT_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Triton has no packages for other systems")


@pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("triton", marks=NOT_LINUX)])
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (0, 0), (2, 0)])
def test_log_sum_exps_of_no_tokens_in_no_documents(batch: int, length: int, impl: str) -> None:
    device = "cpu" if impl != "triton" or interpreting() else "cuda"
    inputs = [t.to(device).requires_grad_() for t in draw(batch, length, length, 4, 2, 8, torch.float32)]
    out, lse = pk.attention(*inputs, cu_seqlens=torch.tensor([0], device=device), return_lse=True, impl=impl)
    assert out.shape == inputs[0].shape
    assert lse.shape == (batch, 4, length)
    (out.sum() + lse.sum()).backward()
    assert all(t.grad.shape == t.shape for t in inputs)


def packed(starts: list, keys: int = 4, device: str = "cpu") -> torch.Tensor:
    return pk.attention(Q, K[:, :keys], K[:, :keys], causal=False, cu_seqlens=torch.tensor(starts, device=device))


Q, K = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.attention(Q[0], K, K), "attention: q: expected shape (B, Sq, H, D), got shape (4, 6, 8)"),
        (
            lambda: pk.attention(Q, K[..., :4], K),
            "attention: k: expected shape (2, Sk, Hkv, 8), got shape (2, 4, 2, 4)",
        ),
        (lambda: pk.attention(Q, K, K[:, :3]), "attention: v: expected the shape of k (2, 4, 2, 8), got shape (2, 3,"),
        (lambda: pk.attention(Q[:, :, :5], K, K), "a number of key-value heads that divides the 5 query heads, got 2"),
        (lambda: pk.attention(Q, K[:, :3], K[:, :3]), "q: expected at most as many queries as keys (3) when causal"),
        (lambda: pk.attention(Q, K.half(), K), "attention: k: expected the dtype of q (torch.float32), got torch.flo"),
        (lambda: pk.attention(Q, K, K.to("meta")), "attention: v: expected the device of q (cpu), got meta"),
        (lambda: pk.attention(Q, K, K, impl="fused"), "it has auto, reference, torch, triton, sdpa, flash_attn"),
        (lambda: packed([0, 8], keys=3), "cu_seqlens: expected as many queries as keys (3) in a row, got 4"),
        (lambda: packed([1, 8]), "attention: cu_seqlens: expected a first entry of 0, got 1"),
        (lambda: packed([0, 4, 7]), "attention: cu_seqlens: expected a last entry of B * S = 8, got 7"),
        (lambda: packed([0, 6, 5, 8]), "cu_seqlens: expected entries that never decrease, got 6, 5 at position 1"),
        (lambda: packed([0.0, 8.0]), "attention: cu_seqlens: expected int32 or int64, got torch.float32"),
        (lambda: packed([[0, 8]]), "attention: cu_seqlens: expected shape (documents + 1,), got shape (1, 2)"),
        (lambda: packed([0, 8], device="meta"), "cu_seqlens: expected the device of q (cpu), got meta"),
    ],
)
def test_bad_arguments(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_reference_sums_the_gradients_of_a_group_in_float32() -> None:
    inputs = draw(1, 20, 20, 8, 1, 8, torch.bfloat16)
    got = with_grads(lambda *a: pk.attention(*a, impl="reference"), inputs)
    exact = with_grads(lambda *a: pk.attention(*(t.double() for t in a), impl="reference").bfloat16(), inputs)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-6)  # one rounding: at most an ulp apart
