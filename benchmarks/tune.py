"""Times other launch configurations of an op's Triton kernels: ``python -m benchmarks.tune attention``.

For each published size, one configuration function after the other, one field after the other: a value that makes
forward and backward at least 2 % faster, and whose results pass the benchmarks' gate, is kept. What is printed is for
the configuration functions; nothing is changed on disk. ``--rehearse`` tries the command on a CPU at a tiny size.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

KNOBS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "rms_norm": (("rms_norm_triton", "forward_config"), ("rms_norm_triton", "backward_config")),
    "rope": (("rope_triton", "rope_config"),),
    "swiglu": (("swiglu_triton", "swiglu_config"),),
    "attention": tuple(("attention_triton", f"{part}_config") for part in ("forward", "query", "key")),
    "linear_cross_entropy": (("_linear_cross_entropy_launch", "tile_config"),),
}
"""Op to its configuration functions, by the module that calls them."""

GAIN = 1.02  # of two runs of one kernel, one is up to so much faster
_REPETITIONS = 9


class Override:
    """A configuration function whose results are changed in some fields; keeps the last unchanged one."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original
        self.changes: dict[str, int] = {}
        self.seen: Any = None

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The changed configuration."""
        self.seen = self._original(*args, **keywords)
        return dataclasses.replace(self.seen, **self.changes)


@contextmanager
def overridden(module_name: str, function: str) -> Iterator[Override]:
    """The function, replaced while this lasts."""
    module = importlib.import_module(f"pico_kernels.{module_name}")
    original = getattr(module, function)
    override = Override(original)
    setattr(module, function, override)
    try:
        yield override
    finally:
        setattr(module, function, original)


def alternatives(name: str, value: Any) -> list[int]:
    """Other values of a field: warps and stages from a list, sizes halved and doubled."""
    if not isinstance(value, int) or isinstance(value, bool):
        return []
    if name == "num_stages":
        tried = [1, 2, 3, 4]
    elif name == "num_warps":
        tried = [2, 4, 8]
    else:
        tried = [value // 2, value * 2]
    return [other for other in tried if other != value and other > 0]


def search(override: Override, time_of: Callable[[], float | None]) -> tuple[float | None, float | None]:
    """Seconds with the current and with the best configuration, which stays in ``override``; None: it does not run."""
    current = best = time_of()
    for field in dataclasses.fields(override.seen) if override.seen is not None else ():
        for value in alternatives(field.name, getattr(override.seen, field.name)):
            kept = override.changes
            override.changes = kept | {field.name: value}
            seconds = time_of()
            if seconds is not None and (best is None or seconds * GAIN < best):
                best = seconds
            else:
                override.changes = kept
    return current, best


def tune(op: str, rehearse: bool) -> Iterator[str]:
    """One line per size and configuration function."""
    import torch

    from benchmarks.kernel_cases import Case, cases
    from benchmarks.kernel_clocks import clock_for
    from benchmarks.kernel_opponents import make_inputs, opponents
    from benchmarks.kernel_timing import Gate, incoming

    device = torch.device("cpu" if rehearse else "cuda")
    clock = clock_for(device)
    first = {case.shape.name: case for case in reversed(cases([op]))}  # the most telling case of each size
    tiny = dataclasses.replace(first["tiny"].shape, vocab=131)
    for case in [Case(op, tiny, 16, seq_len=8)] if rehearse else first.values():
        (ours,) = [opponent for opponent in opponents(case, device)[0] if opponent.name == "triton"]
        inputs = make_inputs(case, device)
        grads = incoming(ours, inputs)
        gate = Gate(inputs, grads)
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)

        def step() -> None:
            torch.autograd.grad(ours.call(*leaves), leaves, grads)  # noqa: B023

        def time_of() -> float | None:
            if gate.why_wrong(ours) is not None:  # noqa: B023
                return None
            return statistics.median(clock.seconds(step, 1e-3) for _ in range(1 if rehearse else _REPETITIONS))

        for module, function in KNOBS[op]:
            with overridden(module, function) as override:
                current, best = search(override, time_of)
            said = f"{case.name} {function}: {override.seen or 'not called: another strategy'}"
            if current is not None and best is not None and override.changes:
                said += f" {current * 1e6:.1f} us -> {override.changes} {best * 1e6:.1f} us"
            elif current is not None:
                said += f" {current * 1e6:.1f} us, none better"
            yield said


def main(argv: list[str] | None = None) -> int:
    """Print the lines; exit code 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("op", choices=KNOBS)
    parser.add_argument("--rehearse", action="store_true", help="a tiny size on the CPU")
    arguments = parser.parse_args(argv)
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, or it does not interpret
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        sys.stderr.write(f"benchmarks.tune: no GPU: torch {torch.__version__} sees no CUDA device\n")
        return 2
    for line in tune(arguments.op, arguments.rehearse):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
