"""Stopwatches for work on a device, and the copy bandwidth and matmul rate that results are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_COPY_BYTES = 1 << 30  # per buffer: far past any L2
_MATMUL_SIZE = {"cuda": 8192, "cpu": 128}  # 1.1 TFLOP: 1.4 ms at 790 TFLOP/s


class CpuClock:
    """Wall time on a CPU, for rehearsals; ``head_start`` is ignored."""

    l2_bytes = 1 << 10  # so that a rehearsal has two sets of buffers only: the interpreter is slow

    def seconds(self, work: Callable[[], object], head_start: float = 0.0) -> float:
        """Time of ``work()``."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    wall_seconds = seconds

    def free_bytes(self) -> float:
        """Memory that a case may take."""
        return 1 << 28

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """Not known on a CPU."""
        return None


class CudaClock:
    """Device time between two CUDA events, without the gaps in which the device waits for the host.

    A sleeping kernel keeps the device busy for ``head_start`` seconds while the host enqueues the work. Unlike a CUDA
    graph that needs nothing of the work: every autograd function, in-place or not, runs as in training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._cycles_per_second = 2e9
        cycles = 20_000_000
        self._between(lambda: torch.cuda._sleep(cycles), 0)
        self._cycles_per_second = cycles / self._between(lambda: torch.cuda._sleep(cycles), 0)

    def _between(self, work: Callable[[], object], sleep_cycles: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        if sleep_cycles:
            torch.cuda._sleep(sleep_cycles)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) / 1e3

    def seconds(self, work: Callable[[], object], head_start: float = 0.0) -> float:
        """Device time of ``work()``, which the host needs about ``head_start`` seconds to enqueue (50 ms at most)."""
        return self._between(work, int(min(head_start, 0.05) * self._cycles_per_second))

    def wall_seconds(self, work: Callable[[], object]) -> float:
        """Host time until everything that ``work()`` enqueued is done."""
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def free_bytes(self) -> float:
        """Memory that a case may take."""
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(self._device)[0]

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """The most memory that ``work()`` held at once, beyond what was allocated before."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The stopwatch of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class CopyPairs:
    """Pairs of buffers; copying all of them moves ``bytes_per_copy`` (read + written) each."""

    def __init__(self, bytes_per_copy: int, pairs: int, device: torch.device) -> None:
        shape = (2, pairs, max(1, bytes_per_copy // 4))
        self._from, self._to = torch.randint(0, 255, shape, dtype=torch.int16, device=device).view(torch.uint8)
        self.pairs = pairs

    def copy(self) -> None:
        """Copy every pair once."""
        for source, target in zip(self._from, self._to, strict=True):
            target.copy_(source)


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes per second, read + written, of large device-to-device copies: the ceiling of an op that moves bytes."""
    size = min(_COPY_BYTES, int(clock.free_bytes() / 8))
    buffers = CopyPairs(2 * size, 2, device)
    for _ in range(3):
        buffers.copy()
    rounds = [clock.seconds(buffers.copy, 1e-3) for _ in range(15)]
    return buffers.pairs * 2 * size / statistics.median(rounds)


def matmul_rate(device: torch.device, clock: Clock) -> float:
    """FLOP per second of a large square bfloat16 product by the vendor's library: the ceiling of an op of products."""
    size = _MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    rounds = [clock.seconds(lambda: torch.mm(a, b, out=out), 1e-3) for _ in range(15)]
    return 2 * size**3 / statistics.median(rounds)


class Ceilings(NamedTuple):
    """What the card reaches in this run: the rates that percentages are of."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float


def ceilings(device: torch.device, clock: Clock) -> Ceilings:
    """Measure both."""
    return Ceilings(copy_bandwidth(device, clock), matmul_rate(device, clock))
