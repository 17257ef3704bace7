"""Running an op with gradients, and FlashAttention's error rule.

An output or gradient passes when ``max|got - truth| <= 2 * max|baseline - truth| + ulp``: truth is the twin in float64,
baseline the same-dtype PyTorch path, ulp one of the output's dtype at its largest true value (FlashAttention's tests,
github.com/Dao-AILab/flash-attention). Errors are reported in ulps of the inputs' dtype: the float32 gradient of a
weight of bfloat16 activations is as exact as they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pico_kernels.conformance_cases import Case, OpSpec, draw, lay_out

_MEANINGLESS = 1e4  # a limit of so many ulps: the truth cancelled to almost nothing, and its ulp measures nothing

Tensors = dict[tuple[str, str], torch.Tensor]
"""(``"forward"``, output) and (``"gradient"``, argument) to values."""


class Violation(Exception):
    """What was called broke the contract in a way that ends the check; the message is the reason."""


@dataclass(frozen=True)
class Deviation:
    """How far one output or gradient is off, in ulps of the inputs' dtype; ``problem`` says why it fails."""

    kind: str
    name: str
    error: float
    limit: float
    problem: str | None


@dataclass(frozen=True)
class Expected:
    """The truth and the baseline of a case, and the incoming gradients both were computed with."""

    truth: Tensors
    baseline: Tensors
    upstreams: tuple[torch.Tensor, ...]


def call(fn: Callable[..., Any], case: Case, tensors: Sequence[torch.Tensor], spec: OpSpec) -> tuple[torch.Tensor, ...]:
    """``fn``'s outputs as a tuple. Raises Violation unless they are as many tensors as the op has."""
    returned = fn(*tensors, *case.extra, **case.options)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    if len(outputs) != len(spec.outputs) or not all(isinstance(out, torch.Tensor) for out in outputs):
        got = ", ".join(type(out).__name__ for out in outputs)
        expected = "a tensor" if len(spec.outputs) == 1 else f"a tuple of {len(spec.outputs)} tensors"
        raise Violation(f"expected {expected}, got {got if len(outputs) == 1 else f'({got})'}")
    return outputs


def leaves(case: Case, wanted: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """The case's tensors, sharing their memory, of which ``wanted`` (default: all differentiable) require grad."""
    asked = case.differentiable if wanted is None else wanted
    return {name: t.detach().requires_grad_(name in asked) for name, t in case.tensors.items()}


def run(
    fn: Callable[..., Any],
    case: Case,
    spec: OpSpec,
    upstreams: Sequence[torch.Tensor],
    wanted: Sequence[str] | None = None,
) -> Tensors:
    """Outputs, and the gradients of ``wanted`` under the incoming gradients ``upstreams``."""
    arguments = leaves(case, wanted)
    outputs = call(fn, case, list(arguments.values()), spec)
    asked = {name: leaf for name, leaf in arguments.items() if leaf.requires_grad}
    return dict(zip((("forward", name) for name in spec.outputs), outputs, strict=True)) | gradients(
        outputs, asked, upstreams
    )


def gradients(
    outputs: Sequence[torch.Tensor],
    asked: dict[str, torch.Tensor],
    upstreams: Sequence[torch.Tensor],
    keep: bool = False,
) -> Tensors:
    """Gradients of the arguments ``asked`` for, through the outputs that have one. Raises Violation if none has."""
    if not asked:
        return {}
    through = [pair for pair in zip(outputs, upstreams, strict=True) if pair[0].requires_grad]
    if not through:
        raise Violation(f"no output requires grad though {', '.join(asked)} does: the backward was cut off")
    seeds = [grad.to(out.dtype) for out, grad in through]
    found = torch.autograd.grad(
        [out for out, _ in through], list(asked.values()), seeds, retain_graph=keep, allow_unused=True
    )
    missing = [name for name, grad in zip(asked, found, strict=True) if grad is None]
    if missing:
        raise Violation(f"no gradient for {', '.join(missing)}, which requires one")
    return {("gradient", name): grad for name, grad in zip(asked, found, strict=True)}


def expect(spec: OpSpec, case: Case, layout: str | None = None, summed: bool = False) -> Expected:
    """What a case must give. ``layout`` is that of the incoming gradients; ``summed``: all ones, all strides 0."""
    with torch.no_grad():
        shapes = call(spec.baseline, case, list(case.tensors.values()), spec)
    upstreams = []
    for index, out in enumerate(shapes):
        drawn = draw(tuple(out.shape), 11 + index, out.dtype, out.device)
        if summed:
            drawn = drawn.new_ones(()).expand(out.shape)
        upstreams.append(drawn if layout is None else lay_out(drawn, layout))
    wide = [grad.double().contiguous() for grad in upstreams]
    truth = run(spec.reference, case.double(), spec, wide)
    return Expected(truth, run(spec.baseline, case, spec, upstreams), tuple(upstreams))


def _place(flat: int, shape: torch.Size) -> str:
    return str(tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))) if shape else "the scalar"


def deviation(spec: OpSpec, case: Case, key: tuple[str, str], expected: Expected, got: torch.Tensor) -> Deviation:
    """One output or gradient against the truth: shape, dtype, device, NaN pattern, error."""
    kind, name = key
    got = got.detach()
    truth, baseline = expected.truth[key].detach(), expected.baseline[key].detach()
    for what, want, have in (
        ("shape", tuple(baseline.shape), tuple(got.shape)),
        ("dtype", baseline.dtype, got.dtype),
        ("device", baseline.device.type, got.device.type),
    ):
        if want != have:
            return Deviation(kind, name, math.inf, 0.0, f"expected {what} {want}, got {what} {have}")
    if not truth.numel():
        return Deviation(kind, name, 0.0, 0.0, None)
    wrong_nan = got.isnan() != truth.isnan()
    if wrong_nan.any():
        first = int(wrong_nan.flatten().nonzero()[0])
        said = "NaN" if bool(got.flatten()[first].isnan()) else "a number"
        other = "a number" if said == "NaN" else "NaN"
        count = int(wrong_nan.sum())
        return Deviation(
            kind, name, math.inf, 0.0, f"{said} at {_place(first, got.shape)} ({count} such), the twin has {other}"
        )
    known = ~truth.isnan()
    if not known.any():
        return Deviation(kind, name, 0.0, 0.0, None)
    zero = truth.new_zeros(())
    errors = torch.where(known, (got.double() - truth).abs(), zero)
    allowed = float(torch.where(known, (baseline.double() - truth).abs(), zero).max())
    largest = float(torch.where(known, truth, zero).abs().max())
    numbers = torch.finfo(got.dtype)
    ulp = max(numbers.eps * largest, numbers.tiny)
    unit = max(ulp, torch.finfo(case.tensors[spec.row_argument].dtype).eps * largest)
    error, limit = float(errors.max()), 2 * allowed + ulp + spec.slack(case, name, largest)
    problem = None
    if not error <= limit:  # so that an infinite or undefined error fails
        worst = int(errors.argmax())
        problem = (
            f"{float(got.flatten()[worst]):.9g} at {_place(worst, got.shape)}, "
            f"the float64 twin has {float(truth.flatten()[worst]):.9g}"
        )
    if problem is None and limit > _MEANINGLESS * unit:
        return Deviation(kind, name, math.nan, math.nan, None)
    return Deviation(kind, name, error / unit, limit / unit, problem)


def deviations(spec: OpSpec, case: Case, expected: Expected, got: Tensors) -> list[Deviation]:
    """Every output and gradient in ``got`` against the truth."""
    return [deviation(spec, case, key, expected, value) for key, value in got.items()]


def stray_nan(got: torch.Tensor, plain: torch.Tensor) -> str | None:
    """Where ``got`` is NaN and the same call on plain memory was not, in words; None if nowhere."""
    stray = got.detach().isnan() & ~plain.detach().isnan()
    if not stray.any():
        return None
    return f"NaN at {_place(int(stray.flatten().nonzero()[0]), got.shape)} ({int(stray.sum())} such)"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """``torch.empty`` and its kin return NaN, whichever language or thread they are called from.

    PyTorch does that in deterministic mode. Its warnings about operations that have no deterministic form are hidden.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class LargestTensor(TorchDispatchMode):
    """While it lasts, ``elements`` is the size of the largest tensor that any ATen call returned, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call and look: every allocation of PyTorch's is the result of such a call."""
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in made]
        self.elements = max(self.elements, *sizes, 0)
        return result
