"""What the choice of an implementation asks about the device; a traced graph keeps the answers as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_when_traced(function: _Function) -> _Function:
    """Decorate a module-level function: torch.compile calls it while tracing and does not look inside.

    The mark is that of ``torch.compiler.assume_constant_result``, which would import torch._dynamo (0.9 s) with us.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_traced
def _capability(index: int) -> int:
    # AMD's devices report numbers of their own: gfx942 is (9, 4).
    return torch.cuda.get_device_capability(index)[0] if torch.version.hip is None else 0


def cuda_capability(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU, 0 for any other device."""
    return _capability(device.index) if device.type == "cuda" else 0
