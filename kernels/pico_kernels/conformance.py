"""Check any implementation of an op against its twin.

``python -m pico_kernels.conformance my_pkg.mod:my_fn --op rms_norm`` prints a table of checks and exits with 1 if one
failed, 2 if it was called wrongly. The rule for errors: :mod:`pico_kernels.conformance_measure`. The checks:
:mod:`pico_kernels.conformance_checks`. How to write a kernel of one's own: docs/kernels.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pico_kernels._dispatch import near_miss, resolve
from pico_kernels.conformance_cases import SPECS
from pico_kernels.conformance_checks import CHECKS, NOT_QUICK, Finding, Subject
from pico_kernels.conformance_interpreter import bfloat16_rounds_to_nearest
from pico_kernels.conformance_measure import Violation
from pico_kernels.kernel_set import OPS, import_callable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Args:
        check: what was checked.
        passed: False if anything in it was wrong.
        error: the largest, in ulps of the inputs' dtype at the largest true value; NaN where none was measured.
        limit: what was allowed where the error was largest in proportion; NaN likewise.
        reason: why it failed or was skipped, in one line; empty otherwise.
        skipped: it could not be checked here; counts as passed.
    """

    check: str
    passed: bool
    error: float
    limit: float
    reason: str
    skipped: bool = False


def check(
    fn: Callable[..., Any],
    op: str,
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = tuple(DTYPES.values()),
    quick: bool = False,
) -> list[Result]:
    """Check ``fn``, which has the signature of op ``op``, against the op's twin.

    Args:
        fn: called as a :class:`~pico_kernels.KernelSet` member is: valid arguments, no ``impl``.
        op: a name in :data:`pico_kernels.OPS`.
        device: where the tensors are.
        dtypes: of the inputs; float32, bfloat16 and float16.
        quick: fewer sizes, no large tensors.

    Returns one result per row of the table, failures included. Raises ValueError for an unknown op or no dtype.
    """
    if op not in SPECS:
        raise ValueError(f"check: op: expected one of {', '.join(SPECS)}, got {op!r}{near_miss(op, SPECS)}")
    if not dtypes:
        raise ValueError("check: dtypes: expected at least one dtype, got none")
    rows: dict[str, list[Finding]] = {}
    subjects = [Subject(fn, SPECS[op], dtype, torch.device(device), quick) for dtype in dtypes]
    for name, run_check in CHECKS.items():
        if quick and name in NOT_QUICK:
            continue
        for subject in subjects:
            with bfloat16_rounds_to_nearest():
                for finding in _guarded(name, run_check, subject):
                    rows.setdefault(finding.check, []).append(finding)
    return [_result(name, findings) for name, findings in rows.items()]


def _guarded(name: str, run_check: Callable[[Subject], Iterator[Finding]], subject: Subject) -> Iterator[Finding]:
    """The check's findings; an exception in what is being checked is one of them."""
    try:
        yield from run_check(subject)
    except Violation as violation:
        yield Finding(name, math.nan, math.nan, f"{violation} [{subject.dtype_name}]")
    except (Exception, SystemExit) as error:  # what is being checked may raise anything
        first_line = (str(error).strip().splitlines() or [""])[0]
        yield Finding(name, math.nan, math.nan, f"{type(error).__name__}: {first_line} [{subject.dtype_name}]")


def _result(name: str, findings: list[Finding]) -> Result:
    measured = [f for f in findings if math.isfinite(f.limit) and f.limit > 0]
    worst = max(measured, key=lambda f: f.error / f.limit, default=Finding(name, math.nan, math.nan))
    problems = [f.problem for f in findings if f.problem]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    reason = problems[0] + more if problems else next((f.skipped for f in findings if f.skipped), "")
    skipped = not problems and any(f.skipped for f in findings)
    return Result(name, not problems, worst.error, worst.limit, reason, skipped)


def table(results: Sequence[Result]) -> str:
    """The results as aligned text."""
    width = max(len("check"), *(len(result.check) for result in results))
    lines = [f"{'check':<{width}}  {'result':<7}  {'error':>8}  {'limit':>8}  reason"]
    for result in results:
        said = "skipped" if result.skipped else "passed" if result.passed else "FAILED"
        numbers = "  ".join(f"{'' if math.isnan(n) else format(n, '.3g'):>8}" for n in (result.error, result.limit))
        lines.append(f"{result.check:<{width}}  {said:<7}  {numbers}  {result.reason}".rstrip())
    return "\n".join(lines)


def _target(name: str, op: str, device_type: str) -> Callable[..., Any]:
    """The callable at ``package.module:function``, or our implementation of that name. Raises ValueError."""
    return import_callable(name) if ":" in name else resolve(op, OPS[op], name, device_type)


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Callable[..., Any], list[torch.dtype]]:
    parser = argparse.ArgumentParser(
        prog="python -m pico_kernels.conformance",
        description="Check an implementation of an op against its twin. Exit status 1: a check failed, 2: wrong usage.",
    )
    parser.add_argument("target", help="package.module:function, or one of ours: torch, triton, reference, ...")
    parser.add_argument("--op", required=True, help=", ".join(SPECS))
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default=",".join(DTYPES), help=f"comma-separated (default: {','.join(DTYPES)})")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, no large tensors")
    options = parser.parse_args(arguments)
    if options.op not in SPECS:
        parser.error(f"--op: expected one of {', '.join(SPECS)}, got {options.op!r}{near_miss(options.op, SPECS)}")
    names = [_SHORT.get(name, name) for name in options.dtype.split(",")]
    for name in names:
        if name not in DTYPES:
            parser.error(f"--dtype: expected some of {', '.join(DTYPES)}, got {name!r}{near_miss(name, DTYPES)}")
    try:
        device = torch.device(options.device)
        if device.type == "meta":
            raise ValueError("--device: 'meta' holds no numbers to compare")
        torch.empty(0, device=device)
        fn = _target(options.target, options.op, device.type)
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        parser.error(f"--device: {options.device!r} cannot be used: {str(error).splitlines()[0]}")
    return options, fn, [DTYPES[name] for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options, fn, dtypes = _parse(arguments)
    results = check(fn, options.op, options.device, dtypes, options.quick)
    failed = sum(not result.passed for result in results)
    print(f"{options.op}: {options.target} on {options.device}; errors in ulps of the inputs' dtype\n")
    print(table(results))
    print(f"\n{len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
