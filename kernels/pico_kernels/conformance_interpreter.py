"""Triton's interpreter, made to round as a GPU does.

It truncates float32 to bfloat16, which puts half of all values an ulp off and biases every sum of them; a GPU rounds to
nearest (triton-lang/triton#4972 is the interpreter's other bfloat16 trouble).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pico_kernels._triton import interpreting


@contextmanager
def bfloat16_rounds_to_nearest() -> Iterator[None]:
    """While it lasts, interpreted kernels round to bfloat16 as compiled ones do. No effect without TRITON_INTERPRET."""
    if not interpreting():
        yield
        return
    try:
        from triton.runtime import interpreter
    except ImportError:  # then nothing is interpreted either
        yield
        return
    language = interpreter.tl
    builder = interpreter.InterpreterBuilder
    truncate = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != language.bfloat16 or source.dtype.scalar not in (language.float32, language.float64):
            return truncate(self, source, target)
        bits = torch.as_tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, target.scalar)

    builder.cast_impl = cast
    try:
        yield
    finally:
        builder.cast_impl = truncate
