"""Attention and the loss on a real GPU: conformance, documents, decoding, memory, waiting, labels.

``python -m benchmarks.gpu`` runs this file without conftest.py on machines that have torch, Triton and pytest only.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import pico_kernels as pk
import pytest
import torch
from pico_kernels._dispatch import resolve
from pico_kernels.conformance import check


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = _load(Path(__file__).parent / "test_gpu.py")
pytestmark = shared.pytestmark

# PyTorch's and flash-attn's add to one place in any order.
THEIR_BACKWARD = {"same bits in every run", "backward twice"}


@pytest.mark.parametrize("impl", ["triton", "sdpa", "flash_attn", "auto"])
def test_attention_conforms(impl: str) -> None:
    try:
        call = resolve("attention", pk.OPS["attention"], impl, shared.DEVICE.type)
    except ValueError as error:
        pytest.skip(str(error))
    results = check(call, "attention", shared.DEVICE, [torch.bfloat16])
    if impl == "triton":
        results += check(call, "attention", shared.DEVICE, [torch.float32, torch.float16], quick=True)
    failed = {result.check: result.reason for result in results if not result.passed}
    assert set(failed) <= (set() if impl == "triton" else THEIR_BACKWARD), failed


def loss_by(strategy: str) -> shared.Call:
    from pico_kernels.linear_cross_entropy_triton import linear_cross_entropy

    return partial(linear_cross_entropy, strategy=strategy)


@pytest.mark.parametrize("strategy", ["triton", "torch", "tiles", "chunks"])
def test_linear_cross_entropy_conforms(strategy: str) -> None:
    named = strategy in ("triton", "torch")
    call = pk.OPS["linear_cross_entropy"][strategy] if named else loss_by(strategy)
    # Forced strategies at a few sizes: tiles are not made for the widest.
    results = check(call, "linear_cross_entropy", shared.DEVICE, [torch.bfloat16], quick=not named)
    results += check(call, "linear_cross_entropy", shared.DEVICE, [torch.float32, torch.float16], quick=True)
    assert {result.check: result.reason for result in results if not result.passed} == {}


@pytest.mark.parametrize("head_dim", [8, 64])
def test_attention_to_packed_documents_is_attention_to_each(head_dim: int) -> None:
    lengths = [300, 1, 129, 600]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=shared.DEVICE)
    inputs = [
        shared.rand(1, sum(lengths), n, head_dim, dtype=torch.bfloat16, seed=n + i) for i, n in enumerate((12, 4, 4))
    ]
    truth = [tensor.double() for tensor in inputs]
    parts = zip(*(tensor.split(lengths, 1) for tensor in truth), strict=True)
    want = torch.cat([pk.attention(*part, impl="reference") for part in parts], 1)
    got, lse = pk.attention(*inputs, cu_seqlens=bounds, return_lse=True, impl="triton")
    assert (got.double() - want).abs().max() <= 0.02  # two bfloat16 units at the largest value, about 3
    _, want_lse = pk.attention(*truth, cu_seqlens=bounds, return_lse=True, impl="reference")
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        shared.run(partial(pk.attention, cu_seqlens=bounds, impl="triton"), inputs),
        shared.run(partial(pk.attention, cu_seqlens=bounds, impl="reference"), inputs),
        strict=True,
    ):
        assert (a.float() - b.float()).abs().max() <= 2**-6 * b.float().abs().max()  # two units of the largest


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 128])
def test_attention_of_few_queries_to_a_long_cache(head_dim: int, queries: int) -> None:
    q = shared.rand(2, queries, 12, head_dim, dtype=torch.bfloat16)
    k, v = (shared.rand(2, 9001, 4, head_dim, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    want = pk.attention(q.double(), k.double(), v.double(), impl="reference")
    got = pk.attention(q, k, v, impl="triton")
    assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max() + 2**-9 * v.abs().max()
    assert torch.equal(got, pk.attention(q, k, v, impl="triton"))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", ["attention", "attention of documents", "tiles", "chunks"])
def test_the_host_never_waits(op: str) -> None:
    name = "attention" if op.startswith("attention") else "linear_cross_entropy"
    inputs = shared.inputs_of(name, 1024, 96, torch.bfloat16)
    call = shared.caller(name, "triton", inputs)
    if op == "attention of documents":
        call = partial(pk.OPS[name]["triton"], cu_seqlens=torch.tensor([0, 5, 1024], device=shared.DEVICE))
    elif name == "linear_cross_entropy":
        call = partial(loss_by(op), labels=shared.labels_of(1024, shared.VOCAB), z_loss=1e-3)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    call(*leaves).sum().backward()  # compiles
    with no_synchronisation():
        call(*leaves).sum().backward()
    names = shared.device_events(lambda: call(*leaves).sum().backward())
    assert not [event for event in names if "memcpy" in event.lower() and "dtod" not in event.lower()], names


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory held during ``work()`` beyond what was before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("d_model", "strategy"), [(96, "tiles"), (96, "chunks"), (768, "chunks")])
def test_linear_cross_entropy_takes_a_tenth_of_plain_memory(d_model: int, strategy: str) -> None:
    tokens, vocab = 16384, 50304
    needed = 5 * 4 * tokens * vocab
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"the plain loss needs some {needed / 1e9:.0f} GB")
    leaves = [
        shared.rand(tokens, d_model, dtype=torch.bfloat16).requires_grad_(),
        shared.rand(vocab, d_model).requires_grad_(),
    ]
    labels = shared.labels_of(tokens, vocab)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype)).float()
        return torch.nn.functional.cross_entropy(logits, labels)

    ours = partial(loss_by(strategy), labels=labels)
    peaks = [peak_bytes(lambda call=call: torch.autograd.grad(call(*leaves), leaves)) for call in (plain, ours)]
    assert peaks[1] <= 0.1 * peaks[0], peaks


def test_a_training_step_saves_the_float32_logits() -> None:
    """At tiny, 32k tokens: one float32 copy of the logits is 6.6 GB."""
    for module in ("yaml", "tqdm"):
        pytest.importorskip(module, reason="the trainer needs PyYAML and tqdm")
    step_memory = pytest.importorskip("benchmarks.step_memory")
    result = step_memory.compare(step_memory.TINY, [], 2048, 32768, "auto")
    assert result["tokens"] == 32768
    assert result["saved_bytes"] >= result["float32_logits_bytes"] == 32768 * 50304 * 4, result


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_linear_cross_entropy_of_a_label_outside_the_vocabulary(impl: str) -> None:
    """A device-side assertion; it spoils the process, hence one of its own.

    After it every call raises: the first loss compiles, then the device sleeps for a second while the host enqueues.
    """
    code = f"""
import pico_kernels as pk, torch
hidden, weight = (torch.randn(n, 96, device="cuda") for n in (4, 509))
fine, wrong = (torch.tensor([1, label, 2, -100], device="cuda") for label in (508, 509))
pk.linear_cross_entropy(hidden, weight, fine, impl="{impl}").item()
torch.cuda._sleep(2_000_000_000)
pk.linear_cross_entropy(hidden, weight, wrong, impl="{impl}")
print("the host did not wait", flush=True)
torch.cuda.synchronize()
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stdout == "the host did not wait\n"
    said = done.stderr
    assert "device-side assert" in said
    assert "labels: an id outside the vocabulary that is not ignore_index" in said


def test_linear_cross_entropy_of_ignored_labels_only_is_nan() -> None:
    leaves = [tensor.requires_grad_() for tensor in shared.inputs_of("linear_cross_entropy", 64, 96, torch.bfloat16)]
    labels = torch.full((64,), -100, device=shared.DEVICE)
    for impl in ("triton", "torch", "reference"):
        assert pk.linear_cross_entropy(*leaves, labels, impl=impl).isnan()
        assert pk.linear_cross_entropy(*leaves, labels, reduction="sum", impl=impl) == 0
