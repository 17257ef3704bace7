"""The monitor of a process that leaves reporting to another one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from pico_fast.config import Config


class SilentMonitor:
    """Takes the calls of :class:`~pico_fast.monitor.monitor.Monitor` and does nothing, on every rank but 0."""

    def __init__(self, config: Config):
        self._log_every = config.monitoring.logging.log_every_n_steps

    def logs(self, step: int) -> bool:
        """What :meth:`Monitor.logs` says: measuring the gradient norm takes all ranks."""
        return step % self._log_every == 0

    def info(self, message: str) -> None:
        """Nothing."""

    def warning(self, message: str) -> None:
        """Nothing."""

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing."""

    def step_done(self) -> None:
        """Nothing."""

    def train_step(self, step: int, loss: float, lr: float, grad_norm: float | None, nonfinite_total: int) -> None:
        """Nothing."""

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Nothing."""

    def checkpoint(self, step: int, seconds: float, nbytes: int) -> None:
        """Nothing."""

    def paused(self) -> AbstractContextManager[None]:
        """Nothing to pause."""
        return contextlib.nullcontext()

    def flush(self) -> None:
        """Nothing."""
