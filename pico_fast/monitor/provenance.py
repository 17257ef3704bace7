"""Under what a process ran: written to the metrics file once per start."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pico_fast.config import Config
from pico_fast.config_io import to_yaml
from pico_fast.env import redact


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; ``+`` after it: with changes. None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: a repository further up would be another project's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The device as its driver names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type


def provenance(config: Config, device: torch.device) -> dict[str, Any]:
    """Versions, commit, device, arguments (secrets redacted) and SHA-256 of the configuration's YAML."""
    return {
        "versions": {
            "python": platform.python_version(),
            "pico_fast": _version("pico-fast"),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
        },
        "git": _git_commit(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "argv": [redact(argument) for argument in sys.argv],
        "config_sha256": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
    }
