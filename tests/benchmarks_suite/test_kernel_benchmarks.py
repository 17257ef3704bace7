"""The GPU benchmarks' parts that need no GPU: byte floors, the correctness gate, the race, the command's rehearsal."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pico_kernels as pk
import pytest
import torch
from pico_kernels._triton import PICO_SHAPES

from benchmarks import gpu, gpu_session, kernel_timing
from benchmarks.gpu_session import Session, Settings, benchmark_json
from benchmarks.kernel_cases import CARDS, OPS, Case, byte_floor, cases, predicted_seconds, prediction_tables
from benchmarks.kernel_clocks import CpuClock
from benchmarks.kernel_opponents import Opponent, bind, make_inputs, opponents
from benchmarks.kernel_timing import COPY, NotEnoughMemoryError, lines_of, measure, why_wrong

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = {op: Case(op, PICO_SHAPES[0], 32, seq_len=16) for op in OPS}


@pytest.mark.parametrize("op", OPS)
def test_byte_floor_is_the_size_of_the_tensors(op: str) -> None:
    case = TINY[op]
    inputs = make_inputs(case, CPU)
    outputs = opponents(case, CPU)[0][0].truth(*inputs)
    size = sum(tensor.nbytes for tensor in (*inputs, *outputs))
    angles = 2 * 16 * 4 * 4 if op == "rope" else 0
    assert byte_floor(case, "forward") == size + angles
    activations = [tensor.nbytes for tensor in inputs if tensor.dim() > 1]
    weights = sum(tensor.nbytes for tensor in inputs if tensor.dim() == 1)
    backward = {
        "rms_norm": 3 * activations[0],
        "add_rms_norm": 4 * activations[0],
        "rope": 2 * sum(activations) + angles,
        "swiglu": 5 * activations[0],
    }[op]
    assert byte_floor(case, "backward") == backward + 2 * weights


def test_cases_are_every_size_and_both_token_counts_the_important_first() -> None:
    found = cases()
    assert len({case.name for case in found}) == len(found) == 4 * 4 * 2
    assert {case.shape.d_model for case in found} == {96, 384, 768, 1536}
    assert [case.tokens for case in found] == [65536] * 16 + [16384] * 16
    assert found[0].name == "rms_norm-d768-64k"


def test_an_unknown_op_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"byte_floor: op: expected one of rms_norm, .* got 'conv'"):
        byte_floor(replace(TINY["rope"], op="conv"), "forward")


def test_prediction_is_floor_over_copy_rate() -> None:
    case = Case("rms_norm", PICO_SHAPES[2], 65536)
    h200 = CARDS[0]
    assert predicted_seconds(case, "forward", h200) == pytest.approx(1.5e-6 + (2 * 65536 * 768 * 2 + 768 * 4) / 4.3e12)


def test_the_document_has_the_tables_that_the_benchmark_uses() -> None:
    assert prediction_tables().strip() in (ROOT / "docs" / "performance-kernels-gpu.md").read_text()


def checked(op: str, change: Callable) -> str | None:
    """What the gate says of the reference with its outputs changed."""
    inputs = make_inputs(TINY[op], CPU)
    truth = bind(TINY[op], pk.OPS[op]["reference"], CPU)
    grads = tuple(torch.randn_like(out) for out in truth(*inputs))
    return why_wrong(Opponent("other", lambda *tensors: change(truth(*tensors)), truth), inputs, grads)


@pytest.mark.parametrize("op", OPS)
def test_the_gate_passes_the_reference_and_stops_what_is_wrong(op: str) -> None:
    assert checked(op, lambda outputs: outputs) is None
    assert checked(op, lambda outputs: (1.05 * outputs[0], *outputs[1:])).startswith("wrong: output 0 is off by ")
    assert checked(op, lambda outputs: (outputs[0] * float("nan"), *outputs[1:])).startswith("wrong: output 0 is off")
    assert checked(op, lambda outputs: (outputs[0][..., :1], *outputs[1:])).startswith(
        "it raised RuntimeError: Mismatch in shape"
    )
    detached = checked(op, lambda outputs: tuple(out + 0.2 * (out - out.detach()) for out in outputs))
    assert detached.startswith(
        "wrong: gradient of input 0 is off by "
    )  # the outputs are right, the gradients 1.2 times


def test_the_gate_reports_what_an_opponent_raises() -> None:
    def broken(outputs: tuple) -> tuple:
        raise RuntimeError("no kernel image\nfor this device")

    assert checked("swiglu", broken) == "it raised RuntimeError: no kernel image"


def test_an_opponent_that_writes_over_its_arguments_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts every round from the same values, and the others never see what it left."""
    seen: dict[str, set] = {"careless": set(), "careful": set()}
    truth = bind(TINY["swiglu"], pk.OPS["swiglu"]["reference"], CPU)

    def record(name: str, tensors: tuple) -> tuple:
        seen[name].add(tuple(tensor.detach().float().sum().item() for tensor in tensors))
        return truth(*tensors)

    def careless(*tensors: torch.Tensor) -> tuple:
        outputs = record("careless", tensors)
        outputs = tuple(out.clone() for out in outputs)
        tensors[0].data.fill_(float("nan"))
        return outputs

    found = [
        Opponent("careless", careless, truth, overwrites=True),
        Opponent("careful", lambda *tensors: record("careful", tensors), truth),
    ]
    monkeypatch.setattr(kernel_timing, "opponents", lambda case, device: (found, {}))
    monkeypatch.setattr(kernel_timing, "why_wrong", lambda *arguments: None)
    result = measure(TINY["swiglu"], CPU, CpuClock(), 0.0)
    assert seen["careless"] == seen["careful"]
    assert len(seen["careful"]) == 1
    assert {name for name, _ in result.timings} == {"careless", "careful", COPY}


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TINY["rope"]
    found, _ = opponents(case, CPU)
    bad = replace(found[0], name="bad", call=lambda q, k: (q * 2, k))
    monkeypatch.setattr(kernel_timing, "opponents", lambda case, device: ([*found, bad], {"liger": "not here"}))
    result = measure(case, CPU, CpuClock(), 0.0)
    assert result.refused["bad"].startswith("not timed: wrong: output 0")
    assert result.refused["liger"] == "not here"
    assert "bad" not in {name for name, _ in result.timings}
    for line in lines_of(result, 1e9):
        assert len(line["seconds"]) >= 5
        assert line["percent_of_copy"] > 0
        assert line["bytes"] == byte_floor(case, line["direction"])


def test_a_case_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuClock, "free_bytes", lambda self: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"needs 0\.0 GB, 0\.0 GB are free"):
        measure(TINY["swiglu"], CPU, CpuClock(), 0.0)


def test_a_session_past_its_deadline_measures_nothing_and_says_so(tmp_path: Path) -> None:
    session = Session(Settings(deadline=0.0, lines=str(tmp_path / "lines"), rehearse=True))
    name = session.case_names[0]
    assert session.line(name, "forward", "triton") == session.line(name, "backward", "liger")
    assert session.line(name, "forward", "triton")["reason"] == "the time is used up"
    assert len((tmp_path / "lines").read_text().splitlines()) == 1  # asked three times, kept once


def test_a_device_error_ends_its_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise RuntimeError("CUDA error: illegal memory access")

    monkeypatch.setattr(gpu_session, "measure", failing)
    session = Session(Settings(rehearse=True))
    line = session.line(session.case_names[0], "forward", "aten")
    assert line["is_error"]
    assert "illegal memory access" in line["reason"]


def test_lines_make_the_json_that_the_report_reads() -> None:
    line = {"op": "rope", "direction": "forward", "opponent": "triton", "case": "rope-d96-16k", "seconds": [3.0, 1.0]}
    found = benchmark_json([line, {"case": "x", "opponent": "apex", "reason": "absent"}], {"device": "X"})
    (benchmark,) = found["benchmarks"]
    assert benchmark["group"] == "rope forward"
    assert benchmark["stats"]["median"] == 2.0
    assert benchmark["extra_info"]["case"] == "rope-d96-16k"


def test_reasons_are_given_once() -> None:
    lines = [{"opponent": "apex", "reason": "absent", "case": f"c{i}"} for i in range(5)]
    lines += [{"opponent": "", "reason": "the time is used up", "case": "c9"}, {"opponent": "triton", "case": "c1"}]
    assert gpu.reasons(lines) == ["apex: absent (c0, c1, c2 and 2 more)", "all: the time is used up (c9)"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks.gpu: no GPU: torch ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def run_rehearsal(out: Path, *python: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, *python, "--out", str(out), "--minutes", "3", "--rehearse"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_the_whole_command_rehearsed(tmp_path: Path) -> None:
    done = run_rehearsal(tmp_path, "-m", "benchmarks.gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kernels.json").read_text())
    timed = {
        (b["extra_info"]["op"], b["extra_info"]["direction"], b["extra_info"]["opponent"]) for b in found["benchmarks"]
    }
    ours = ["torch", "reference", *(["triton"] if importlib.util.find_spec("triton") else [])]
    assert timed >= {(op, direction, name) for op in OPS for direction in ("forward", "backward") for name in ours}
    lines = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    by_key = {(line["op"], line["direction"], line["opponent"]): line for line in lines if "seconds" in line}
    for benchmark in found["benchmarks"]:  # what pytest-benchmark reports is what was measured
        key = tuple(benchmark["extra_info"][name] for name in ("op", "direction", "opponent"))
        assert sorted(benchmark["stats"]["data"]) == pytest.approx(sorted(by_key[key]["seconds"]), rel=1e-6)
    assert any(reason.startswith("torch.compile: ") for reason in found["not_measured"])
    assert "## swiglu backward" in (tmp_path / "kernels.md").read_text()


@pytest.mark.slow
def test_the_command_without_pytest_benchmark(tmp_path: Path) -> None:
    code = (
        "import sys; from benchmarks import gpu; found = gpu.has; "
        "gpu.has = lambda name: name != 'pytest_benchmark' and found(name); sys.exit(gpu.main(sys.argv[1:]))"
    )
    done = run_rehearsal(tmp_path, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pytest-benchmark is missing: measuring without it" in done.stdout
    assert len(json.loads((tmp_path / "kernels.json").read_text())["benchmarks"]) > 20
