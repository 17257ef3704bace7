"""Attention in Triton: float64 accuracy, masks, documents, decoding, layouts, gradients asked for, tracing.

Runs on a GPU where there is one, else in Triton's interpreter (see conftest.py). Tiles are made 16 x 16 where a test
is about how blocks follow one another.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico_kernels as pk
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico_kernels import _attention_config, attention_decode_triton, attention_triton
from pico_kernels._attention_config import AttentionConfig, forward_config, key_config, query_config
from pico_kernels._triton import PICO_SHAPES, interpreting
from pico_kernels.conformance_cases import attention_in_its_dtype

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Tensors = list[torch.Tensor]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def qkv(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> Tensors:
    shapes = [(batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)]
    return [rand(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def with_grads(call: Callable, inputs: Tensors, upstream: torch.Tensor | None = None, **options: Any) -> Tensors:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves, **options)
    grad = rand(*out.shape, seed=7) if upstream is None else upstream
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def triton_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return pk.attention(q, k, v, impl="triton", **options)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return pk.attention(q, k, v, impl="reference", **options)


def assert_flash_rule(inputs: Tensors, baseline: Callable = attention_in_its_dtype, **options: Any) -> None:
    """Error against float64 at most twice that of PyTorch in this dtype, plus one ulp of the largest value.

    Gradients of q and k are sums of ``p * (dp - sum(p * dp))``, which cancel, wholly for a single key: the float32
    rounding of dp is allowed there too.
    """
    truth = with_grads(reference, [t.double() for t in inputs], **options)
    base = with_grads(baseline, inputs, **options)
    got = with_grads(triton_attention, inputs, **options)
    dim = inputs[0].shape[-1]
    cancelled = torch.finfo(torch.float32).eps * 4 * dim**0.5 * max(float(t.abs().max()) for t in inputs) ** 2
    for name, want, plain, found in zip(("out", "q", "k", "v"), truth, base, got, strict=True):
        assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
        assert found.is_contiguous()
        ulp = torch.finfo(found.dtype).eps * want.abs().max()
        limit = 2 * (plain.double() - want).abs().max() + ulp + (cancelled if name in "qk" else 0.0)
        assert (found.double() - want).abs().max() <= limit, name


def use_tiles(monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int) -> None:
    for name in ("forward_config", "query_config", "key_config"):
        monkeypatch.setattr(attention_triton, name, lambda *_: AttentionConfig(block_m, block_n, 4, 1))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16, 16)


class Launches:
    """Stands in for a kernel and records the keyword arguments of its launches; with ``run`` False that is all."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arg_names = kernel.arg_names
        self.run = True
        self.keywords: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **keywords: Any) -> None:
            self.keywords.append(keywords)
            if self.run:
                self.kernel[grid](*args, **keywords)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    recorders = {}
    for name in ("forward", "query_gradient", "key_gradient"):
        recorders[name] = Launches(getattr(attention_triton, f"attention_{name}_kernel"))
        monkeypatch.setattr(attention_triton, f"attention_{name}_kernel", recorders[name])
    recorders["combine"] = Launches(attention_decode_triton.attention_combine_kernel)
    monkeypatch.setattr(attention_decode_triton, "attention_combine_kernel", recorders["combine"])
    return recorders


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 16, 20, 32, 64, 96, 128, 256])
def test_accuracy_at_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    assert_flash_rule(qkv(1, 11, 13, 3, 1, dim, dtype))


@pytest.mark.usefixtures("nan_poisoned", "small_tiles")
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 22),
    more_keys=st.integers(0, 20),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
)
def test_accuracy_at_any_length(
    batch: int, queries: int, more_keys: int, kv_heads: int, group: int, dtype: torch.dtype, causal: bool
) -> None:
    assert_flash_rule(qkv(batch, queries, queries + more_keys, group * kv_heads, kv_heads, 8, dtype), causal=causal)


@pytest.mark.usefixtures("small_tiles")
def test_fewer_keys_than_queries() -> None:
    assert_flash_rule(qkv(1, 21, 5, 2, 2, 8), causal=False)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("queries", "keys", "group"), [(16, 16, 1), (33, 33, 1), (11, 43, 3), (9, 17, 4)])
def test_the_mask_is_right_by_one(queries: int, keys: int, group: int) -> None:
    """Values that name their key, scores of zero: each query's output is the exact mean over the keys it may see."""
    q = torch.zeros(1, queries, group, 8, device=DEVICE)
    k = torch.zeros(1, keys, 1, 8, device=DEVICE)
    v = torch.zeros(1, keys, 1, 8, device=DEVICE)
    v[0, :, 0, 0] = torch.arange(keys, device=DEVICE)
    out, lse = triton_attention(q, k, v, return_lse=True)
    seen = torch.arange(queries, device=DEVICE) + keys - queries + 1
    torch.testing.assert_close(out[0, :, :, 0], ((seen - 1) / 2)[:, None].expand(-1, group))
    torch.testing.assert_close(lse[0], seen.log().expand(group, -1))
    # The gradient of a value is the sum of the probabilities of the queries that see it.
    (grad,) = torch.autograd.grad(triton_attention(q, k, v.requires_grad_()).sum(), v)
    visible = torch.arange(keys, device=DEVICE)[None, :] < seen[:, None]
    torch.testing.assert_close(grad[0, :, 0, 0], group * (visible / seen[:, None]).sum(0))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 64)])
def test_tiles_of_other_shapes_change_rounding_only(
    block_m: int, block_n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = qkv(1, 21, 37, 3, 1, 8)
    square = with_grads(triton_attention, inputs)
    use_tiles(monkeypatch, block_m, block_n)
    for got, want in zip(with_grads(triton_attention, inputs), square, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 3.0, 0.0, -0.7])
def test_any_scale(scale: float) -> None:
    inputs = qkv(1, 9, 9, 3, 1, 8)
    got, want = (with_grads(call, inputs, scale=scale) for call in (triton_attention, reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's numpy
def test_scores_that_overflow_the_exponential() -> None:
    q, k, v = qkv(1, 8, 24, 3, 1, 8)
    got, want = (with_grads(call, [q * 100, k * 10, v], scale=1.0) for call in (triton_attention, reference))
    assert (q.abs().max() * k.abs().max() * 1000) > 1000
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


CUTS = {
    "blocks": [0, 16, 32],
    "ragged": [0, 3, 14, 15, 32],
    "empty documents": [0, 0, 7, 7, 7, 30, 32, 32],
    "single tokens": [*range(33)],
}


@pytest.mark.usefixtures("nan_poisoned", "small_tiles")
@pytest.mark.parametrize(("batch", "causal"), [(1, True), (2, True), (1, False)])
@pytest.mark.parametrize("kind", list(CUTS))
def test_documents_are_calls_of_their_own(kind: str, causal: bool, batch: int) -> None:
    """Rows of the batch are not borders: the ragged documents cross them."""
    cuts, dtype = CUTS[kind], torch.int32 if batch == 1 else torch.int64
    cu_seqlens = torch.tensor(cuts, dtype=dtype, device=DEVICE)
    q, k, v = qkv(batch, 32 // batch, 32 // batch, 3, 1, 8)

    def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        flat = [t.reshape(1, 32, -1, 8) for t in (q, k, v)]
        pieces = [[t[:, a:b] for t in flat] for a, b in itertools.pairwise(cuts) if b > a]
        return torch.cat([reference(*piece, causal=causal) for piece in pieces], 1).reshape(q.shape)

    got = with_grads(triton_attention, [q, k, v], causal=causal, cu_seqlens=cu_seqlens)
    for a, b in zip(got, with_grads(one_by_one, [q, k, v]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("used", ["both", "lse"])
def test_log_sum_exp_and_its_gradient(used: str, packed: bool) -> None:
    inputs = qkv(2, 21, 21, 3, 1, 8)
    cu_seqlens = torch.tensor([0, 5, 30, 42], device=DEVICE) if packed else None
    upstream = [rand(2, 21, 3, 8, seed=8), rand(2, 3, 21, seed=9)]
    results = []
    for call, tensors in ((triton_attention, inputs), (reference, [t.double() for t in inputs])):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, lse = call(*leaves, cu_seqlens=cu_seqlens, return_lse=True)
        assert lse.shape == (2, 3, 21)
        assert lse.dtype == tensors[0].dtype
        total = (lse * upstream[1]).sum() + ((out * upstream[0]).sum() if used == "both" else 0.0)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append(
            [out, lse, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))]
        )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_log_sum_exp_of_half_precision_is_float32() -> None:
    inputs = qkv(1, 9, 9, 3, 1, 8, torch.bfloat16)
    lse = triton_attention(*inputs, return_lse=True)[1]
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, reference(*inputs, return_lse=True)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [n for r in (1, 2) for n in itertools.combinations(range(3), r)], ids=str)
def test_only_the_gradients_asked_for(needed: tuple[int, ...], launches: dict[str, Launches]) -> None:
    inputs = qkv(1, 9, 11, 3, 1, 8)
    every = with_grads(triton_attention, inputs)[1:]
    for recorder in launches.values():
        recorder.keywords.clear()
    for index in needed:
        inputs[index].requires_grad_()
    out = triton_attention(*inputs)
    out.backward(rand(*out.shape, seed=7))
    for index, tensor in enumerate(inputs):
        assert torch.equal(tensor.grad, every[index]) if index in needed else tensor.grad is None
    query, key = launches["query_gradient"].keywords, launches["key_gradient"].keywords
    assert [launch["QUERY"] for launch in query] == ([0 in needed] if {0, 1} & set(needed) else [])
    assert [(launch["KEY"], launch["VALUE"]) for launch in key] == (
        [(1 in needed, 2 in needed)] if {1, 2} & set(needed) else []
    )


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the shape of ``x`` and other strides."""
    packed = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3]), float("nan"), dtype=x.dtype, device=x.device)
    packed[:, :, 1:-2] = x
    odd = torch.full((*x.shape[:3], x.shape[3] + 3), float("nan"), dtype=x.dtype, device=x.device)
    odd[..., 1:-2] = x
    return {
        "packed": packed[:, :, 1:-2],
        "odd_strides": odd[..., 1:-2],
        "heads_first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "batch_expanded": x[:1].expand_as(x),
        "all_expanded": x[:1, :1, :1, :1].expand_as(x),
    }


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("where", ["grad", "all"])
@pytest.mark.parametrize("kind", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_any_layout_of_inputs_and_gradient(kind: str, where: str) -> None:
    tensors = [*qkv(2, 5, 7, 3, 1, 8), rand(2, 5, 3, 8, seed=5)]
    strided = [
        layouts(t)[kind] if where in (name, "all") else t
        for name, t in zip(("q", "k", "v", "grad"), tensors, strict=True)
    ]
    results = [with_grads(triton_attention, ts[:3], ts[3]) for ts in (strided, [t.contiguous() for t in strided])]
    for got, want in zip(*results, strict=True):
        assert not got.isnan().any()
        assert torch.equal(got, want)


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_and_nothing_overwritten() -> None:
    inputs = [t.requires_grad_() for t in qkv(2, 17, 17, 3, 1, 8, torch.bfloat16)]
    upstream = rand(2, 17, 3, 8, dtype=torch.bfloat16, seed=2)
    before = [t.detach().clone() for t in (*inputs, upstream)]
    out, again = (triton_attention(*inputs) for _ in range(2))
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream)
    for a, b in zip((out, *first, *inputs, upstream), (again, *second, *before), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 3, 3, 1, 1, 8))
    out = triton_attention(q, k, v)
    (grad,) = torch.autograd.grad(out, q, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (2, 0, 5)])
def test_nothing_to_attend_from(shape: tuple[int, int, int]) -> None:
    inputs = [t.requires_grad_() for t in qkv(*shape, 4, 2, 8)]
    out = triton_attention(*inputs)
    out.sum().backward()
    assert out.shape == inputs[0].shape
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_a_row_of_nan_stays_in_its_row() -> None:
    q, k, v = qkv(1, 9, 9, 3, 1, 8)
    want = triton_attention(q, k, v)
    q[0, 4, 1] = float("nan")
    got = triton_attention(q, k, v)
    assert got[0, 4, 1].isnan().all()
    got[0, 4, 1] = want[0, 4, 1]
    assert torch.equal(got, want)


@pytest.mark.parametrize("wide", [{"dtype": torch.float64, "dim": 5}, {"dtype": torch.float32, "dim": 257}], ids=str)
def test_what_no_kernel_takes_is_the_twin(wide: dict[str, Any], launches: dict[str, Launches]) -> None:
    inputs = qkv(1, 3, 5, 2, 1, **wide)
    for got, want in zip(with_grads(triton_attention, inputs), with_grads(reference, inputs), strict=True):
        assert torch.equal(got, want)
    assert not any(recorder.keywords for recorder in launches.values())


def test_gradcheck() -> None:
    inputs = [t.double().requires_grad_() for t in qkv(1, 3, 4, 2, 1, 4)]
    assert torch.autograd.gradcheck(lambda *ts: triton_attention(*ts, return_lse=True), inputs)


@pytest.mark.skipif(not interpreting(), reason="a sparse file stands for 8 GiB of memory")
@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("index", range(4))
def test_offsets_beyond_int32(index: int, dim: int, tmp_path: Path) -> None:
    """Batch rows, positions or heads 2^30 + 8 elements apart; what wrapped would read zeros below the first."""
    sparse = tmp_path / "sparse"
    storage = torch.from_file(str(sparse), shared=True, size=2**32 + 128, dtype=torch.float16)
    sparse.unlink()  # the mapping keeps it
    shape = [2, 2, 2, 8]
    shape[dim] = 3
    strides = [32, 16, 8, 1]
    strides[dim] = 2**30 + 8
    far = storage.as_strided(shape, strides, 2**31)
    far.copy_(rand(*shape))
    results = []
    for tensor in (far, far.contiguous()):
        *inputs, grad = (tensor if i == index else rand(*shape, seed=i + 3).half() for i in range(4))
        results.append(with_grads(triton_attention, inputs, grad))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize(("queries", "keys", "heads", "dim"), [(1, 1300, 6, 8), (5, 515, 3, 20), (1, 513, 1, 64)])
def test_split_keys_give_what_one_pass_gives(
    queries: int, keys: int, heads: int, dim: int, launches: dict[str, Launches], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = qkv(2, queries, keys, heads, heads // 3 or 1, dim)
    split = triton_attention(*inputs, return_lse=True)
    assert launches["forward"].keywords[-1]["SPLIT"] == 256
    assert len(launches["combine"].keywords) == 1
    monkeypatch.setattr(attention_triton, "split_length", lambda *_: 0)
    for got, want in zip(split, triton_attention(*inputs, return_lse=True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(launches["combine"].keywords) == 1


def test_decoding_keeps_accuracy_and_gradients() -> None:
    assert_flash_rule(qkv(1, 2, 700, 3, 1, 8, torch.bfloat16))


def test_decoding_does_not_depend_on_the_batch() -> None:
    q, k, v = qkv(2, 1, 520, 3, 1, 8)
    assert torch.equal(triton_attention(q, k, v)[:1], triton_attention(q[:1], k[:1], v[:1]))


@pytest.mark.parametrize(
    ("rows", "keys", "length"),
    [(3, 511, 0), (3, 512, 256), (64, 8192, 256), (65, 8192, 0), (3, 16385, 512), (1, 2**20, 2**14)],
)
def test_length_of_a_split(rows: int, keys: int, length: int) -> None:
    assert attention_decode_triton.split_length(rows, keys) == length


@pytest.fixture
def fresh_traces() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_traces")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("needed", [(0,), (2,), (0, 1, 2)], ids=str)
def test_traces_as_one_graph(needed: tuple[int, ...], packed: bool) -> None:
    inputs = qkv(2, 5, 5, 3, 1, 8)
    leaves = [inputs[index].requires_grad_() for index in needed]
    cu_seqlens = torch.tensor([0, 4, 7, 10], device=DEVICE) if packed else None

    def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = attention_triton.attention(
            q * 2, k.transpose(1, 2).contiguous().transpose(1, 2), v, cu_seqlens=cu_seqlens, return_lse=True
        )
        return out.sin().sum() + lse.cos().sum()

    eager, traced = mixed(*inputs), torch.compile(mixed, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_registered_ops_pass_opcheck() -> None:
    q, k, v = qkv(2, 5, 5, 3, 1, 8)
    ops = torch.ops.pico_kernels
    leaves = [t.requires_grad_() for t in (q, layouts(k)["packed"].detach(), v)]
    torch.library.opcheck(ops.attention.default, (*leaves, None, True, 0.3))
    bounds = attention_triton._document_bounds(torch.tensor([0, 2, 5], device=DEVICE), 5)
    torch.library.opcheck(ops.attention.default, (*(t.detach() for t in leaves), bounds, True, 0.3))
    out, lse = ops.attention(q.detach(), k, v.detach(), None, True, 0.3)
    for needs in ([True, True, True], [False, True, False]):
        saved = (q.detach(), k, v.detach(), out, lse, None, True, 0.3, needs)
        torch.library.opcheck(ops.attention_backward.default, (out, None, *saved))
        torch.library.opcheck(ops.attention_backward.default, (out, lse, *saved))


@pytest.mark.parametrize("shape", PICO_SHAPES, ids=lambda shape: shape.name)
def test_ahead_of_time_cases_are_what_is_launched(shape: Any, launches: dict[str, Launches]) -> None:
    cases = {case.name: case for case in attention_triton.aot_cases(shape)}
    sizes = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
    for recorder in launches.values():
        recorder.run = False
    long = qkv(1, 43, 43, *sizes, torch.bfloat16)  # 129 rows: the whole forward tile
    with_grads(triton_attention, long)
    training = {name: launches[name].keywords.pop() for name in ("forward", "query_gradient", "key_gradient")}
    triton_attention(*qkv(1, 1, 8192, *sizes, torch.bfloat16))
    launched = {
        **{f"{name}-bf16": keywords for name, keywords in training.items()},
        "forward-split-bf16": launches["forward"].keywords.pop(),
        "combine-bf16": launches["combine"].keywords.pop(),
    }
    for name, keywords in launched.items():
        case = cases[f"attention_{name}"]
        constants = {key: value for key, value in case.constexprs.items() if key in keywords and key != "WIDEN"}
        assert {key: keywords[key] for key in constants} == constants
        assert set(case.signature) == set(case.kernel.arg_names)
        ones = {key for key in case.constexprs if case.constexprs[key] == 1 and key not in keywords}
        assert set(case.constexprs) == {*constants, *ones} | ({"WIDEN"} & set(keywords))
        assert case.num_warps == keywords["num_warps"]
        assert case.num_stages == keywords.get("num_stages", case.num_stages)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [1, 8, 16, 32, 64, 96, 128, 256])
def test_tiles_are_powers_of_two_that_a_tensor_core_takes(dim: int, itemsize: int) -> None:
    for config in (forward_config(dim, itemsize, 5000), query_config(dim, itemsize), key_config(dim, itemsize)):
        for block in (config.block_m, config.block_n):
            assert block >= 16
            assert block & (block - 1) == 0
    assert forward_config(dim, itemsize, 3).block_m == 16
    assert _attention_config._block_d(dim) == {1: 16, 8: 16, 96: 128}.get(dim, dim)
