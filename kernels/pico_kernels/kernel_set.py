"""The implementations a model is built with, one per op."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from pico_kernels._dispatch import Implementations, near_miss, resolve
from pico_kernels.attention import ATTENTION
from pico_kernels.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from pico_kernels.rms_norm import ADD_RMS_NORM, RMS_NORM
from pico_kernels.rope import ROPE
from pico_kernels.swiglu import SWIGLU

OPS: Mapping[str, Implementations] = {
    "rms_norm": RMS_NORM,
    "add_rms_norm": ADD_RMS_NORM,
    "rope": ROPE,
    "swiglu": SWIGLU,
    "attention": ATTENTION,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
}
"""Every op and its implementations by name."""


def import_callable(path: str) -> Callable[..., Any]:
    """The callable at ``package.module:function``; ValueError if there is none."""
    module_name, _, function_name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in function_name.split("."):
            found = getattr(found, attribute)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ValueError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{path!r} is not callable but {type(found).__name__}")
    return found


@dataclass(frozen=True)
class KernelSet:
    """One callable per op, with the signatures of the public functions of :mod:`pico_kernels`.

    The callables are bare implementations: they trust their arguments, as a model's shapes are right by construction.
    """

    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rope: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    swiglu: Callable[..., torch.Tensor]
    attention: Callable[..., torch.Tensor]
    linear_cross_entropy: Callable[..., torch.Tensor]

    @classmethod
    def from_config(
        cls, mapping: Mapping[str, str | None] | None = None, device: torch.device | str = "cpu"
    ) -> KernelSet:
        """Choose implementations by name.

        Args:
            mapping: op to ``auto``, the name of one of its implementations, or ``package.module:function``. The key
                ``default`` speaks for ops that are absent or None; an op that lacks the default's implementation is
                an error too.
            device: where the model will run; decides ``auto``.

        Raises ValueError that lists every problem: unknown op, unknown implementation, failed import, not callable.
        """
        requested = dict(mapping or {})
        default = requested.pop("default", None) or "auto"
        problems = [
            f"no op {op!r}; there are default, {', '.join(OPS)}{near_miss(op, [*OPS, 'default'])}"
            for op in requested
            if op not in OPS
        ]
        device_type = torch.device(device).type
        chosen: dict[str, Callable[..., Any]] = {}
        for op, table in OPS.items():
            name = requested.get(op) or default
            try:
                chosen[op] = import_callable(name) if ":" in name else resolve(op, table, name, device_type)
            except ValueError as error:
                message = str(error)
                problems.append(message if message.startswith(f"{op}:") else f"{op}: {message}")
        if problems:
            raise ValueError("kernels: " + "; ".join(problems))
        return cls(**chosen)

    def describe(self) -> dict[str, str]:
        """Op to the name of its implementation, or ``module:function`` for one from elsewhere.

        ``auto`` is an op's own choice at each call.
        """
        return {field.name: _name_of(field.name, getattr(self, field.name)) for field in fields(self)}


def _name_of(op: str, implementation: Callable[..., Any]) -> str:
    for name, known in OPS[op].items():
        if known is implementation:
            return name
    module = getattr(implementation, "__module__", type(implementation).__module__)
    return f"{module}:{getattr(implementation, '__qualname__', type(implementation).__qualname__)}"
