"""Fixtures of the kernel tests; tests/conftest.py has chosen Triton's interpreter where there is no GPU."""

import sys
from collections.abc import Iterator

import pytest
import torch
from pico_kernels.conformance_interpreter import bfloat16_rounds_to_nearest

if sys.platform != "linux":  # Triton has no packages for other systems; on Linux it is a development dependency
    collect_ignore_glob = ["*_triton.py", "test_aot.py", "test_gpu*.py"]


@pytest.fixture(autouse=True, scope="session")
def _interpreted_bfloat16_rounds_to_nearest() -> Iterator[None]:
    with bfloat16_rounds_to_nearest():
        yield


@pytest.fixture
def nan_poisoned() -> Iterator[None]:
    """Fills what torch.empty and its like return with NaN: an element that no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
