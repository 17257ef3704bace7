"""The checks of the conformance tool. Each yields findings; :mod:`pico_kernels.conformance` puts them in a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pico_kernels._triton import interpreting
from pico_kernels.conformance_cases import LAYOUTS, Case, OpSpec, far_apart, guarded, lay_out
from pico_kernels.conformance_measure import (
    Deviation,
    Expected,
    LargestTensor,
    Tensors,
    call,
    deviations,
    expect,
    gradients,
    leaves,
    poisoned_allocations,
    run,
    same_bits,
    stray_nan,
)


@dataclass(frozen=True)
class Finding:
    """One thing seen in a check: ``problem`` is None if it was as it should be. Errors in output ulps, if measured."""

    check: str
    error: float = 0.0
    limit: float = math.inf
    problem: str | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Subject:
    """What is being checked, in one dtype.

    ``wrong`` collects the outputs and gradients that fail on plain contiguous inputs: what comes out of them in other
    layouts, or traced, says nothing about layouts or tracing.
    """

    fn: Callable[..., Any]
    spec: OpSpec
    dtype: torch.dtype
    device: torch.device
    quick: bool
    wrong: set[tuple[str, str]] = field(default_factory=set)

    @property
    def dtype_name(self) -> str:
        """``float32`` and the like."""
        return str(self.dtype).removeprefix("torch.")

    def cases(self) -> list[Case]:
        """The op's cases; if quick, the main ones and one more."""
        made = self.spec.cases(self.dtype, self.device)
        return (
            [*(case for case in made if case.main), *[case for case in made if not case.main][:1]]
            if self.quick
            else made
        )

    def main_cases(self) -> list[Case]:
        """The cases that stand for all where behaviour is checked."""
        return [case for case in self.cases() if case.main]

    def measured(self, check: str, case: Case, expected: Expected, got: Tensors, remark: str = "") -> Iterator[Finding]:
        """One finding per output and gradient, under one check's name; those that are wrong anyway are not judged."""
        for found in deviations(self.spec, case, expected, got):
            if (found.kind, found.name) in self.wrong:
                yield Finding(check, skipped=f"{found.kind} {found.name} not judged: wrong already on plain inputs")
            else:
                yield self.finding(check, case, found, f"{found.kind} {found.name}{remark}: ")

    def strays(self, check: str, case: Case, got: Tensors, plain: Tensors, said: str) -> Iterator[Finding]:
        """One finding per output and gradient: NaN that was not there on plain memory came from the poison."""
        for (kind, name), value in got.items():
            found = stray_nan(value, plain[kind, name])
            yield self.seen(check, case, found and f"{kind} {name} {said}: {found}")

    def finding(self, check: str, case: Case, found: Deviation, prefix: str) -> Finding:
        """A measured error as a finding."""
        problem = found.problem and f"{prefix}{found.problem} [{self.dtype_name}, {case.name}]"
        return Finding(check, found.error, found.limit, problem)

    def seen(self, check: str, case: Case, problem: str | None) -> Finding:
        """A finding without a measured error."""
        return Finding(check, problem=problem and f"{problem} [{self.dtype_name}, {case.name}]")


def accuracy(subject: Subject) -> Iterator[Finding]:
    """Forward and every gradient over all sizes; one row of the table per output, gradient and dtype."""
    for case in subject.cases():
        expected = expect(subject.spec, case)
        for found in deviations(subject.spec, case, expected, run(subject.fn, case, subject.spec, expected.upstreams)):
            if found.problem and case.main:
                subject.wrong.add((found.kind, found.name))
            what = found.name if found.kind == "forward" else f"of {found.name}"
            yield subject.finding(f"{found.kind} {what}, {subject.dtype_name}", case, found, "")


def strides(subject: Subject) -> Iterator[Finding]:
    """Inputs and incoming gradients in every memory layout, and the gradient of ``.sum()``, whose strides are all 0."""
    for case in subject.main_cases():
        for layout in LAYOUTS:
            changed = case.map(lambda t, layout=layout: lay_out(t, layout))  # type: ignore[misc]
            expected = expect(subject.spec, changed, layout)
            got = run(subject.fn, changed, subject.spec, expected.upstreams)
            yield from subject.measured(f"strides: {layout}", changed, expected, got)
        expected = expect(subject.spec, case, summed=True)
        got = run(subject.fn, case, subject.spec, expected.upstreams)
        yield from subject.measured("strides: gradient of sum()", case, expected, got)


def surroundings(subject: Subject) -> Iterator[Finding]:
    """Inputs between NaN: nothing of it may reach a result, and nothing may be written there."""
    check = "memory outside the inputs"
    for case in subject.cases():
        expected = expect(subject.spec, case)
        buffers: list[torch.Tensor] = []

        def fence(tensor: torch.Tensor, buffers: list[torch.Tensor] = buffers) -> torch.Tensor:
            inside, buffer = guarded(tensor)
            buffers.append(buffer)
            return inside

        changed = case.map(fence)
        upstreams = [fence(grad) for grad in expected.upstreams]
        before = [buffer.clone() for buffer in buffers]
        plain = run(subject.fn, case, subject.spec, expected.upstreams)
        got = run(subject.fn, changed, subject.spec, upstreams)
        yield from subject.strays(check, case, got, plain, "read from outside an input")
        same = all(same_bits(a, b) for a, b in zip(before, buffers, strict=True))
        yield subject.seen(check, case, None if same else "wrote to an input or beside it")


def uninitialised(subject: Subject) -> Iterator[Finding]:
    """Every element of every result is written: fresh allocations hold NaN."""
    for case in subject.cases():
        upstreams = expect(subject.spec, case).upstreams
        plain = run(subject.fn, case, subject.spec, upstreams)
        with poisoned_allocations():
            got = run(subject.fn, case, subject.spec, upstreams)
        yield from subject.strays("uninitialised memory", case, got, plain, "was not written everywhere")


def repeatable(subject: Subject) -> Iterator[Finding]:
    """Three runs have the same bits, forward and gradients."""
    for case in subject.cases():
        upstreams = expect(subject.spec, case).upstreams
        first = run(subject.fn, case, subject.spec, upstreams)
        again = [run(subject.fn, case.map(torch.clone), subject.spec, upstreams) for _ in range(2)]
        for (kind, name), value in first.items():
            differs = any(not same_bits(value, other[kind, name]) for other in again)
            problem = f"{kind} {name}: runs differ in their bits" if differs else None
            yield subject.seen("same bits in every run", case, problem)


def overwritten(subject: Subject) -> Iterator[Finding]:
    """Inputs and incoming gradients keep their bits, outputs have memory of their own, backward can run twice."""
    for case in subject.main_cases():
        upstreams = expect(subject.spec, case).upstreams
        arguments = leaves(case)
        kept = {name: t.detach().clone() for name, t in arguments.items()}
        grads = [grad.clone() for grad in upstreams]
        outputs = call(subject.fn, case, list(arguments.values()), subject.spec)

        def changed(arguments: Mapping[str, torch.Tensor] = arguments, kept: Mapping[str, torch.Tensor] = kept) -> str:
            return ", ".join(name for name, t in arguments.items() if not same_bits(t, kept[name]))

        written = changed()
        yield subject.seen("inputs unchanged", case, f"the forward wrote to {written}" if written else None)
        storages = {t.untyped_storage().data_ptr(): name for name, t in arguments.items() if t.numel()}
        for name, out in zip(subject.spec.outputs, outputs, strict=True):
            owner = storages.get(out.untyped_storage().data_ptr())
            yield subject.seen("outputs do not alias inputs", case, owner and f"{name} shares memory with {owner}")
        forward = [out.detach().clone() for out in outputs]
        asked = {name: arguments[name] for name in case.differentiable}
        first = gradients(outputs, asked, grads, keep=True)
        first = {key: grad.clone() for key, grad in first.items()}
        written = changed() if not written else ""
        yield subject.seen("inputs unchanged", case, f"the backward wrote to {written}" if written else None)
        names = zip(subject.spec.outputs, upstreams, grads, strict=True)
        touched = ", ".join(name for name, grad, used in names if not same_bits(grad, used))
        problem = f"the backward wrote to the incoming gradient of {touched}" if touched else None
        yield subject.seen("incoming gradients unchanged", case, problem)
        second = gradients(outputs, asked, [grad.clone() for grad in upstreams])
        differ = [name for (_, name), grad in first.items() if not same_bits(grad, second["gradient", name])]
        differ += [
            name
            for name, out, old in zip(subject.spec.outputs, outputs, forward, strict=True)
            if not same_bits(out, old)
        ]
        problem = (
            f"after a first backward, {', '.join(differ)} changed: saved memory was overwritten" if differ else None
        )
        yield subject.seen("backward twice", case, problem)


def asked_for(subject: Subject) -> Iterator[Finding]:
    """Each gradient alone, each output alone, and none at all."""
    check = "only the gradients asked for"
    spec = subject.spec
    for case in subject.main_cases():
        expected = expect(spec, case)
        for name in case.differentiable:
            got = run(subject.fn, case, spec, expected.upstreams, [name])
            yield from subject.measured(check, case, expected, got, f" with only {name} requiring one")
        outputs = call(subject.fn, case, list(leaves(case, ()).values()), spec)
        cut = any(out.requires_grad for out in outputs)
        yield subject.seen(check, case, "an output requires grad though no input does" if cut else None)
        with torch.no_grad():
            outputs = call(subject.fn, case, list(leaves(case).values()), spec)
        yield from subject.measured(check, case, expected, _named(spec, outputs), " under no_grad")
        for index, name in enumerate(spec.outputs if len(spec.outputs) > 1 else ()):
            grads = [_only(_one_output(fn, index), case, spec, expected.upstreams[index]) for fn in _pair(subject)]
            for argument, (got_grad, twin_grad) in zip(case.differentiable, zip(*grads, strict=True), strict=True):
                eps = torch.finfo(got_grad.dtype).eps  # two right results are both within a few ulps of the truth
                close = torch.allclose(got_grad.double(), twin_grad.double(), rtol=8 * eps, atol=32 * eps)
                problem = None if close else f"gradient of {argument} is wrong when only {name} is used"
                yield subject.seen("one output used", case, problem)


def _pair(subject: Subject) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return subject.fn, subject.spec.baseline


def _one_output(fn: Callable[..., Any], index: int) -> Callable[..., torch.Tensor]:
    return lambda *args, **options: fn(*args, **options)[index]


def _only(fn: Callable[..., torch.Tensor], case: Case, spec: OpSpec, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Gradients through one output; zeros for arguments it does not depend on."""
    arguments = leaves(case)
    out = fn(*arguments.values(), *case.extra, **case.options)
    asked = [arguments[name] for name in case.differentiable]
    found = torch.autograd.grad(out, asked, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(asked, found, strict=True)]


def _named(spec: OpSpec, outputs: tuple[torch.Tensor, ...]) -> Tensors:
    return {("forward", name): out for name, out in zip(spec.outputs, outputs, strict=True)}


def zero_rows(subject: Subject) -> Iterator[Finding]:
    """Empty inputs give empty outputs, empty gradients and, for shared weights, gradients of zero."""
    for case in subject.spec.empty(subject.dtype, subject.device):
        expected = expect(subject.spec, case)
        got = run(subject.fn, case, subject.spec, expected.upstreams)
        yield from subject.measured("zero rows", case, expected, got)


def nan_rows(subject: Subject) -> Iterator[Finding]:
    """One row of NaN leaves all other rows of the outputs as they are."""
    for case in subject.main_cases():
        if case.options.get("reduction") == "mean":
            continue  # every row is in the result
        poisoned = case.tensors[subject.spec.row_argument].clone()
        poisoned.flatten(0, -2)[1] = math.nan
        changed = dataclasses.replace(case, tensors={**case.tensors, subject.spec.row_argument: poisoned})
        expected = expect(subject.spec, changed)
        with torch.no_grad():
            outputs = call(subject.fn, changed, list(changed.tensors.values()), subject.spec)
        yield from subject.measured("NaN stays in its row", changed, expected, _named(subject.spec, outputs))


def large_offsets(subject: Subject) -> Iterator[Finding]:
    """Rows 2^31 elements apart, where int32 offsets wrap; 8.6 GB of address space, of which little is touched."""
    check = "offsets beyond 2^31"
    if subject.dtype.itemsize > 2:
        return
    case = subject.main_cases()[0]
    rows = subject.spec.row_argument
    first = case.tensors[rows].shape[0]
    small = case.map(lambda t: t[:2] if t.dim() and t.shape[0] == first else t)
    try:
        far = far_apart(small.tensors[rows])
    except (RuntimeError, MemoryError) as error:
        yield Finding(check, skipped=f"cannot allocate 2^32 elements: {str(error).splitlines()[0][:80]}")
        return
    changed = dataclasses.replace(small, tensors={**small.tensors, rows: far})
    expected = expect(subject.spec, small)
    got = run(subject.fn, changed, subject.spec, expected.upstreams)
    yield from subject.measured(check, changed, expected, got)


def memory(subject: Subject) -> Iterator[Finding]:
    """What the op promises not to hold is never a tensor: on a large call, no tensor has that many elements."""
    if subject.spec.large is None or subject.dtype.itemsize > 2:
        return
    what, elements_of = subject.spec.forbidden
    check = f"{what} never in memory"
    if subject.fn is subject.spec.reference:
        yield Finding(check, skipped="this is the twin: it is the specification, and holds them")
        return
    if interpreting():
        yield Finding(check, skipped="a large call takes minutes in Triton's interpreter")
        return
    case = subject.spec.large(subject.dtype, subject.device)
    with LargestTensor() as largest:
        run(subject.fn, case, subject.spec, [torch.ones((), device=subject.device)])
    elements = elements_of(case)
    held = f"a tensor of {largest.elements} elements where {what} are {elements}"
    yield subject.seen(check, case, held if largest.elements >= elements else None)


def traced(subject: Subject) -> Iterator[Finding]:
    """``torch.compile(fullgraph=True)``, forward and gradients; CPUs use ``aot_eager``, which needs no C++ compiler."""
    backend = "inductor" if subject.device.type == "cuda" else "aot_eager"
    torch._dynamo.reset()
    for case in subject.main_cases():
        expected = expect(subject.spec, case)
        compiled = torch.compile(subject.fn, fullgraph=True, dynamic=False, backend=backend)
        got = run(compiled, case, subject.spec, expected.upstreams)
        yield from subject.measured("torch.compile", case, expected, got)


Check = Callable[[Subject], Iterator[Finding]]

CHECKS: Mapping[str, Check] = {
    "forward and gradients": accuracy,
    "strides": strides,
    "memory outside the inputs": surroundings,
    "uninitialised memory": uninitialised,
    "same bits in every run": repeatable,
    "NaN stays in its row": nan_rows,
    "zero rows": zero_rows,
    "inputs unchanged": overwritten,
    "only the gradients asked for": asked_for,
    "offsets beyond 2^31": large_offsets,
    "memory": memory,
    "torch.compile": traced,
}
"""Checks in the order of the table; the name is the row's if the check raises."""

NOT_QUICK = ("offsets beyond 2^31", "memory")
