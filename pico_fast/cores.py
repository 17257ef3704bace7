"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

# (quota file, period file) of cgroup v2, where one file holds both, and of v1; a container sees its own at these paths.
_QUOTAS = (
    (Path("/sys/fs/cgroup/cpu.max"), None),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def usable_cores() -> int:
    """The cores of this process's affinity, or fewer where a container's CPU quota is smaller; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota() -> float | None:
    """CPU seconds per second that the cgroup allows; None without a limit."""
    for quota_file, period_file in _QUOTAS:
        try:
            values = quota_file.read_text().split()
            values += period_file.read_text().split() if period_file else []
            quota, period = float(values[0]), float(values[1])
        except (OSError, ValueError, IndexError):  # no such file, or "max": no limit
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
