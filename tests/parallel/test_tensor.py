"""Tensor and sequence parallelism: the same model, gradients and tokens as in one process."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory_ops
from pico_kernels import KernelSet
from torch import nn

from pico_fast.config import Config, ModelConfig
from pico_fast.model.build import build_model
from pico_fast.model.decoder import PicoDecoder
from pico_fast.model.generate import generate
from pico_fast.model.sharding import tensor_parallel_dim, tensor_parallel_part
from pico_fast.parallel.gradients import sum_over_tensor_parallel
from pico_fast.parallel.mesh import Axis, Parallel, start_parallel
from pico_fast.parallel.symmetric_memory import symmetric_memory_problem
from pico_fast.parallel.tensor import SequenceParallel
from pico_fast.runtime import Runtime, UsageError
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

SHAPE = ModelConfig(
    d_model=32,
    n_layers=2,
    vocab_size=61,
    max_seq_len=16,
    attention_n_heads=4,
    attention_n_kv_heads=4,
    activation_hidden_dim=48,
)
TORCH = KernelSet.from_config({"default": "torch"})
CPU = Runtime(torch.device("cpu"), torch.float32, torch.float32, 1)


def config_for(tp: int, recomputed: str = "none") -> Config:
    config = Config(model=SHAPE)
    config.parallel.tp, config.parallel.activation_checkpointing = tp, recomputed
    config.parallel.timeout_s = 60
    return config


def pair(tp: int, kernels: KernelSet, recomputed: str = "none") -> tuple[PicoDecoder, PicoDecoder, Parallel]:
    """This rank's part of the model and, beside it, the whole model."""
    config = config_for(tp, recomputed)
    parallel = start_parallel(config, CPU.device)
    return build_model(config, kernels, CPU, parallel), build_model(config_for(1), kernels, CPU), parallel


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(61, (3, 17), generator=generator)


def loss_of_rows(model: PicoDecoder) -> torch.Tensor:
    return model.loss(rows()[:, :-1], rows()[:, 1:], reduction="sum", denominator=48)


def check_initial_weights(model: PicoDecoder, whole: PicoDecoder, tp: Axis) -> None:
    for (name, part), full in zip(model.named_parameters(), whole.parameters(), strict=True):
        dim = tensor_parallel_dim(name)
        expected = full if dim is None else full.chunk(tp.size, dim)[tp.rank]
        assert torch.equal(part, expected), name
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes, f"{name} keeps the whole in memory"


def check_gradients(model: PicoDecoder, whole: PicoDecoder, tp: Axis) -> None:
    """Loss summed over the ranks; gradients of whole weights summed, of split ones as they are."""
    ids, counted = rows()[:, :-1], torch.tensor(40.0)
    labels = rows()[:, 1:].clone()
    labels[0, :8] = -100
    expected = whole.loss(ids, labels, reduction="sum", denominator=counted)
    expected.backward()
    loss = model.loss(ids, labels, reduction="sum", denominator=counted)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=tp.group)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for (name, part), full in zip(model.named_parameters(), whole.parameters(), strict=True):
        gradient = part.grad
        if tensor_parallel_dim(name) is None:
            dist.all_reduce(gradient, group=tp.group)
        wanted = tensor_parallel_part(name, full.grad, tp)
        error = (gradient - wanted).norm() / wanted.norm()
        assert error < 1e-5, f"{name}: {error}"
    model.zero_grad()
    whole.zero_grad()


def check_losses_of_tokens(model: PicoDecoder, whole: PicoDecoder, tp: Axis) -> None:
    """Per-token losses: all of them on every rank, also where the ranks do not divide the tokens."""
    for shape in ((3, 16), (1, 5)):
        ids, labels = rows()[: shape[0], : shape[1]], rows()[: shape[0], 1 : shape[1] + 1]
        losses = model.loss(ids, labels, reduction="none")
        torch.testing.assert_close(losses, whole.loss(ids, labels, reduction="none").detach(), atol=1e-5, rtol=1e-5)


def check_generation(model: PicoDecoder, whole: PicoDecoder, tp: Axis) -> None:
    prompt = rows()[:, :3]
    with torch.no_grad():
        torch.testing.assert_close(model(prompt), whole(prompt), atol=1e-5, rtol=1e-5)
    for settings in ({"temperature": 0}, {"seed": 5}):
        assert torch.equal(generate(model, prompt, 6, **settings), generate(whole, prompt, 6, **settings))
    torch.manual_seed(tp.rank)  # without a seed each rank's own generator would draw other tokens
    drawn = generate(model, prompt, 6)
    first = drawn.clone()
    dist.broadcast(first, group=tp.group, group_src=0)
    assert torch.equal(drawn, first)


def check_refusals(model: PicoDecoder, whole: PicoDecoder, tp: Axis) -> None:
    ids, labels = rows()[:1, :5], rows()[:1, 1:6]
    with pytest.raises(ValueError, match=rf"1 rows of 5 tokens = 5 tokens.*tp = {tp.size}"):
        model.loss(ids, labels, reduction="sum")
    with pytest.raises(ValueError, match="needs the denominator"):
        model.loss(rows()[:, :-1], rows()[:, 1:])
    with pytest.raises(RuntimeError, match="carry no gradient"):
        model(ids)


def same_as_one_process(tp: int) -> None:
    for name in ("reference", "torch"):
        model, whole, parallel = pair(tp, KernelSet.from_config({"default": name}))
        check_initial_weights(model, whole, parallel.tp)
        check_gradients(model, whole, parallel.tp)
        check_losses_of_tokens(model, whole, parallel.tp)
        check_generation(model, whole, parallel.tp)
    check_refusals(model, whole, parallel.tp)
    check_linear_pieces(parallel.tp)
    check_recomputation(tp)
    check_narrow_gradients_are_summed_in_float32(model, parallel)
    if tp == 2:
        check_bf16()
        check_symmetric_memory(parallel.tp)


def check_narrow_gradients_are_summed_in_float32(model: PicoDecoder, parallel: Parallel) -> None:
    """256 + 1 + 1 + 1: in bfloat16 each addition of 1 would be lost, 260 is the nearest to the sum."""
    gradients = {}
    for name, parameter in model.named_parameters():
        own = torch.full_like(parameter, 256.0 if parallel.tp.rank == 0 else 1.0, dtype=torch.bfloat16)
        parameter.data = parameter.data.bfloat16()
        parameter.grad = gradients[name] = own
    sum_over_tensor_parallel(model, parallel)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        expected = (256 if parallel.tp.rank == 0 else 1) if tensor_parallel_dim(name) is not None else {2: 256, 4: 260}
        assert (gradient == (expected[parallel.tp.size] if isinstance(expected, dict) else expected)).all(), name


def check_linear_pieces(tp: Axis) -> None:
    """Gather and reduce-scatter are each other's adjoint, and the gradients of what they feed are whole."""
    tokens, width = SequenceParallel(tp), 8
    identity = nn.Linear(width, width, bias=False, dtype=torch.float64)
    nn.init.eye_(identity.weight)
    generator = torch.Generator().manual_seed(tp.rank)  # other numbers on every rank
    local = torch.randn(3, width, dtype=torch.float64, generator=generator, requires_grad=True)
    partial = torch.randn(3 * tp.size, width, dtype=torch.float64, generator=generator, requires_grad=True)
    (gathered,) = tokens.column_parallel(local, identity)
    scattered = tokens.row_parallel(partial, identity)
    products = torch.stack([(gathered * partial).sum(), (local * scattered).sum()]).detach()
    dist.all_reduce(products, group=tp.group)  # <gather x, y> and <x, reduce-scatter y>, over all ranks
    torch.testing.assert_close(products[0], products[1], rtol=1e-12, atol=0)

    (local_grad,) = torch.autograd.grad(gathered, local, partial.detach())
    (partial_grad,) = torch.autograd.grad(scattered, partial, local.detach())
    assert torch.equal(local_grad, scattered.detach())
    assert torch.equal(partial_grad, gathered.detach())


def check_recomputation(tp: int) -> None:
    """What is recomputed has the same gradient, bit for bit."""
    gradients = []
    for recomputed in ("none", "block", "attention"):
        model, _, _ = pair(tp, TORCH, recomputed)
        loss_of_rows(model).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def check_bf16() -> None:
    """Activations and what is communicated are bfloat16, the weights' gradients arrive in float32."""
    exact, _, parallel = pair(2, TORCH)
    runtime = dataclasses.replace(CPU, compute_dtype=torch.bfloat16)
    model = build_model(config_for(2), TORCH, runtime, parallel)
    for decoder in (model, exact):
        loss_of_rows(decoder).backward()
    for (name, rounded), full in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert rounded.grad.dtype == torch.float32
        error = (rounded.grad - full.grad).norm() / full.grad.norm()
        assert error < 0.05, f"{name}: {error}"


def check_symmetric_memory(tp: Axis) -> None:
    """Loss and gradients through the fused ops' interface, which on a CPU is torch's own specification of them."""
    on_cpu = torch.library.Library("symm_mem", "IMPL")  # torch registers them for CUDA and for tracing
    on_cpu.impl("fused_all_gather_matmul", symmetric_memory_ops._fused_all_gather_matmul_fallback, "CPU")
    on_cpu.impl("fused_matmul_reduce_scatter", symmetric_memory_ops._fused_matmul_reduce_scatter_fallback, "CPU")
    torch.manual_seed(42)
    fused = PicoDecoder(SHAPE, TORCH, tp=tp, symmetric_memory=True)
    plain, _, _ = pair(2, TORCH)
    with torch.profiler.profile() as profile:
        loss_of_rows(fused).backward()
    calls = Counter(event.name for event in profile.events())
    assert calls["symm_mem::fused_all_gather_matmul"] == 4 * SHAPE.n_layers
    assert calls["symm_mem::fused_matmul_reduce_scatter"] == 4 * SHAPE.n_layers
    assert calls["c10d::_allgather_base_"] == 2 * SHAPE.n_layers  # the tokens' second gathering is not fused
    loss_of_rows(plain).backward()
    for (name, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).norm() < 1e-5 * other.grad.norm(), name


@pytest.mark.parametrize("tp", [2, 4])
def test_same_weights_gradients_and_tokens_as_one_process(tp):
    run_ranks(same_as_one_process, tp, tp, timeout=300)


def test_symmetric_memory_is_refused_where_there_is_none(monkeypatch):
    config = Config(model=SHAPE)
    config.parallel.tp, config.parallel.symmetric_memory = 2, True
    with pytest.raises(UsageError, match=r"needs NVIDIA GPUs joined by NVLink, this run is on cpu; give .*=false"):
        build_model(config, TORCH, CPU, Parallel(world_size=2, tp=Axis(2)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert "on different nodes" in (symmetric_memory_problem(torch.device("cuda", 0), Axis(2)) or "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    asked = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: asked.append((one, other)) or one == 5)
    assert symmetric_memory_problem(torch.device("cuda", 5), Axis(4, 1)) is None
    assert asked == [(5, 4), (5, 6), (5, 7)]
    assert "no direct access to the memory of GPU 6" in (
        symmetric_memory_problem(torch.device("cuda", 7), Axis(2, 1)) or ""
    )


def triton_ops_on_two_ranks() -> None:
    torch.testing.assert_close(
        *(losses_and_gradients(KernelSet.from_config({"default": name})) for name in ("triton", "torch")),
        atol=1e-5,
        rtol=1e-4,
    )


def losses_and_gradients(kernels: KernelSet) -> list[torch.Tensor]:
    model, _, _ = pair(2, kernels)
    loss = model.loss(rows()[:1, :-1], rows()[:1, 1:], reduction="sum")
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_triton_kernels_on_local_tensors():
    run_ranks(triton_ops_on_two_ranks, 2)
