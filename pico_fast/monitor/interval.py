"""What is averaged between two reports."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Interval:
    """Steps since the last report; the plain fields are those of the last step."""

    step: int = -1
    lr: float = 0.0
    grad_norm: float | None = None
    nonfinite_total: int = 0
    steps: int = 0
    _finite: int = 0
    _sum: float = 0.0

    def add(self, step: int, loss: float, lr: float, grad_norm: float | None, nonfinite_total: int) -> None:
        """One more step."""
        self.step, self.lr, self.grad_norm, self.nonfinite_total = step, lr, grad_norm, nonfinite_total
        self.steps += 1
        if math.isfinite(loss):
            self._finite += 1
            self._sum += loss

    def mean_loss(self) -> float:
        """Mean of the finite losses; infinity, as in pico-train, if there is none."""
        return self._sum / self._finite if self._finite else math.inf
