"""Time and memory of the loss on a CPU, ours against PyTorch's: ``python -m benchmarks.loss_cpu``.

Forward and backward of the cross entropy of a linear head with a float32 weight, everyone in turn in one process, so
that other work on the machine hits all alike: the least time of ``--rounds`` counts, and the ratios more than that.
What differs from the reference is not timed. Peak memory above the inputs is measured for each in a process of its own
(Linux).
"""

from __future__ import annotations

import pico_fast  # noqa: F401 (first: it sets what OpenMP reads when torch is imported)

# isort: split
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pico_kernels import OPS
from torch.nn import functional

from benchmarks.train_step import peak_resident_bytes

VOCAB = 50304
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight.to(hidden.dtype)).float(), labels)


def _native(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels)


def _native_chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]  # torch 2.13
    return functional.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels, options=options)


def contestants() -> dict[str, Loss]:
    """Name to loss, ours first.

    ``F`` computes in the dtype of its input and without options writes all logits. Its chunks are wrong in bfloat16 on
    a CPU (torch 2.13 adds up the losses in it: 4.0 for 11.35 at 2,048 tokens).
    """
    ours: dict[str, Loss] = {name: OPS["linear_cross_entropy"][name] for name in ("torch", "reference")}
    ours["plain"] = _plain
    if hasattr(functional, "linear_cross_entropy"):
        ours |= {"F": _native, "F chunked": _native_chunked}
    return ours


def draw(tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states and a float32 weight of the size of an initial head's, both requiring gradients, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, width, generator=generator) / width**0.5).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (tokens,), generator=generator)


def step(loss: Loss, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The loss and both gradients."""
    value = loss(*inputs)
    return value, *torch.autograd.grad(value, inputs[:2])


def error(loss: Loss, inputs: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> float:
    """The largest difference of loss and gradients from ``truth``, relative to the largest value of each."""
    pairs = zip(step(loss, inputs), truth, strict=True)
    return max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs)


def times(
    names: list[str], tokens: int, width: int, dtype: torch.dtype, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Least seconds of each; NaN for one that is more than 5 % of the largest value away from the reference."""
    inputs, losses = draw(tokens, width, dtype), contestants()
    truth = step(losses["reference"], inputs)
    right = [name for name in names if error(losses[name], inputs, truth) < 0.05]
    del truth
    least = dict.fromkeys(names, math.nan) | dict.fromkeys(right, math.inf)
    for _, name in itertools.product(range(rounds), right):
        start = clock()
        step(losses[name], inputs)
        least[name] = min(least[name], clock() - start)
    return least


def peak_above_inputs(name: str, tokens: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that this process held more at most, beside its inputs; libraries have been set up by a small call."""
    loss, inputs = contestants()[name], draw(tokens, width, dtype)
    step(loss, draw(8, width, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = peak_resident_bytes()
    step(loss, inputs)
    return peak_resident_bytes() - before


def _apart(name: str, tokens: int, width: int, dtype: str, threads: int) -> int:
    numbers = ["--tokens", str(tokens), "--width", str(width), "--dtype", dtype, "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.loss_cpu", "--peak-of", name, *numbers]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table, a line per size; exit code 1 where someone else is faster than ours."""
    parser = argparse.ArgumentParser(prog="benchmarks.loss_cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--width", type=int, nargs="+", default=[96], help="d_model")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--losses", nargs="+", default=list(contestants()), choices=list(contestants()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="not wall time: for --threads 1 on a busy machine")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="append one line per size to this file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.peak_of is not None:
        dtype = getattr(torch, given.dtype[0])
        print(peak_above_inputs(given.peak_of, given.tokens[0], given.width[0], dtype))
        return 0
    clock = time.process_time if given.cpu_time else time.perf_counter
    names = ["torch", *(name for name in given.losses if name != "torch")]
    print(f"ms (times ours) and MB above the inputs; GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}")
    print(f"| tokens x d_model, dtype | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    slower = False
    for dtype_name, width, tokens in itertools.product(given.dtype, given.width, given.tokens):
        seconds = times(names, tokens, width, getattr(torch, dtype_name), given.rounds, clock)
        slower |= any(other < seconds["torch"] for other in seconds.values())
        timed = [name for name in names if not math.isnan(seconds[name])]
        peaks = {}
        if not given.no_memory:
            peaks = {name: _apart(name, tokens, width, dtype_name, given.threads) for name in timed}
        if given.json:
            entry = {"tokens": tokens, "d_model": width, "dtype": dtype_name, "seconds": seconds, "peak_bytes": peaks}
            with open(given.json, "a") as file:
                file.write(json.dumps(entry) + "\n")
        shown = dict.fromkeys(names, "wrong")
        shown |= {name: f"{1e3 * seconds[name]:.0f} ({seconds[name] / seconds['torch']:.2f})" for name in timed}
        shown |= {name: f"{shown[name]}, {peak / 1e6:.0f}" for name, peak in peaks.items()}
        print(f"| {tokens} x {width}, {dtype_name} | {' | '.join(shown.values())} |", flush=True)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
