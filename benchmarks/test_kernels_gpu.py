"""The ops on a GPU against every opponent there is: ``python -m benchmarks.gpu`` runs this within a budget.

``python -m pytest benchmarks/test_kernels_gpu.py --benchmark-json FILE`` works too. A case's opponents are timed in
turn when its first test asks; each test then hands its rounds to pytest-benchmark through :class:`ReplayClock`, as
pytest-benchmark alone would time one opponent after the other and the host instead of the device.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu_session import Session

SESSION = Session.from_environment()


class ReplayClock:
    """A pytest-benchmark timer that advances by measured durations: the benchmarked call is :meth:`advance`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.durations: list[float] = []

    def __call__(self) -> float:
        """Seconds replayed so far."""
        return self.now

    def advance(self) -> None:
        """Let the next duration pass."""
        if self.durations:
            self.now += self.durations.pop(0)


def replayed_device_time() -> float:
    """The timer's name in the JSON."""
    return CLOCK()


CLOCK = ReplayClock()


@pytest.mark.skipif(SESSION.unavailable is not None, reason=str(SESSION.unavailable))
@pytest.mark.benchmark(timer=replayed_device_time)
@pytest.mark.parametrize(("case", "direction", "opponent"), SESSION.points)
def test_kernel(benchmark: Any, case: str, direction: str, opponent: str) -> None:
    """One opponent in one direction: device seconds per call."""
    line = SESSION.line(case, direction, opponent)
    if "reason" in line:
        outcome = pytest.fail if line["is_error"] else pytest.skip
        outcome(f"{case}: {opponent}: {line['reason']}")
    benchmark.group = f"{line['op']} {direction}"
    benchmark.extra_info.update({key: value for key, value in line.items() if key != "seconds"})
    CLOCK.durations = list(line["seconds"])
    benchmark.pedantic(CLOCK.advance, rounds=len(line["seconds"]))
