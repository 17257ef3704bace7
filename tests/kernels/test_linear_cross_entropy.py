"""Linear cross entropy: `torch` against the float64 reference over every reduction, chunking, gradients, messages."""

import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pico_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico_kernels import _linear_cross_entropy as chunked
from torch.nn import functional

loss_module = importlib.import_module("pico_kernels.linear_cross_entropy")  # the package's name is the function

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets under which a handful of tokens makes several chunks of several blocks."""
    monkeypatch.setattr(chunked, "_CPU_CHUNK_BYTES", 4096)
    monkeypatch.setattr(chunked, "_CPU_BLOCK_BYTES", 1024)


def draw(tokens: int, dim: int, vocab: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + 31 * vocab)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * dim**-0.5).to(weight_dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = -100
    return [hidden, weight, labels]


def loss_and_grads(inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    hidden, weight = (t.detach().clone().requires_grad_() for t in inputs[:2])
    loss = pk.linear_cross_entropy(hidden, weight, inputs[2], **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(9)).to(loss.dtype)
    return [loss, *torch.autograd.grad(loss, (hidden, weight), upstream)]


def assert_flash_rule(inputs: list[torch.Tensor], **options: Any) -> None:
    """Error against float64 at most twice the same-dtype PyTorch path's, plus one ulp of the largest value.

    The ulp of a gradient is that of the dtype the products run in, whatever dtype the weight has. Where a token's
    probability is almost 1, ``p - 1`` cancels: the float32 error of ``p`` (PyTorch's softmax and log-softmax are both
    off by 6 to 18 eps here), times the other operand and the incoming gradient (below 4), is always allowed.
    """
    wide = [inputs[0].double(), inputs[1].double(), inputs[2]]
    truth = loss_and_grads(wide, impl="reference", **options)
    base = loss_and_grads(inputs, impl="reference", **options)
    ours = loss_and_grads(inputs, impl="torch", **options)
    operands = (torch.zeros(1), inputs[1], inputs[0])
    for name, operand, want, other, got in zip(("loss", "hidden", "weight"), operands, truth, base, ours, strict=True):
        assert got.dtype == other.dtype
        assert got.shape == other.shape
        assert torch.equal(got.isnan(), want.isnan())
        if want.isnan().all() or not want.numel():
            continue
        eps = torch.finfo(got.dtype if name == "loss" else inputs[0].dtype).eps
        bound = 2 * (other.double() - want).abs().max() + eps * want.abs().max()
        bound += 32 * torch.finfo(torch.float32).eps * max(1, operand.double().abs().max())
        assert (got.double() - want).abs().max() <= bound, name


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 40),
    dim=st.integers(1, 24),
    vocab=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    mixed=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    denominator=st.sampled_from([None, 7.0, "tensor"]),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_accuracy(
    tokens: int,
    dim: int,
    vocab: int,
    dtype: torch.dtype,
    mixed: bool,
    reduction: str,
    denominator: float | str | None,
    z_loss: float,
) -> None:
    inputs = draw(tokens, dim, vocab, dtype, torch.float32 if mixed else dtype)
    if reduction == "none":
        denominator = None
    elif denominator == "tensor":
        denominator = torch.tensor(11.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CPU_CHUNK_BYTES", 4096)
        patch.setattr(chunked, "_CPU_BLOCK_BYTES", 1024)
        assert_flash_rule(inputs, reduction=reduction, denominator=denominator, z_loss=z_loss)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_pytorchs_cross_entropy(reduction: str, impl: str) -> None:
    hidden, weight, labels = draw(33, 17, 101, torch.float32, torch.float32)
    expected = functional.cross_entropy(functional.linear(hidden, weight), labels, reduction=reduction)
    got = pk.linear_cross_entropy(hidden, weight, labels, reduction=reduction, impl=impl)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    hidden, weight, labels = draw(6, 3, 5, torch.float64, torch.float64)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return pk.linear_cross_entropy(h, w, labels, reduction=reduction, z_loss=0.1, impl="torch")

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_chunks_cover_uneven_tokens_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(37, 9, 64, torch.float32, torch.float32)
    assert chunked._sizes(inputs[0], 64).chunk == 13  # 16 fit, 37 tokens in three even chunks
    several = loss_and_grads(inputs, impl="torch")
    monkeypatch.setattr(chunked, "_CPU_CHUNK_BYTES", 1 << 30)
    monkeypatch.setattr(chunked, "_CPU_BLOCK_BYTES", 1 << 30)
    for a, b in zip(several, loss_and_grads(inputs, impl="torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_vocabulary_larger_than_the_budget_still_has_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "_CPU_BLOCK_BYTES", 1)
    assert_flash_rule(draw(3, 4, 50, torch.float32, torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradient_asked_for(needed: int, reduction: str) -> None:
    inputs = draw(10, 4, 20, torch.bfloat16, torch.float32)
    every = loss_and_grads(inputs, impl="torch", reduction=reduction)
    inputs[needed].requires_grad_()
    loss = pk.linear_cross_entropy(*inputs, reduction=reduction, impl="torch")
    loss.backward(torch.randn(loss.shape, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(inputs[needed].grad, every[1 + needed])
    assert inputs[needed].grad.dtype == inputs[needed].dtype
    assert inputs[1 - needed].grad is None


def test_no_grad_computes_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = draw(10, 4, 20, torch.float32, torch.float32)
    weight.requires_grad_()
    with_grad = pk.linear_cross_entropy(hidden, weight, labels, impl="torch")
    seen = []
    run = loss_module.run_chunks
    monkeypatch.setattr(loss_module, "run_chunks", lambda *args: seen.append(args[4:]) or run(*args))
    with torch.no_grad():
        assert torch.equal(pk.linear_cross_entropy(hidden, weight, labels, impl="torch"), with_grad)
    assert seen == [(None, False, False)]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_ignored_tokens_have_no_loss_and_no_gradient(impl: str) -> None:
    hidden, weight, labels = draw(12, 4, 20, torch.float32, torch.float32)
    labels[3:9] = -100
    hidden[5] = 1e6
    hidden.requires_grad_()
    losses = pk.linear_cross_entropy(hidden, weight, labels, reduction="none", z_loss=0.1, impl=impl)
    assert torch.equal(losses[3:9], torch.zeros(6))
    for reduction in ("mean", "none"):
        loss = pk.linear_cross_entropy(hidden, weight, labels, reduction=reduction, z_loss=0.1, impl=impl)
        (grad,) = torch.autograd.grad(loss.sum(), hidden)
        assert torch.equal(grad[3:9], torch.zeros(6, 4))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_every_token_ignored(impl: str) -> None:
    hidden, weight, _ = draw(4, 3, 7, torch.float32, torch.float32)
    labels = torch.full((4,), -100)
    assert math.isnan(pk.linear_cross_entropy(hidden, weight, labels, impl=impl))
    assert pk.linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=impl) == 0
    assert pk.linear_cross_entropy(hidden, weight, labels, denominator=5.0, impl=impl) == 0


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_zero_tokens(impl: str) -> None:
    hidden, weight = torch.empty(0, 3, requires_grad=True), torch.ones(7, 3, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64)
    assert pk.linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl).shape == (0,)
    pk.linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=impl).backward()
    assert torch.equal(weight.grad, torch.zeros(7, 3))
    assert hidden.grad.shape == (0, 3)


def test_micro_batches_with_one_denominator_equal_the_whole_batch() -> None:
    hidden, weight, labels = draw(30, 5, 40, torch.float64, torch.float64)
    whole = loss_and_grads([hidden, weight, labels], impl="torch")
    weight.requires_grad_()
    count = (labels != -100).sum()
    total = sum(
        pk.linear_cross_entropy(hidden[rows], weight, labels[rows], denominator=count, impl="torch")
        for rows in (slice(0, 7), slice(7, 30))
    )
    torch.testing.assert_close(total, whole[0])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_layout(layout: str) -> None:
    def strided(x: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return x.t().contiguous().t()
        if layout == "sliced":
            return torch.cat((x, x), 1)[:, : x.shape[1]]
        return x[:1].expand_as(x)

    hidden, weight, labels = draw(21, 6, 30, torch.float32, torch.float32)
    views = [strided(hidden), strided(weight)]
    want = loss_and_grads([*(v.contiguous() for v in views), labels], impl="torch")
    leaves = [v.detach().requires_grad_() for v in views]
    loss = pk.linear_cross_entropy(*leaves, labels, impl="torch")
    upstream = torch.randn((), generator=torch.Generator().manual_seed(9))
    for a, b in zip([loss, *torch.autograd.grad(loss, leaves, upstream)], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_float16_takes_small_gradients_of_tokens() -> None:
    """Of 1e-6, whose products with probabilities float16 does not have."""
    inputs = draw(20, 16, 50, torch.float16, torch.float32)
    inputs[1] = inputs[1].half().float()

    def gradients(tensors: list[torch.Tensor], impl: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[:2]]
        losses = pk.linear_cross_entropy(*leaves, tensors[2], reduction="none", impl=impl)
        return torch.autograd.grad(losses, leaves, torch.full_like(losses, 1e-6))

    want_hidden, want_weight = gradients([inputs[0].double(), inputs[1].double(), inputs[2]], "reference")
    got_hidden, got_weight = gradients(inputs, "torch")
    torch.testing.assert_close(got_weight.double(), want_weight, rtol=0, atol=2e-3 * want_weight.abs().max().item())
    torch.testing.assert_close(got_hidden.double(), want_hidden, rtol=0, atol=2.0**-24)  # the smallest number


def test_per_token_losses_take_an_expanded_gradient() -> None:
    hidden, weight, labels = draw(9, 4, 20, torch.float32, torch.float32)
    weight.requires_grad_()
    losses = pk.linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch")
    total = pk.linear_cross_entropy(hidden, weight, labels, reduction="sum", impl="torch")
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), weight), torch.autograd.grad(total, weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_two_runs_have_the_same_bits(reduction: str) -> None:
    inputs = draw(25, 6, 50, torch.bfloat16, torch.float32)
    copies = [t.clone() for t in inputs]
    runs = [loss_and_grads(inputs, impl="torch", reduction=reduction) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    weight = inputs[1].requires_grad_()
    loss = pk.linear_cross_entropy(*inputs, reduction=reduction, impl="torch").sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = draw(8, 4, 20, torch.float32, torch.float32)
    assert_flash_rule([hidden * 1e4, weight, labels])


HIDDEN, WEIGHT, LABELS = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, -100])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("wrong", [5, -1, -99])
def test_a_label_outside_the_vocabulary_is_named(wrong: int, impl: str) -> None:
    labels = torch.tensor([0, wrong, -100])
    message = f"labels: expected ids in [0, 5) or ignore_index -100, got {wrong} at position 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.linear_cross_entropy(HIDDEN, WEIGHT, labels, impl=impl)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(HIDDEN[None], WEIGHT, LABELS), "hidden: expected shape (N, d), got shape (1, 3, 4)"),
        (lambda f: f(HIDDEN, WEIGHT.t(), LABELS), "weight: expected shape (V, 4) with V >= 1, got shape (4, 5)"),
        (lambda f: f(HIDDEN, WEIGHT, LABELS[:2]), "labels: expected shape (3,), got shape (2,)"),
        (lambda f: f(HIDDEN, WEIGHT, LABELS.int()), "labels: expected int64, got torch.int32"),
        (lambda f: f(HIDDEN, WEIGHT, LABELS.to("meta")), "labels: expected the device of hidden (cpu), got meta"),
        (lambda f: f(HIDDEN, WEIGHT, LABELS, reduction="avg"), "reduction: expected one of mean, sum, none, got 'avg'"),
        (lambda f: f(HIDDEN, WEIGHT, LABELS, reduction="none", denominator=2.0), "denominator: expected None with"),
        (lambda f: f(HIDDEN, WEIGHT, LABELS, denominator=torch.ones(3)), "denominator: expected shape (), got shape"),
        (lambda f: f(HIDDEN, WEIGHT, LABELS, impl="liger"), "it has auto, reference, torch, triton"),
    ],
)
def test_bad_arguments(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(pk.linear_cross_entropy)
