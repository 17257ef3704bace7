"""Measures one case: every opponent checked, then all of them timed in turn on buffers that have left the L2 cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.kernel_cases import COPY, DIRECTIONS, POINTWISE, ROPE, STEP, Case, byte_floor, flops
from benchmarks.kernel_clocks import Ceilings, Clock, CopyPairs
from benchmarks.kernel_opponent import Opponent, Tensors
from benchmarks.kernel_opponents import make_inputs, opponents

_L2_MULTIPLE = 3
_MIN_SETS, _MAX_SETS = 2, 64
_MIN_ROUNDS, _MAX_ROUNDS = 5, 25
# A set is inputs, incoming gradients, outputs, what autograd keeps and gradients: at most so many times its inputs
# (the plain twin of swiglu keeps silu and makes three temporaries).
_SET_BYTES_PER_INPUT_BYTE = 6
_TRUTH_BYTES_PER_INPUT_BYTE = 16  # the float32 reference of one set, forward and backward
_FREE_SHARE = 0.8  # of the free memory, for the calls of an opponent that takes much
_TIMES_PLAIN = 4  # errors allowed, in those of the reference in the case's own dtype
_FLOAT32_ERROR = 1e-3  # relative, for float32 results, whose products were of narrower factors
_TRUTH_BYTES = 24 << 30  # of attention and the loss: scores of one sequence, or logits of some tokens, several times


@dataclass
class Timing:
    """One opponent in one direction: device seconds per call of each round, host seconds per call (median).

    ``peak_bytes``: the most memory that a forward and a backward held, beyond the inputs; for ops of products.
    """

    seconds: list[float] = field(default_factory=list)
    wall_seconds: float | None = None
    peak_bytes: int | None = None

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

    @property
    def sets(self) -> int:
        """Calls of one piece of work."""
        return len(self._leaves)

    def work(self, direction: str) -> Callable[[], None]:
        """What is timed under that name."""
        return {"forward": self.forward, "backward": self.backward, STEP: self.step}[direction]

    def step(self) -> None:
        """Forward and backward, set by set, as in training."""
        self._gradients = [
            torch.autograd.grad(self.opponent.call(*leaves), leaves, grads)
            for leaves, grads in zip(self._leaves, self._grads, strict=True)
        ]

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


class Gate:
    """Says what is wrong with an opponent. The truth is computed once for all who share it.

    An output or gradient is right if three of its errors against the float32 reference are small, each beside that of
    the twin, the reference in the case's own dtype:

    - the largest: at most 4 times the twin's, plus two units of that dtype at the largest value;
    - its norm: at most 4 times the twin's, plus a unit of the result's dtype, or 1e-3 in float32, of the norm;
    - the norm of the error in the quarter of the rows that are smallest, likewise. In the gradient of the loss's weight
      no label names those rows: they are the softmax's alone and, at the tiny size, 200 times smaller than the others,
      so that the first two errors would not see it missing.

    Wider than our own tests (2 times, one unit of the result's dtype), as other libraries may round elsewhere: it tells
    another function from the same, not a good kernel from one that rounds four times as much.
    """

    def __init__(self, inputs: Tensors, grads: Tensors) -> None:
        self._inputs, self._grads = inputs, grads
        self._known: dict[tuple[Any, Any], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def _arguments(self, opponent: Opponent) -> tuple[Tensors, Tensors]:
        leaves = _leaves(opponent, [tensor.clone() for tensor in self._inputs])
        return leaves, _layout_of_outputs(opponent, tuple(grad.clone() for grad in self._grads))

    def _expected(self, opponent: Opponent) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Results of the reference in float32, and in the case's own dtype."""
        key = opponent.truth, opponent.prepare
        if key not in self._known:
            leaves, seeds = self._arguments(opponent)
            wide = tuple(leaf.detach().float().requires_grad_() for leaf in leaves)
            truth = _run(opponent.truth, wide, tuple(seed.float() for seed in seeds))
            self._known[key] = truth, _run(opponent.truth, leaves, seeds)
        return self._known[key]

    def why_wrong(self, opponent: Opponent) -> str | None:
        """None if outputs and gradients are right, else what it raised or which result is off by how much."""
        truth, twin = self._expected(opponent)
        leaves, seeds = self._arguments(opponent)
        try:
            got = _run(opponent.call, leaves, seeds)
        except Exception as error:  # an opponent that cannot run here is not timed; the benchmark goes on
            return f"it raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        names = [f"output {i}" for i in range(len(seeds))] + [f"gradient of input {i}" for i in range(len(leaves))]
        for i, (name, want, plain, have) in enumerate(zip(names, truth, twin, got, strict=True)):
            is_output = i < len(seeds)
            slack = 0.0 if is_output else opponent.gradient_slack
            unit = torch.finfo((opponent.output_dtype if is_output else None) or have.dtype).eps
            coarsest = max(unit, torch.finfo(leaves[0].dtype).eps)
            problem = _largest_error(want, plain, have, 2 * coarsest + slack)
            problem = problem or _norm_of_error(want, plain, have, max(_FLOAT32_ERROR, unit) + slack)
            if problem:
                return f"wrong: {name} is off by {problem}"
        return None


def _largest_error(want: torch.Tensor, plain: torch.Tensor, have: torch.Tensor, relative: float) -> str | None:
    allowed = _TIMES_PLAIN * (plain.float() - want).abs().max().item() + relative * want.abs().max().item()
    off = (have.float() - want).abs().max().item()
    return None if off <= allowed else f"{off:.3g}, allowed {allowed:.3g}"  # NaN is wrong


def _norm_of_error(want: torch.Tensor, plain: torch.Tensor, have: torch.Tensor, relative: float) -> str | None:
    """Of the quarter of the rows that are smallest, then of the whole."""
    parts: dict[str, Sequence[torch.Tensor]] = {}
    if want.dim() > 1:
        rows = [tensor.flatten(0, -2) for tensor in (want, plain, have)]
        smallest = rows[0].norm(dim=-1).topk(max(1, rows[0].shape[0] // 4), largest=False).indices
        parts[" in its smallest rows"] = [tensor[smallest] for tensor in rows]
    parts[""] = want, plain, have
    for where, (truth, twin, got) in parts.items():
        norm = truth.norm().item()
        off = (got.float() - truth).norm().item()
        allowed = _TIMES_PLAIN * (twin.float() - truth).norm().item() + relative * norm
        if not off <= allowed:
            return f"{off / norm:.2g} of its norm{where}, allowed {allowed / norm:.2g}"
    return None


def _sets(case: Case, inputs: Tensors, clock: Clock, free: float) -> int:
    size = sum(tensor.nbytes for tensor in inputs)
    wanted = min(_MAX_SETS, max(_MIN_SETS, math.ceil(_L2_MULTIPLE * clock.l2_bytes / size)))
    if case.op == "linear_cross_entropy":  # what a call computes leaves the cache many times; the sets only take memory
        wanted = 1
    needed = size * (wanted * _SET_BYTES_PER_INPUT_BYTE + _TRUTH_BYTES_PER_INPUT_BYTE)
    if case.op not in POINTWISE and inputs[0].is_cuda:
        needed += _TRUTH_BYTES
    if needed > free:
        raise NotEnoughMemoryError(f"needs {needed / 1e9:.1f} GB, {max(free, 0) / 1e9:.1f} GB are free")
    return wanted


def _fitting_sets(opponent: Opponent, sets: int, free: float) -> int:
    """All sets, or fewer for an opponent that takes much memory: its own traffic then sweeps the L2 cache."""
    if not opponent.bytes_per_call:
        return sets
    return min(sets, int(_FREE_SHARE * free / opponent.bytes_per_call))


def measure(case: Case, device: torch.device, clock: Clock, seconds: float) -> CaseResult:
    """Check and time every opponent on ``case``, about ``seconds`` of timing. Raises NotEnoughMemoryError."""
    found, refused = opponents(case, device)
    inputs = make_inputs(case, device)
    free = clock.free_bytes()
    sets = _sets(case, inputs, clock, free)
    grads = incoming(found[0], inputs)
    gate = Gate(inputs, grads)
    sound = []
    for opponent in found:
        fitting = _fitting_sets(opponent, sets, free)
        if not fitting:
            needed = opponent.bytes_per_call / 1e9
            refused[opponent.name] = f"not timed: needs some {needed:.0f} GB, {free / 1e9:.0f} are free"
            continue
        problem = gate.why_wrong(opponent)
        if problem is None:
            sound.append((opponent, fitting))
        else:
            refused[opponent.name] = f"not timed: {problem}"
    del gate  # its float32 results
    timings = _race(case.directions, sound, inputs, grads, clock, seconds)
    if case.op not in POINTWISE:
        _add_peaks(case, timings, [opponent for opponent, _ in sound], inputs, grads, clock)
    for direction in case.directions if case.op in POINTWISE else ():
        timings[COPY, direction] = _time_copy(byte_floor(case, direction), sets, device, clock)
    if case.op == "attention":
        timings |= _time_rope(case, device, sets, clock, seconds)
    return CaseResult(case, timings, refused)


def _add_peaks(
    case: Case,
    timings: dict[tuple[str, str], Timing],
    sound: Sequence[Opponent],
    inputs: Tensors,
    grads: Tensors,
    clock: Clock,
) -> None:
    for opponent in sound:
        peak = clock.peak_bytes(_Contender(opponent, [inputs], [grads]).step)
        for direction in case.directions:
            timings[opponent.name, direction].peak_bytes = peak


def _time_rope(
    case: Case, device: torch.device, sets: int, clock: Clock, seconds: float
) -> dict[tuple[str, str], Timing]:
    """The rotation that a model does before this attention: what fusing the two could save at most."""
    rope = replace(case, op="rope")
    ours = next(opponent for opponent in opponents(rope, device)[0] if opponent.name in ("triton", "torch"))
    inputs = make_inputs(rope, device)
    found = _race(DIRECTIONS, [(ours, sets)], inputs, incoming(ours, inputs), clock, seconds / 8)
    return {(ROPE, direction): timing for (_, direction), timing in found.items()}


def _race(
    directions: Sequence[str],
    sound: Sequence[tuple[Opponent, int]],
    inputs: Tensors,
    grads: Tensors,
    clock: Clock,
    seconds: float,
) -> dict[tuple[str, str], Timing]:
    """Time the opponents, each on its number of sets, in turn: a round starts one further, so that a drift of the clock
    rate touches all alike.

    Ends when ``seconds`` are spent, after at least 5 rounds, at most 25. Every forward starts from the same inputs.
    """
    most = max((sets for _, sets in sound), default=0)
    all_inputs = [tuple(tensor.clone() for tensor in inputs) for _ in range(most)]
    all_grads = [tuple(tensor.clone() for tensor in grads) for _ in range(most)]
    contenders = [_Contender(opponent, all_inputs[:sets], all_grads[:sets]) for opponent, sets in sound]
    timings = {(opponent.name, direction): Timing() for opponent, _ in sound for direction in directions}

    def restore() -> None:
        for kept, copies in ((inputs, all_inputs), (grads, all_grads)):
            for tensors in copies:
                for source, target in zip(kept, tensors, strict=True):
                    target.copy_(source)

    def once(contender: _Contender, time_of: Callable[..., float]) -> list[float]:
        """Seconds per call, in every direction."""
        found = []
        for direction in directions:
            wall = timings[contender.opponent.name, direction].wall_seconds or 0.0
            found.append(time_of(contender.work(direction), 1.3 * contender.sets * wall) / contender.sets)
        contender.release()
        if contender.opponent.overwrites:
            restore()
        return found

    for contender in contenders:
        walls = [once(contender, lambda work, _: clock.wall_seconds(work)) for _ in range(4)][1:]  # the first warms up
        for direction, values in zip(directions, zip(*walls, strict=True), strict=True):
            timings[contender.opponent.name, direction].wall_seconds = statistics.median(values)
    end = time.monotonic() + seconds
    for turn in range(_MAX_ROUNDS if contenders else 0):
        if turn >= _MIN_ROUNDS and time.monotonic() > end:
            break
        start = turn % len(contenders)
        for contender in contenders[start:] + contenders[:start]:
            for direction, value in zip(directions, once(contender, clock.seconds), strict=True):
                timings[contender.opponent.name, direction].seconds.append(value)
    return timings


def incoming(opponent: Opponent, inputs: Tensors) -> Tensors:
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


def lines_of(result: CaseResult, ceilings: Ceilings) -> list[dict[str, Any]]:
    """JSON objects, one per timing, with what :mod:`benchmarks.report` needs to know of each."""
    case = result.case
    common = {
        "op": case.op,
        "case": case.name,
        "size": case.shape.name,
        "d_model": case.shape.d_model,
        "head_dim": case.shape.head_dim,
        "tokens": case.tokens,
        "seq_len": case.seq_len,
    }
    lines = []
    for (name, direction), timing in result.timings.items():
        line = {**common, "direction": direction, "opponent": name, "wall_seconds": timing.wall_seconds}
        work = None if name == ROPE else flops(case, direction)
        if work is not None:
            rate = work / timing.median
            line |= {
                "flops": work,
                "matmul_flops_per_second": ceilings.matmul_flops_per_second,
                "percent_of_matmul": 100 * rate / ceilings.matmul_flops_per_second,
                "peak_bytes": timing.peak_bytes,
            }
        else:
            size = byte_floor(replace(case, op="rope") if name == ROPE else case, direction)
            line |= {
                "bytes": size,
                "copy_bytes_per_second": ceilings.copy_bytes_per_second,
                "percent_of_copy": 100 * size / timing.median / ceilings.copy_bytes_per_second,
            }
        lines.append({**line, "seconds": timing.seconds})
    return lines
