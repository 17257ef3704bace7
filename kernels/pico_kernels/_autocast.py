"""Every op computes in the dtype of its arguments, whatever ``torch.autocast`` says.

Autocast casts the arguments of PyTorch's products (``mm``, ``linear``, scaled_dot_product_attention), not those of our
kernels: under it the implementations of one op would differ, and float32 input would be computed in bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def autocasts(device_type: str) -> bool:
    """Whether a region of autocast is open for this type of device; meta tensors have none to ask for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def in_argument_dtype(function: _Function) -> _Function:
    """Decorate an implementation, whose first argument is a tensor: it runs without autocast. 1 us a call."""

    @functools.wraps(function)
    def call(first: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        device_type = first.device.type
        if not autocasts(device_type):
            return function(first, *args, **keywords)
        with torch.autocast(device_type, enabled=False):
            return function(first, *args, **keywords)

    return cast(_Function, call)
