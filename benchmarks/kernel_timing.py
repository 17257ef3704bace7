"""Measures one case: every opponent checked, then all of them timed in turn on buffers that have left the L2 cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.kernel_cases import DIRECTIONS, Case, byte_floor
from benchmarks.kernel_clocks import Clock, CopyPairs
from benchmarks.kernel_opponents import Opponent, Tensors, make_inputs, opponents

COPY = "copy of as many bytes"
_L2_MULTIPLE = 3
_MIN_SETS, _MAX_SETS = 2, 64
_MIN_ROUNDS, _MAX_ROUNDS = 5, 25
# A set is inputs, incoming gradients, outputs, what autograd keeps and gradients: at most so many times its inputs
# (the plain twin of swiglu keeps silu and makes three temporaries).
_SET_BYTES_PER_INPUT_BYTE = 6
_TRUTH_BYTES_PER_INPUT_BYTE = 16  # the float32 reference of one set, forward and backward


@dataclass
class Timing:
    """One opponent in one direction: device seconds per call of each round, host seconds per call (median)."""

    seconds: list[float] = field(default_factory=list)
    wall_seconds: float | None = None

    @property
    def median(self) -> float:
        """Median device seconds."""
        return statistics.median(self.seconds)


@dataclass
class CaseResult:
    """All timings of a case by (opponent, direction), and why the others were not timed."""

    case: Case
    timings: dict[tuple[str, str], Timing]
    refused: dict[str, str]


class NotEnoughMemoryError(Exception):
    """The case does not fit the device's free memory."""


class _Contender:
    """An opponent with its own leaves over the shared sets of buffers."""

    def __init__(self, opponent: Opponent, sets: Sequence[Tensors], grads: Sequence[Tensors]) -> None:
        self.opponent = opponent
        self._leaves = [_leaves(opponent, tensors) for tensors in sets]
        self._grads = [_layout_of_outputs(opponent, tensors) for tensors in grads]
        self._outputs: list[Tensors] = []
        self._gradients: list[Tensors] = []

    def forward(self) -> None:
        """One call per set; the outputs stay, so that none is written where the previous one still lies in L2."""
        self._outputs = [self.opponent.call(*leaves) for leaves in self._leaves]

    def backward(self) -> None:
        """The gradients of the last forward, one call per set."""
        self._gradients = [
            torch.autograd.grad(outputs, leaves, grads)
            for outputs, leaves, grads in zip(self._outputs, self._leaves, self._grads, strict=True)
        ]

    def release(self) -> None:
        """Drop results."""
        self._outputs, self._gradients = [], []


def _leaves(opponent: Opponent, tensors: Sequence[torch.Tensor]) -> Tensors:
    return tuple(tensor.detach().requires_grad_() for tensor in opponent.prepare(tensors))


def _layout_of_outputs(opponent: Opponent, grads: Tensors) -> Tensors:
    """Incoming gradients as the opponent lays out its outputs: heads first where its inputs are."""
    return tuple(opponent.prepare(grads)) if grads[0].dim() == 4 else grads


def _run(call: Callable[..., Tensors], leaves: Tensors, grads: Tensors) -> list[torch.Tensor]:
    outputs = call(*leaves)
    kept = [output.detach().clone() for output in outputs]  # a backward may overwrite what the forward returned
    return [*kept, *torch.autograd.grad(outputs, leaves, grads)]


def why_wrong(opponent: Opponent, inputs: Tensors, grads: Tensors) -> str | None:
    """None if outputs and gradients are right, else what it raised or which result is off by how much.

    Right: the largest error against the float32 reference is at most 4 times that of the reference in the case's own
    dtype, plus two units in the last place of the largest value. Wider than our own tests (2 times, one unit), as
    other libraries may round elsewhere; every error of substance is orders of magnitude larger.
    """
    own = [tensor.clone() for tensor in inputs]
    grads = tuple(tensor.clone() for tensor in grads)
    leaves, seeds = _leaves(opponent, own), _layout_of_outputs(opponent, grads)
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in leaves)
    truth = _run(opponent.truth, wide, tuple(seed.float() for seed in seeds))
    twin = _run(opponent.truth, leaves, seeds)
    try:
        got = _run(opponent.call, leaves, seeds)
    except Exception as error:  # an opponent that cannot run here is not timed; the benchmark goes on
        return f"it raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    names = [f"output {i}" for i in range(len(seeds))] + [f"gradient of input {i}" for i in range(len(leaves))]
    for name, want, plain, have in zip(names, truth, twin, got, strict=True):
        unit = torch.finfo(have.dtype).eps * want.abs().max().item()
        allowed = 4 * (plain.float() - want).abs().max().item() + 2 * unit
        off = (have.float() - want).abs().max().item()
        if not off <= allowed:  # so that NaN is wrong
            return f"wrong: {name} is off by {off:.3g}, allowed {allowed:.3g}"
    return None


def _sets(inputs: Tensors, clock: Clock) -> int:
    size = sum(tensor.nbytes for tensor in inputs)
    wanted = min(_MAX_SETS, max(_MIN_SETS, math.ceil(_L2_MULTIPLE * clock.l2_bytes / size)))
    needed = size * (wanted * _SET_BYTES_PER_INPUT_BYTE + _TRUTH_BYTES_PER_INPUT_BYTE)
    free = clock.free_bytes()
    if needed > free:
        raise NotEnoughMemoryError(f"needs {needed / 1e9:.1f} GB, {max(free, 0) / 1e9:.1f} GB are free")
    return wanted


def measure(case: Case, device: torch.device, clock: Clock, seconds: float) -> CaseResult:
    """Check and time every opponent on ``case``, about ``seconds`` of timing. Raises NotEnoughMemoryError."""
    found, refused = opponents(case, device)
    inputs = make_inputs(case, device)
    sets = _sets(inputs, clock)
    grads = _incoming(found[0], inputs)
    sound = []
    for opponent in found:
        problem = why_wrong(opponent, inputs, grads)
        if problem is None:
            sound.append(opponent)
        else:
            refused[opponent.name] = f"not timed: {problem}"
    timings = _race(sound, inputs, grads, sets, clock, seconds)
    for direction in DIRECTIONS:
        timings[COPY, direction] = _time_copy(byte_floor(case, direction), sets, device, clock)
    return CaseResult(case, timings, refused)


def _race(
    sound: Sequence[Opponent], inputs: Tensors, grads: Tensors, sets: int, clock: Clock, seconds: float
) -> dict[tuple[str, str], Timing]:
    """Time the opponents in turn, each round starting one further, so that a drifting clock rate touches all alike.

    Ends when ``seconds`` are spent, after at least 5 rounds, at most 25. Every forward starts from the same inputs.
    """
    all_inputs = [tuple(tensor.clone() for tensor in inputs) for _ in range(sets)]
    all_grads = [tuple(tensor.clone() for tensor in grads) for _ in range(sets)]
    contenders = [_Contender(opponent, all_inputs, all_grads) for opponent in sound]
    timings = {(opponent.name, direction): Timing() for opponent in sound for direction in DIRECTIONS}

    def restore() -> None:
        for kept, copies in ((inputs, all_inputs), (grads, all_grads)):
            for tensors in copies:
                for source, target in zip(kept, tensors, strict=True):
                    target.copy_(source)

    def both(contender: _Contender, time_of: Callable[..., float]) -> tuple[float, float]:
        name = contender.opponent.name
        heads = [1.3 * sets * (timings[name, direction].wall_seconds or 0.0) for direction in DIRECTIONS]
        forward = time_of(contender.forward, heads[0])
        backward = time_of(contender.backward, heads[1])
        contender.release()
        if contender.opponent.overwrites:
            restore()
        return forward / sets, backward / sets

    for contender in contenders:
        walls = [both(contender, lambda work, _: clock.wall_seconds(work)) for _ in range(4)][1:]  # the first warms up
        for direction, values in zip(DIRECTIONS, zip(*walls, strict=True), strict=True):
            timings[contender.opponent.name, direction].wall_seconds = statistics.median(values)
    end = time.monotonic() + seconds
    for turn in range(_MAX_ROUNDS if contenders else 0):
        if turn >= _MIN_ROUNDS and time.monotonic() > end:
            break
        start = turn % len(contenders)
        for contender in contenders[start:] + contenders[:start]:
            for direction, value in zip(DIRECTIONS, both(contender, clock.seconds), strict=True):
                timings[contender.opponent.name, direction].seconds.append(value)
    return timings


def _incoming(opponent: Opponent, inputs: Tensors) -> Tensors:
    """Gradients to start the backward from: dense and random, never the expanded ones of ``sum().backward()``."""
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    with torch.no_grad():
        outputs = opponent.truth(*opponent.prepare(inputs))
    return tuple(
        torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
        for out in outputs
    )


def _time_copy(size: int, sets: int, device: torch.device, clock: Clock) -> Timing:
    """What a plain copy of as many bytes takes: the fair bound of a launch too small to reach the full rate."""
    buffers = CopyPairs(size, sets, device)
    wall = statistics.median([clock.wall_seconds(buffers.copy) / sets for _ in range(4)][1:])
    rounds = [clock.seconds(buffers.copy, 1.3 * sets * wall) / sets for _ in range(9)]
    return Timing(rounds, wall)


def lines_of(result: CaseResult, copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """JSON objects, one per timing, with what :mod:`benchmarks.report` needs to know of each."""
    case = result.case
    common = {"op": case.op, "size": case.shape.name, "d_model": case.shape.d_model, "tokens": case.tokens}
    lines = []
    for (name, direction), timing in result.timings.items():
        size = byte_floor(case, direction)
        lines.append(
            {
                **common,
                "direction": direction,
                "opponent": name,
                "case": case.name,
                "bytes": size,
                "copy_bytes_per_second": copy_bytes_per_second,
                "percent_of_copy": 100 * size / timing.median / copy_bytes_per_second,
                "wall_seconds": timing.wall_seconds,
                "seconds": timing.seconds,
            }
        )
    return lines
