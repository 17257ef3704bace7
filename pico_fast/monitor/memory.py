"""Memory of the process on its device."""

from __future__ import annotations

import time

import torch


class MemoryMeter:
    """Bytes in use: on CUDA the most that tensors took so far, on MPS the driver's allocation, else the resident set.

    A reading costs up to 0.1 ms, so it is kept for a second unless a fresh one is asked for.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._value, self._time = 0, -1.0

    def read(self, *, fresh: bool = False) -> int:
        """Bytes now, or up to a second ago."""
        now = time.monotonic()
        if fresh or self._time < 0 or now - self._time > 1:
            self._value, self._time = self._measure(), now
        return self._value

    def _measure(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._device.type == "mps":
            return torch.mps.driver_allocated_memory()
        import psutil

        return int(psutil.Process().memory_info().rss)
