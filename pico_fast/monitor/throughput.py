"""Seconds per training step, without the time spent on other things."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Mean time between successive calls of :meth:`step` since the last :meth:`restart`, pauses excluded.

    The first call only starts the clock, so neither start-up nor compilation before it counts.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._paused = 0.0  # total seconds of ended pauses
        self._depth = 0
        self._previous: float | None = None
        self._seconds, self._steps = 0.0, 0

    def step(self) -> None:
        """One more step is done."""
        now = self._clock() - self._paused
        if self._previous is not None:
            self._seconds += now - self._previous
            self._steps += 1
        self._previous = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within does not count; pauses may be nested."""
        start = self._clock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += self._clock() - start

    def seconds_per_step(self) -> float | None:
        """None as long as no full step was timed since the last restart."""
        return self._seconds / self._steps if self._steps and self._seconds > 0 else None

    def restart(self) -> None:
        """Begin a new mean."""
        self._seconds, self._steps = 0.0, 0
