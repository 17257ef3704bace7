"""benchmarks.tune: what it tries, what it keeps, and that it leaves the configuration functions as they were."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from pico_kernels._triton import triton_problem

from benchmarks import tune
from benchmarks.kernel_cases import OPS
from benchmarks.tune import KNOBS, Override, alternatives, main, search

NEEDS_TRITON = pytest.mark.skipif(triton_problem("cpu") is not None, reason="Triton's interpreter is not available")


@dataclass(frozen=True)
class Config:
    block: int = 64
    widths: tuple[int, int] = (64, 32)
    num_warps: int = 4
    num_stages: int = 2


def test_alternatives_are_neighbours() -> None:
    assert alternatives("block", 64) == [32, 128]
    assert alternatives("block", 1) == [2]
    assert alternatives("num_warps", 4) == [2, 8]
    assert alternatives("num_stages", 2) == [1, 3, 4]
    assert alternatives("widths", (64, 32)) == []


def test_search_keeps_what_is_faster_by_more_than_noise_and_runs() -> None:
    override = Override(Config)

    def time_of() -> float | None:
        config = override()
        if config.block == 128:
            return None  # too large to launch
        return 10.0 - (config.block == 32) * 5 - (config.num_warps == 8) * 0.01 + (config.num_stages == 3)

    assert search(override, time_of) == (10.0, 5.0)
    assert override.changes == {"block": 32}
    assert override.seen == Config()


def test_a_function_that_is_never_called_has_nothing_to_search() -> None:
    override = Override(Config)
    assert search(override, lambda: 3.0) == (3.0, 3.0)
    assert override.seen is None


@NEEDS_TRITON
def test_every_knob_is_a_function_of_its_module() -> None:
    assert set(KNOBS) <= set(OPS)
    for module, function in (knob for knobs in KNOBS.values() for knob in knobs):
        assert callable(getattr(importlib.import_module(f"pico_kernels.{module}"), function))


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses in Triton's interpreter")
def test_rehearsal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = importlib.import_module("pico_kernels.swiglu_triton").swiglu_config
    assert main(["swiglu", "--rehearse"]) == 0
    assert importlib.import_module("pico_kernels.swiglu_triton").swiglu_config is before
    printed = capsys.readouterr().out
    assert printed.startswith("swiglu-d96-16 swiglu_config: SwiGLUConfig(block_rows=1, ")
    assert " us" in printed


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses in Triton's interpreter")
@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy"])
def test_the_launches_take_the_configurations_that_are_tried(
    op: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tune, "alternatives", lambda name, value: [])
    assert main([op, "--rehearse"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for (_, function), line in zip(KNOBS[op], printed, strict=True):
        assert f" {function}: " in line
        assert "Config(" in line  # of a function never called it says so
        assert line.endswith(" us, none better")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.tune: no GPU: torch ")
