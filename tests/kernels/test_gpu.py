"""The Triton kernels on a real GPU: numbers, tracing, determinism, launches, offsets past 2^31.

What only attention and the loss promise is in test_gpu_matrix.py.

``python -m benchmarks.gpu`` runs this file without conftest.py on machines that have torch, Triton and pytest only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pico_kernels as pk
import pytest
import torch

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POINTWISE = ["rms_norm", "add_rms_norm", "rope", "swiglu"]
OPS = [*POINTWISE, "attention", "linear_cross_entropy"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKWARD_KERNELS = {
    "rms_norm": 2,
    "add_rms_norm": 2,
    "rope": 1,
    "swiglu": 1,
    "attention": 2,
}  # a norm adds its partial weight gradients; attention has one for q, one for k and v
VOCAB = 509
Call = Callable[..., Any]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def inputs_of(op: str, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Differentiable arguments. Rope and attention: 3 query heads and 1 of keys, of ``width`` and a third of it."""
    if op == "rope":
        return [rand(1, rows, heads, width, dtype=dtype, seed=heads) for heads in (3, 1)]
    if op == "attention":
        return [rand(1, rows, heads, width // 3, dtype=dtype, seed=seed) for seed, heads in enumerate((3, 1, 1))]
    if op == "linear_cross_entropy":
        return [rand(rows, width, dtype=dtype), rand(VOCAB, width, seed=9) * width**-0.5]
    if op == "swiglu":
        return [rand(rows, width, dtype=dtype, seed=seed) for seed in range(2)]
    count = 2 if op == "add_rms_norm" else 1
    return [*(rand(rows, width, dtype=dtype, seed=seed) for seed in range(count)), rand(width, seed=9)]


def caller(op: str, impl: str, inputs: Sequence[torch.Tensor], style: str = "interleaved") -> Call:
    """The op as a function of its differentiable arguments, for arguments of these shapes."""
    if op == "linear_cross_entropy":
        labels = labels_of(inputs[0].shape[0], inputs[1].shape[0])
        return lambda hidden, weight: pk.linear_cross_entropy(hidden, weight, labels, z_loss=1e-3, impl=impl)
    if op != "rope":
        return lambda *tensors: getattr(pk, op)(*tensors, impl=impl)
    cos, sin = pk.rope_tables(inputs[0].shape[1], inputs[0].shape[3], device=DEVICE)
    return lambda q, k: pk.rope(q, k, cos, sin, style=style, impl=impl)


def labels_of(tokens: int, vocab: int) -> torch.Tensor:
    """Some of them to be ignored."""
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[::7] = -100
    return labels.to(DEVICE)


def run(call: Call, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then the gradient of every input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [rand(*out.shape, seed=7 + i).to(out.dtype) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, seeds)]


@contextmanager
def poisoned() -> Iterator[None]:
    """PyTorch fills uninitialised memory with NaN in its deterministic mode: an element left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_flash_rule(op: str, inputs: Sequence[torch.Tensor], style: str = "interleaved") -> None:
    """Error against float64 at most twice the reference's own error in this dtype, plus one output ulp."""
    truth = run(caller(op, "reference", inputs, style), [tensor.double() for tensor in inputs])
    plain = run(caller(op, "reference", inputs, style), inputs)
    with poisoned():
        ours = run(caller(op, "triton", inputs, style), inputs)
    for index, (want, base, got) in enumerate(zip(truth, plain, ours, strict=True)):
        assert got.dtype == base.dtype
        assert got.shape == base.shape
        ulp = torch.finfo(got.dtype).eps * want.abs().max().clamp(min=1e-3)
        bound = 2 * (base.double() - want).abs().max() + ulp
        error = (got.double() - want).abs().max()
        assert error <= bound, f"result {index}: off by {error:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 96, 131, 768, 1536, 65536])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_norm_numbers(op: str, width: int, dtype: torch.dtype) -> None:
    # 300 rows: more than the 128 partitions of wide rows, so that partial sums are added up in memory
    for rows in (1, 7, 1000) if width < 65536 else (3, 300):
        assert_flash_rule(op, inputs_of(op, rows, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 384, 1000, 6144, 10007])
def test_swiglu_numbers(width: int, dtype: torch.dtype) -> None:
    for rows in (1, 7, 1000):
        assert_flash_rule("swiglu", inputs_of("swiglu", rows, width, dtype))


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 10, 64, 128, 256])
def test_rope_numbers(head_dim: int, dtype: torch.dtype, style: str) -> None:
    for seq_len in (1, 203, 2048):
        assert_flash_rule("rope", inputs_of("rope", seq_len, head_dim, dtype), style)


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_give_the_bits_of_dense_ones(op: str) -> None:
    dense = inputs_of(op, 64, 96, torch.bfloat16)
    call = caller(op, "triton", dense)
    want = run(call, dense)
    strided = []
    for tensor in dense:
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype, device=DEVICE)
        wide[..., 1:-2] = tensor
        strided.append(wide[..., 1:-2])
    for a, b in zip(run(call, strided), want, strict=True):
        assert torch.equal(a, b)
    expanded = [tensor if tensor.dim() == 1 else tensor[:, :1].expand_as(tensor) for tensor in dense]
    want = run(call, [tensor.contiguous() for tensor in expanded])
    for a, b in zip(run(call, expanded), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_runs_repeat_bit_for_bit_and_overwrite_nothing(op: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(op, 4096, 96, dtype)
    kept = [tensor.clone() for tensor in inputs]
    first = run(caller(op, "triton", inputs), inputs)
    for _ in range(5):
        torch.randn(1 << 20, device=DEVICE).sort()  # other work, so that blocks run in another order
        for a, b in zip(run(caller(op, "triton", inputs), inputs), first, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(inputs, kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_backward_leaves_incoming_gradients_alone(op: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs_of(op, 256, 96, torch.bfloat16)]
    outputs = caller(op, "triton", leaves)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(out) for out in outputs]
    kept = [grad.clone() for grad in grads]
    first = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, grads)
    for a, b in zip((*grads, *first), (*kept, *second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph_with_the_bits_of_eager(op: str) -> None:
    inputs = inputs_of(op, 512, 96, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(caller(op, "triton", inputs), fullgraph=True)
    for a, b in zip(run(compiled, inputs), run(caller(op, "triton", inputs), inputs), strict=True):
        if op == "linear_cross_entropy":  # Inductor adds up the tokens' losses in another order
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


class Recorder(torch.fx.Interpreter):
    """Runs a traced graph and keeps the calls to our registered ops."""

    def __init__(self, graph: torch.fx.GraphModule, calls: list[tuple[Any, tuple, dict]]) -> None:
        super().__init__(graph)
        self.calls = calls

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if getattr(target, "namespace", None) == "pico_kernels":
            self.calls.append((target, args, kwargs))
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("op", OPS)
def test_the_op_that_tracing_sees_is_registered_soundly(op: str) -> None:
    calls: list[tuple[Any, tuple, dict]] = []
    torch._dynamo.reset()
    dtype = torch.bfloat16 if op == "linear_cross_entropy" else torch.float32  # in float32 it is traced as chunks
    inputs = [tensor.requires_grad_() for tensor in inputs_of(op, 16, 96, dtype)]
    call = caller(op, "triton", inputs)
    torch.compile(call, backend=lambda graph, _: Recorder(graph, calls).run, fullgraph=True)(*inputs)
    assert len(calls) == 1
    target, args, kwargs = calls[0]
    leaves = tuple(
        arg.detach().clone().requires_grad_(arg.dtype == dtype) if isinstance(arg, torch.Tensor) else arg
        for arg in args
    )
    if op == "rope":  # cos and sin are constants
        leaves = tuple(arg.detach() if isinstance(arg, torch.Tensor) and arg.dim() == 2 else arg for arg in leaves)
    results = torch.library.opcheck(target, leaves, kwargs)
    assert set(results.values()) == {"SUCCESS"}


def device_events(work: Callable[[], object]) -> list[str]:
    """Names of what the device did in ``work()``: kernels, copies, fills."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


@pytest.mark.parametrize("op", [*POINTWISE, "attention"])
def test_a_forward_is_one_kernel_and_no_copy(op: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in inputs_of(op, 4096, 96, torch.bfloat16)]
    kernels = pk.KernelSet.from_config({"default": "auto"}, DEVICE)
    call = getattr(kernels, op)
    extra = pk.rope_tables(4096, 96, device=DEVICE) if op == "rope" else (1e-6,) if "norm" in op else ()
    names = device_events(lambda: call(*inputs, *extra))
    assert len(names) == 1, names
    assert "mem" not in names[0].lower()


@pytest.mark.parametrize("op", BACKWARD_KERNELS)
def test_a_backward_launches_no_more_kernels_than_it_must(op: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in inputs_of(op, 4096, 96, torch.bfloat16)]
    outputs = caller(op, "triton", inputs)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(out) for out in outputs]
    names = device_events(lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True))
    assert 1 <= len(names) <= BACKWARD_KERNELS[op], names
    assert not [name for name in names if "memcpy" in name.lower()]


@pytest.mark.parametrize("op", POINTWISE)
def test_offsets_past_2_to_31(op: str) -> None:
    """3.2e9 elements of one tensor: its last rows have the bits of those rows alone, forward and backward."""
    heads, head_dim, seq_len, width = 12, 128, 2048, 1536
    rows = -(-3_200_000_000 // (width * seq_len)) * seq_len
    copies = {"rms_norm": 4, "add_rms_norm": 8, "rope": 6, "swiglu": 6}[op]
    needed = copies * rows * width * 2
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 1.1 * needed:
        pytest.skip(f"needs {1.1 * needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")

    def fill(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).uniform_(-2, 2)

    if op == "rope":
        batch = rows // seq_len
        cos, sin = pk.rope_tables(seq_len, head_dim, device=DEVICE)
        whole = [fill(batch, seq_len, heads, head_dim), fill(batch, seq_len, 1, head_dim)]
        call, last = (lambda q, k: pk.rope(q, k, cos, sin, impl="triton")), 1
    else:
        whole = [fill(rows, width) for _ in range(1 if op == "rms_norm" else 2)]
        call, last = caller(op, "triton", whole), 8
    weight = [] if op in ("rope", "swiglu") else [rand(width)]

    def outputs_and_first_gradients(big: list[torch.Tensor], seeds: list[torch.Tensor] | None) -> tuple[list, list]:
        leaves = [tensor.detach().requires_grad_() for tensor in big]
        outputs = call(*leaves, *weight)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seeds = seeds or [fill(*out.shape) for out in outputs]
        grads = torch.autograd.grad(outputs, leaves, seeds)
        kept = [tensor.detach()[-last:].clone() for tensor in (*outputs, *grads)]
        return kept, [seed[-last:].clone() for seed in seeds]

    assert whole[0].numel() > 2**31
    got, seeds = outputs_and_first_gradients(whole, None)
    want, _ = outputs_and_first_gradients([tensor[-last:].clone() for tensor in whole], seeds)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_auto_is_triton_on_a_gpu() -> None:
    names = pk.KernelSet.from_config(device=DEVICE).describe()
    assert {op: names[op] for op in POINTWISE} == dict.fromkeys(POINTWISE, "triton")
    assert names["attention"] == "auto"  # which chooses at each call
    assert names["linear_cross_entropy"] == "triton"


@pytest.mark.parametrize("op", [*POINTWISE, "attention"])
def test_zero_rows(op: str) -> None:
    inputs = inputs_of(op, 0, 96, torch.bfloat16)
    for tensor, result in zip(inputs, run(caller(op, "triton", inputs), inputs)[-len(inputs) :], strict=True):
        assert result.shape == tensor.shape
        assert not result.any()


def test_a_mix_of_devices_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"weight: expected the device of x \(cuda:0\), got cpu"):
        pk.rms_norm(rand(2, 8), torch.ones(8))
