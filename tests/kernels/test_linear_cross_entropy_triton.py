"""Linear cross entropy in Triton: float64 accuracy of both strategies, splits, gradients asked for, layouts, tracing.

Runs on a GPU where there is one, else in Triton's interpreter (see conftest.py). Vocabularies are small and tiles are
made smaller still, so that every loop turns several times.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pico_kernels as pk
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico_kernels import _linear_cross_entropy as chunked
from pico_kernels import _linear_cross_entropy_kernels as kernels
from pico_kernels import _linear_cross_entropy_launch as launch
from pico_kernels import linear_cross_entropy_triton as fused
from pico_kernels._triton import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRATEGIES = ["tiles", "chunks"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and budgets under which a few tokens and ids make several blocks, parts and chunks."""
    config = kernels.tile_config

    def small(dim: int, itemsize: int) -> kernels.TileConfig:
        return dataclasses.replace(config(dim, itemsize), held=32, streamed=32)

    monkeypatch.setattr(launch, "tile_config", small)
    monkeypatch.setattr(kernels, "_MIN_COLUMNS", 64)
    monkeypatch.setattr(kernels, "_MIN_TOKENS", 16)
    monkeypatch.setattr(launch, "_SOFTMAX_BLOCK", 128)
    monkeypatch.setattr(chunked, "_CPU_CHUNK_BYTES", 8192)
    monkeypatch.setattr(chunked, "_DEVICE_CHUNK_BYTES", 8192)


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both strategies, whatever the table says."""
    monkeypatch.setattr(fused, "choose_strategy", lambda dim, itemsize: request.param)
    return request.param


def draw(tokens: int, dim: int, vocab: int, dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    """Hidden states, a float32 weight whose numbers ``dtype`` has, and labels of which a fifth are ignored."""
    generator = torch.Generator().manual_seed(tokens + 31 * vocab + 7 * dim)
    hidden = (torch.randn(tokens, dim, generator=generator) * scale).to(DEVICE, dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * dim**-0.5).to(DEVICE, dtype).float()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = -100
    return [hidden, weight, labels.to(DEVICE)]


def loss_and_grads(inputs: list[torch.Tensor], impl: str = "triton", **options: Any) -> list[torch.Tensor]:
    """Loss and both gradients, through the public function."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in inputs[:2])
    loss = pk.linear_cross_entropy(hidden, weight, inputs[2], impl=impl, **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, loss.dtype)
    return [loss, *torch.autograd.grad(loss, (hidden, weight), upstream)]


def assert_flash_rule(inputs: list[torch.Tensor], **options: Any) -> None:
    """Error against float64 at most twice the same-dtype PyTorch path's, plus one ulp of the largest value.

    As in test_linear_cross_entropy.py, the cancellation in ``p - 1`` is always allowed its float32 error.
    """
    truth = loss_and_grads([inputs[0].double(), inputs[1].double(), inputs[2]], "reference", **options)
    base = loss_and_grads(inputs, "reference", **options)
    ours = loss_and_grads(inputs, **options)
    operands = (torch.zeros(1), inputs[1], inputs[0])
    for name, operand, want, other, got in zip(("loss", "hidden", "weight"), operands, truth, base, ours, strict=True):
        assert (got.dtype, got.shape) == (other.dtype, other.shape)
        assert torch.equal(got.isnan(), want.isnan())
        if want.isnan().all():
            continue
        eps = torch.finfo(got.dtype if name == "loss" else inputs[0].dtype).eps
        bound = 2 * (other.double() - want).abs().max() + eps * want.abs().max()
        bound += 32 * torch.finfo(torch.float32).eps * max(1, operand.double().abs().max())
        assert (got.double() - want).abs().max() <= bound, name


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim", "vocab"), [(1, 8, 131), (37, 24, 70), (5, 96, 131), (3, 100, 209)])
def test_accuracy(tokens: int, dim: int, vocab: int, dtype: torch.dtype, strategy: str) -> None:
    assert_flash_rule(draw(tokens, dim, vocab, dtype), z_loss=1e-2)


@pytest.mark.usefixtures("nan_poisoned")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    dim=st.integers(1, 48),
    vocab=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    denominator=st.sampled_from([None, 7.0, "tensor"]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    scale=st.sampled_from([1.0, 8.0]),
    name=st.sampled_from(STRATEGIES),
)
def test_accuracy_of_drawn_sizes(
    tokens: int,
    dim: int,
    vocab: int,
    dtype: torch.dtype,
    reduction: str,
    denominator: float | str | None,
    z_loss: float,
    scale: float,
    name: str,
) -> None:
    if reduction == "none":
        denominator = None
    elif denominator == "tensor":
        denominator = torch.tensor(11.0, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "choose_strategy", lambda dim, itemsize: name)
        inputs = draw(tokens, dim, vocab, dtype, scale)
        assert_flash_rule(inputs, reduction=reduction, denominator=denominator, z_loss=z_loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sure_tokens_keep_their_small_gradients(reduction: str) -> None:
    """Where p of the label is 1 to the float, ``p - 1`` is 0 in float32; the tiles sum the others instead."""
    hidden, weight, labels = draw(9, 16, 40, torch.float32)
    weight[labels.clamp_min(0)] += 1.5 * hidden
    inputs = [hidden, weight, labels]
    want = loss_and_grads([hidden.double(), weight.double(), labels], "reference", reduction=reduction)[1]
    got = fused_gradients(inputs, "tiles", reduction)[0]
    largest = want.abs().amax(1)
    sure = (labels >= 0) & (largest < 1e-8)
    assert sure.any()
    assert ((got[sure].double() - want[sure]).abs().amax(1) <= 1e-4 * largest[sure]).all()


def fused_gradients(inputs: list[torch.Tensor], name: str, reduction: str) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs[:2]]
    loss = fused.linear_cross_entropy(*leaves, inputs[2], reduction=reduction, strategy=name)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, loss.dtype)
    return torch.autograd.grad(loss, leaves, upstream)


def test_float16_keeps_gradients_below_its_smallest_number() -> None:
    inputs = draw(20, 16, 50, torch.float16)
    hidden, weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    scale = 2.0**-26
    loss = fused.linear_cross_entropy(hidden, weight, inputs[2], reduction="sum", strategy="tiles")
    (small,) = torch.autograd.grad(loss * scale, weight, retain_graph=True)
    (whole,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(small / scale, whole, rtol=1e-5, atol=0)
    (zero,) = torch.autograd.grad(
        fused.linear_cross_entropy(hidden, weight, inputs[2], reduction="sum", strategy="tiles") * 0, weight
    )
    assert torch.equal(zero, torch.zeros_like(zero))


def test_float16_takes_small_gradients_of_tokens(strategy: str) -> None:
    """Of 1e-6 each, whose products with probabilities float16 does not have; one of infinity stays in its row."""
    inputs = draw(20, 16, 50, torch.float16)
    inputs[2][3] = 1
    small = torch.linspace(1e-7, 1e-6, 20, device=DEVICE)

    def gradients(tensors: list[torch.Tensor], upstream: torch.Tensor, impl: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[:2]]
        losses = pk.linear_cross_entropy(*leaves, tensors[2], reduction="none", impl=impl)
        return torch.autograd.grad(losses, leaves, upstream.to(losses.dtype))

    wide = [inputs[0].double(), inputs[1].double(), inputs[2]]
    want_hidden, want_weight = gradients(wide, small, "reference")
    got_hidden, got_weight = gradients(inputs, small, "triton")
    torch.testing.assert_close(got_weight.double(), want_weight, rtol=0, atol=2e-3 * want_weight.abs().max().item())
    torch.testing.assert_close(got_hidden.double(), want_hidden, rtol=0, atol=2.0**-24)  # the smallest number
    small[3] = math.inf
    rest = torch.arange(20, device=DEVICE) != 3
    assert torch.equal(gradients(inputs, small, "triton")[0][rest], got_hidden[rest])


def test_large_logits_stay_finite(strategy: str) -> None:
    assert_flash_rule(draw(8, 4, 20, torch.float32, 1e4))


def test_float64_and_no_tokens_are_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    twin = fused.linear_cross_entropy_torch
    monkeypatch.setattr(
        fused, "linear_cross_entropy_torch", lambda *args, **options: seen.append(1) or twin(*args, **options)
    )
    hidden, weight, labels = draw(6, 3, 5, torch.float64)
    leaves = (hidden.requires_grad_(), weight.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: pk.linear_cross_entropy(h, w, labels, impl="triton"), leaves)
    seen.clear()
    loss, grad_hidden, grad_weight = loss_and_grads([hidden[:0].float(), weight, labels[:0]], reduction="sum")
    assert seen == [1]
    assert loss == 0
    assert grad_hidden.shape == (0, 3)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.usefixtures("nan_poisoned")
def test_ignored_tokens_have_no_loss_and_no_gradient(strategy: str) -> None:
    hidden, weight, labels = draw(12, 8, 70, torch.float32)
    labels[3:9] = -100
    hidden[5] = 1e6
    for reduction in ("none", "mean"):
        loss, grad_hidden, _ = loss_and_grads([hidden, weight, labels], reduction=reduction, z_loss=0.1)
        assert torch.equal(grad_hidden[3:9], torch.zeros_like(hidden[3:9]))
        assert reduction == "mean" or torch.equal(loss[3:9], torch.zeros_like(loss[3:9]))


def test_an_id_as_ignore_index(strategy: str) -> None:
    hidden, weight, labels = draw(12, 8, 70, torch.float32)
    labels = labels.clamp_min(3)
    assert_flash_rule([hidden, weight, labels], ignore_index=3, z_loss=0.1)


def test_every_token_ignored(strategy: str) -> None:
    hidden, weight, labels = draw(4, 3, 7, torch.float32)
    inputs = [hidden, weight, torch.full_like(labels, -100)]
    loss, *gradients = loss_and_grads(inputs)
    assert math.isnan(loss.detach())
    assert all(grad.isnan().all() for grad in gradients)
    for options in ({"reduction": "sum"}, {"denominator": 5.0}):
        assert all(torch.equal(x, torch.zeros_like(x)) for x in loss_and_grads(inputs, **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_in_every_run(reduction: str, strategy: str) -> None:
    inputs = draw(25, 6, 70, torch.bfloat16)
    copies = [t.clone() for t in inputs]
    runs = [loss_and_grads(inputs, reduction=reduction) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    weight = inputs[1].requires_grad_()
    loss = pk.linear_cross_entropy(*inputs, reduction=reduction, impl="triton").sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the shape of ``x`` and other strides, between NaN."""
    apart = x.new_full((x.shape[0], x.shape[1] + 3), math.nan)
    apart[:, 1:-2] = x
    return {
        "transposed": x.t().contiguous().t(),
        "sliced": apart[:, 1:-2],
        "expanded": x[:1].expand_as(x),
        "every_second": torch.stack((torch.full_like(x, math.nan), x), -1).flatten(1)[:, 1::2],
    }


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1))))
def test_any_layout(layout: str, strategy: str) -> None:
    hidden, weight, labels = draw(21, 6, 70, torch.float32)
    views = [layouts(hidden)[layout], layouts(weight)[layout]]
    strided_labels = torch.stack((labels, torch.full_like(labels, -1)), 1)[:, 0]
    results = []
    for tensors in ([*views, strided_labels], [*(v.contiguous() for v in views), labels]):
        leaves = [v.detach().requires_grad_() for v in tensors[:2]]
        losses = pk.linear_cross_entropy(*leaves, tensors[2], reduction="none", impl="triton")
        upstream = torch.linspace(-1, 1, 42, device=DEVICE)[::2]
        results.append([losses, *torch.autograd.grad(losses, leaves, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # a product may add other strides in another order


@pytest.mark.skipif(not interpreting(), reason="a sparse file stands for 8 GiB of memory")
@pytest.mark.parametrize("which", ["hidden", "weight", "logits"])
def test_offsets_beyond_int32(which: str, tmp_path: Path) -> None:
    # The view starts in the middle: an offset that wrapped would read zeros below it instead of crashing.
    start, stride = 2**31, 2**30 + 8
    sparse = tmp_path / "sparse"
    storage = torch.from_file(str(sparse), shared=True, size=2**32 + 128, dtype=torch.float16)
    sparse.unlink()  # the mapping keeps it
    far = storage.as_strided((3, 8), (stride, 1), start)
    hidden, weight, labels = draw(3, 8, 3, torch.float16)
    tensors = {"hidden": hidden, "weight": weight.half(), "logits": hidden.clone()}
    near = tensors[which].clone()
    far.copy_(near)
    results = []
    for tensor in (far, near):
        tensors[which] = tensor
        if which == "logits":
            losses = fused.ChunkSoftmax(tensor, 3, 0.1)(tensor, labels, torch.ones(3))
            results.append([losses, tensor])
        else:
            results.append(fused_gradients([tensors["hidden"], tensors["weight"], labels], "tiles", "none"))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion ends the process: test_gpu.py has it in its own")
@pytest.mark.parametrize("wrong", [70, -1, 2**40])
def test_a_label_outside_the_vocabulary(wrong: int, strategy: str) -> None:
    hidden, weight, labels = draw(5, 4, 70, torch.float32)
    labels[1] = wrong
    message = f"labels: expected ids in [0, 70) or ignore_index -100, got {wrong} at position 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.linear_cross_entropy(hidden, weight, labels, impl="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: inf - inf
@pytest.mark.parametrize("wrong", [70, 71, -1, 2**31 + 3, 2**40])
def test_kernels_follow_no_label_outside_the_vocabulary(
    wrong: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the kernels run before the assertion is seen: the other tokens stay right, nothing is read outside."""
    monkeypatch.setattr(fused, "check_labels", lambda *_: None)
    storage = torch.full((72, 4), math.nan, device=DEVICE)
    hidden, weight, labels = draw(5, 4, 70, torch.float32)
    labels[:] = torch.tensor([3, 69, 0, 7, 1])
    expected = loss_and_grads([hidden, weight, labels], reduction="none")
    storage[1:71] = weight
    labels[1] = wrong
    losses, grad_hidden, grad_weight = loss_and_grads([hidden, storage[1:71], labels], reduction="none")
    others = [0, 2, 3, 4]
    assert torch.equal(losses[others], expected[0][others])
    assert torch.equal(grad_hidden[others], expected[1][others])
    assert not grad_weight[:69].isnan().any()
