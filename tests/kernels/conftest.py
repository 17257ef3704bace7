"""Triton's interpreter for machines without a GPU, and fixtures of the kernel tests.

Triton decides when it is imported whether its functions are interpreted, so TRITON_INTERPRET=1 is set here, when pytest
collects this folder and before any test has run. Subprocesses inherit it: a test that needs the real compiler (the
ahead-of-time suite) must drop TRITON_INTERPRET from its subprocess's environment.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported before tests/kernels/conftest.py: run pytest with TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _interpreted_bfloat16_rounds_to_nearest() -> Iterator[None]:
    """The interpreter truncates where a GPU rounds to nearest; half of all bfloat16 values would be an ulp off."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = interpreter.tl
    truncate = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != language.bfloat16 or source.dtype.scalar not in (language.float32, language.float64):
            return truncate(self, source, target)
        bits = torch.as_tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, target.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
        yield


@pytest.fixture
def nan_poisoned() -> Iterator[None]:
    """Fills what torch.empty and its like return with NaN: an element that no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
