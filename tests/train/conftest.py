"""Fixtures of the trainer's tests."""

import pytest

from pico_fast import setup_run


@pytest.fixture(autouse=True)
def _matmul_rate_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a quarter of a second at the start of every run; tests/test_flops.py and subprocesses measure it."""
    monkeypatch.setattr(setup_run, "peak_flops", lambda device, dtype: (1e12, "of 1 TFLOP/s, made up by the tests"))
