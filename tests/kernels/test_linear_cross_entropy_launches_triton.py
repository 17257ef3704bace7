"""Linear cross entropy in Triton: what is launched, traced and compiled ahead of time, and what is never done.

What it computes is in test_linear_cross_entropy_triton.py. Both run in Triton's interpreter where there is no GPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico_kernels import _linear_cross_entropy as chunked
from pico_kernels import _linear_cross_entropy_kernels as kernels
from pico_kernels import _linear_cross_entropy_launch as launch
from pico_kernels import linear_cross_entropy_triton as fused
from pico_kernels._triton import PICO_SHAPES, interpreting
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cpu" if interpreting() else "cuda"
Launches = dict[str, list[dict[str, Any]]]

both_strategies = pytest.mark.parametrize("strategy", ["tiles", "chunks"])


def draw(tokens: int, dim: int, vocab: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states, a float32 weight, and labels of which every fifth is ignored."""
    generator = torch.Generator().manual_seed(tokens + 31 * vocab + 7 * dim)
    hidden = torch.randn(tokens, dim, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * dim**-0.5).to(DEVICE)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[4::5] = -100
    return [hidden, weight, labels.to(DEVICE)]


def gradients(
    inputs: list[torch.Tensor], strategy: str, reduction: str = "mean", needed: tuple[int, ...] = (0, 1)
) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs[:2])]
    loss = fused.linear_cross_entropy(*leaves, inputs[2], reduction=reduction, strategy=strategy)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    return torch.autograd.grad(loss, [leaves[i] for i in needed], upstream)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Keyword arguments of the launches of every kernel."""
    recorded: Launches = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.kernel = getattr(launch, name)
            self.keywords = recorded.setdefault(name, [])

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            def call(*args: Any, **keywords: Any) -> None:
                self.keywords.append({"grid": grid, **keywords})
                self.kernel[grid](*args, **keywords)

            return call

    for name in ("tiles_forward_kernel", "tiles_combine_kernel", "tiles_weight_kernel", "chunk_softmax_kernel"):
        monkeypatch.setattr(launch, name, Recorder(name))
    return recorded


@both_strategies
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradient_asked_for(needed: int, reduction: str, strategy: str, launches: Launches) -> None:
    inputs = draw(10, 4, 70, torch.bfloat16)
    (alone,) = gradients(inputs, strategy, reduction, (needed,))
    if strategy == "tiles":
        assert [x["GRADIENT"] for x in launches["tiles_forward_kernel"]] == [needed == 0]
        assert len(launches["tiles_weight_kernel"]) == needed
    assert alone.dtype == inputs[needed].dtype
    assert torch.equal(alone, gradients(inputs, strategy, reduction)[needed])


@both_strategies
def test_no_grad_launches_the_loss_alone(strategy: str, launches: Launches) -> None:
    inputs = draw(10, 4, 70, torch.float32)
    inputs[1].requires_grad_()
    with_grad = fused.linear_cross_entropy(*inputs, strategy=strategy)
    for recorded in launches.values():
        recorded.clear()
    with torch.no_grad():
        assert torch.equal(fused.linear_cross_entropy(*inputs, strategy=strategy), with_grad)
    assert not any(x["GRADIENT"] for recorded in launches.values() for x in recorded)
    assert not launches["tiles_weight_kernel"]


def test_the_work_is_split_by_shape_alone(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kernels.tile_config
    monkeypatch.setattr(
        launch, "tile_config", lambda dim, itemsize: dataclasses.replace(config(dim, itemsize), held=32, streamed=32)
    )
    monkeypatch.setattr(kernels, "_MIN_COLUMNS", 64)
    monkeypatch.setattr(kernels, "_MIN_TOKENS", 16)
    gradients(draw(40, 8, 150, torch.bfloat16), "tiles")
    assert launches["tiles_forward_kernel"][0]["grid"] == (2, 3)  # blocks of 32 tokens; parts of 64 columns
    assert launches["tiles_weight_kernel"][0]["grid"] == (5, 2)
    several = gradients(draw(40, 8, 150, torch.float32), "tiles")
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    one = gradients(draw(40, 8, 150, torch.float32), "tiles")
    assert launches["tiles_forward_kernel"][-1]["grid"] == (2, 1)
    for a, b in zip(several, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_chunks_follow_the_budget(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CPU_CHUNK_BYTES", 8192)
    monkeypatch.setattr(chunked, "_DEVICE_CHUNK_BYTES", 8192)
    gradients(draw(37, 8, 64, torch.float32), "chunks")
    assert sum(x["grid"][0] for x in launches["chunk_softmax_kernel"]) == 37
    assert len(launches["chunk_softmax_kernel"]) == 2  # 32 rows of 256 bytes fit


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (500, 500), (2000, 1024), (4096, 1024), (8192, 2048), (32768, 2560), (65536, 2560)]
)
def test_rows_of_a_chunk_on_a_gpu(tokens: int, rows: int) -> None:
    """bfloat16 at V 50304: 2,668 rows are 256 MiB; whole tiles, a quarter of the tokens, no fewer than 1,024."""
    hidden = torch.empty(tokens, 8, dtype=torch.bfloat16, device="meta")
    assert chunked._sizes(hidden, 50304).chunk == rows


class Watch(TorchDispatchMode):
    """Fails at operations that a GPU must not be asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.see(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def see(self, name: str, args: Any) -> None:
        raise NotImplementedError


class ForbidSyncs(Watch):
    """Operations through which the host waits for a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique")

    def see(self, name: str, args: Any) -> None:
        assert name not in self.FORBIDDEN, f"{name} makes the host wait"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index makes the host wait"


class ForbidRoundedScalars(Watch):
    """A narrow tensor with a 0-d tensor of a wider dtype, which a CUDA kernel rounds to the narrow one."""

    def see(self, name: str, args: Any) -> None:
        floating = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        narrowest = min((x.dtype.itemsize for x in floating if x.dim()), default=8)
        rounded = any(x.dim() == 0 and x.dtype.itemsize > narrowest for x in floating)
        assert not rounded, f"{name} rounds a 0-d tensor to the dtype of the other one"


@both_strategies
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("watch", [ForbidSyncs, ForbidRoundedScalars])
def test_the_host_never_waits_and_no_scalar_is_rounded(
    watch: type[Watch], dtype: torch.dtype, reduction: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":  # there the check of the labels waits and raises; the next test has that of a GPU
        monkeypatch.setattr(fused, "check_labels", lambda *_: None)
    hidden, weight, labels = draw(20, 8, 70, dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    count = torch.tensor(3.0, device=DEVICE) if reduction == "mean" else None
    with watch():
        loss = fused.linear_cross_entropy(
            *leaves, labels, reduction=reduction, denominator=count, z_loss=0.1, strategy=strategy
        )
        loss.backward(torch.ones_like(loss))


def test_the_check_of_labels_on_a_device_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with ForbidSyncs():
        fused.check_labels(torch.tensor([0, 69, -100], device=DEVICE), 70, -100)


def test_what_is_watched_for_is_seen() -> None:
    with ForbidSyncs(), pytest.raises(AssertionError, match="makes the host wait"):
        torch.ones(3).sum().item()
    with ForbidRoundedScalars(), pytest.raises(AssertionError, match="mul rounds"):
        torch.ones(3, 2, dtype=torch.bfloat16) * torch.tensor(0.3)


def test_a_wrong_strategy_is_named() -> None:
    with pytest.raises(ValueError, match="strategy: expected tiles or chunks, got 'tile'"):
        fused.linear_cross_entropy(*draw(2, 4, 7, torch.float32), strategy="tile")


def test_the_table_chooses_for_every_size() -> None:
    assert fused.choose_strategy(96, 2) == "tiles"
    assert fused.choose_strategy(96, 4) == "chunks"
    assert [fused.choose_strategy(shape.d_model, 2) for shape in PICO_SHAPES[1:]] == ["chunks"] * 3


@pytest.mark.parametrize(
    ("dim", "widths"),
    [(1, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (96, (64, 32)), (100, (128, 0)), (384, (256, 128))],
)
def test_widths_cover_the_columns_with_the_least_padding(dim: int, widths: tuple[int, int]) -> None:
    assert kernels.tile_widths(dim) == widths


@both_strategies
@pytest.mark.parametrize(("reduction", "needed"), [("mean", (0, 1)), ("none", (1,)), ("sum", (0,))])
def test_traces_as_one_graph(reduction: str, needed: tuple[int, ...], strategy: str) -> None:
    torch.compiler.reset()
    inputs = draw(9, 8, 40, torch.float32)
    leaves = [inputs[index].requires_grad_() for index in needed]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = fused.linear_cross_entropy(hidden.sin(), weight * 2, labels, reduction=reduction, strategy=strategy)
        return (found * 3).sum()

    eager, traced = loss(*inputs), torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_registered_ops_pass_opcheck() -> None:
    hidden, weight, labels = draw(5, 8, 40, torch.float32)
    ops = torch.ops.pico_kernels
    statistics = launch.tiles_forward(hidden, weight, labels, -100, 0.1, False)[1]
    token_grad = torch.ones(5, device=DEVICE)
    torch.library.opcheck(ops.linear_cross_entropy_tiles_weight, (token_grad, hidden, weight, labels, statistics))
    targets = labels.clamp_min(0)
    for grad, needs in ((None, (False, False)), (token_grad, (True, False)), (token_grad, (True, True))):
        torch.library.opcheck(ops.linear_cross_entropy_chunks, (hidden, weight, targets, 0.1, grad, *needs))
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(ops.linear_cross_entropy_tiles, (*leaves, labels, -100, 0.1, True))


@pytest.mark.parametrize("shape", PICO_SHAPES, ids=lambda shape: shape.name)
def test_ahead_of_time_cases_are_what_is_launched(shape: Any, launches: Launches) -> None:
    cases = {case.name: case for case in fused.aot_cases(shape)}
    gradients(draw(3, shape.d_model, 40, torch.bfloat16), fused.choose_strategy(shape.d_model, 2))
    launched = {name: keywords for name, keywords in launches.items() if keywords}
    assert launched
    for name, (keywords, *_) in launched.items():
        case = cases[f"linear_cross_entropy_{name.removesuffix('_kernel')}-bf16"]
        constants = {key: value for key, value in case.constexprs.items() if key != "UPCAST"}
        assert set(case.signature) == set(case.kernel.arg_names)
        assert constants.items() <= keywords.items()
        assert case.num_warps == keywords["num_warps"]
        assert case.num_stages == keywords.get("num_stages", 2)
