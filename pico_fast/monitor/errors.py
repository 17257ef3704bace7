"""Errors of starting to monitor, and the count of those that must not stop a training."""

from __future__ import annotations

from collections.abc import Callable


class MonitorError(Exception):
    """Monitoring cannot start as configured; the message says what to change."""


class WriteFailures:
    """Counts failed writes per destination and reports the first of each through ``say``.

    A training goes on when its log file, its metrics or Weights & Biases cannot be written: the weights are worth more.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self.counts: dict[str, int] = {}

    def add(self, destination: str, error: BaseException) -> None:
        """One write to ``destination`` failed with ``error``."""
        self.counts[destination] = self.counts.get(destination, 0) + 1
        if self.counts[destination] == 1:
            self._say(f"WARNING: {destination}: {error}; the training goes on, further failures are only counted")

    def summary(self) -> str | None:
        """One line with all counts, None if nothing failed."""
        if not self.counts:
            return None
        return "WARNING: writes that failed: " + ", ".join(f"{count} to {name}" for name, count in self.counts.items())
