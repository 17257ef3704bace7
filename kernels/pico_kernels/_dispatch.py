"""What every public op shares: choosing an implementation by name, and the wording of argument errors."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from pico_kernels._flash_packages import flash_attn_problem
from pico_kernels._triton import interpreting, triton_problem

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of every op's floating tensors."""

Implementations = Mapping[str, Callable[..., Any]]
"""One op's implementations: name to callable, every callable with the op's signature."""


def near_miss(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` when something known resembles ``name``, else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def triton_is_fast() -> bool:
    """Whether Triton compiles for a GPU here; its interpreter runs only where it is asked for by name."""
    return not interpreting() and triton_problem() is None


_PROBLEMS: Mapping[str, Callable[[str], str | None]] = {"triton": triton_problem, "flash_attn": flash_attn_problem}
"""Why an implementation cannot run on a type of device; None where it can. Those not named here always can."""


def resolve(op: str, table: Implementations, name: str, device_type: str) -> Callable[..., Any]:
    """The implementation called ``name``.

    ``auto`` is ``torch`` on a CPU. On a GPU it is the op's own entry ``auto``, which chooses at each call, else
    ``triton`` where that can run, else ``torch``. Raises ValueError, listing what the op has, for any other name, and
    for ``triton`` and ``flash_attn`` where they cannot run, saying why.
    """
    if name == "auto" and device_type == "cuda" and "auto" in table:
        return table["auto"]
    if name == "auto":
        name = "triton" if device_type == "cuda" and "triton" in table and triton_is_fast() else "torch"
    if name not in table:
        known = list(dict.fromkeys(["auto", *table]))
        raise ValueError(f"{op}: no implementation {name!r}; it has {', '.join(known)}{near_miss(name, known)}")
    problem = _PROBLEMS[name](device_type) if name in _PROBLEMS else None
    if problem:
        raise ValueError(f"{op}: implementation {name!r} cannot run: {problem}")
    return table[name]


def require(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ValueError, naming the argument, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def require_shape(op: str, argument: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has exactly this shape."""
    require(tuple(tensor.shape) == expected, op, argument, f"shape {expected}", f"shape {tuple(tensor.shape)}")


def require_floating(op: str, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless every tensor has one of :data:`KERNEL_DTYPES`."""
    for name, tensor in tensors.items():
        expected = "float32, bfloat16, float16 or float64"
        require(tensor.dtype in KERNEL_DTYPES, op, name, expected, tensor.dtype)


def require_same(op: str, what: str, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors share the attribute ``what`` (``"dtype"`` or ``"device"``)."""
    (first_name, first), *rest = tensors.items()
    expected = getattr(first, what)
    for name, tensor in rest:
        got = getattr(tensor, what)
        require(got == expected, op, name, f"the {what} of {first_name} ({expected})", got)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype statistics and products are computed in: float32, or float64 where an input is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
