"""SDPA's order of backends on Hopper: cuDNN first for one call, nothing left switched."""

import sys
from collections.abc import Iterator

import pico_kernels as pk
import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

sdpa = sys.modules["pico_kernels.attention_sdpa"]


def qkv(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 6, heads, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2)]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "cuda_capability", lambda device: 9)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The order of backends at each call of PyTorch's function; afterwards it is as it was."""
    seen = []
    original = functional.scaled_dot_product_attention

    def recording(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(torch._C._get_sdp_priority_order())
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recording)
    before = torch._C._get_sdp_priority_order()
    yield seen
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "cudnn"),
    [(torch.bfloat16, 64, True), (torch.float16, 128, True), (torch.float32, 64, False), (torch.bfloat16, 136, False)],
)
def test_cudnn_goes_first_on_hopper(orders: list, dtype: torch.dtype, head_dim: int, cudnn: bool) -> None:
    pk.attention(*qkv(dtype, head_dim), impl="sdpa")
    ((first, *_),) = orders
    assert (SDPBackend(first) == SDPBackend.CUDNN_ATTENTION) == cudnn


def test_elsewhere_the_order_is_pytorchs(orders: list, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch._C._get_sdp_priority_order()
    for capability in (0, 8, 10):
        monkeypatch.setattr(sdpa, "cuda_capability", lambda device, found=capability: found)
        pk.attention(*qkv(), impl="sdpa")
    assert orders == [before] * 3


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("switch", ["enable_cudnn_sdp", "enable_flash_sdp"])
def test_a_process_that_switched_a_backend_off_keeps_its_choice(orders: list, switch: str) -> None:
    before = torch._C._get_sdp_priority_order()
    enable = getattr(torch.backends.cuda, switch)
    enable(False)
    try:
        pk.attention(*qkv(), impl="sdpa")
    finally:
        enable(True)
    assert orders == [before]


@pytest.mark.usefixtures("hopper")
def test_the_changed_order_traces_as_one_graph() -> None:
    inputs = [t.requires_grad_() for t in qkv()]
    traced = torch.compile(lambda *a: pk.attention(*a, impl="sdpa"), backend="aot_eager", fullgraph=True)(*inputs)
    eager = pk.attention(*inputs, impl="sdpa")
    torch.testing.assert_close(traced, eager, rtol=2e-2, atol=1e-2)
    grads = (torch.autograd.grad(out.float().square().sum(), inputs) for out in (traced, eager))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_no_log_sum_exp() -> None:
    with pytest.raises(ValueError, match=r"return_lse: expected False with impl='sdpa'.*triton, flash_attn, torch and"):
        pk.attention(*qkv(), impl="sdpa", return_lse=True)
