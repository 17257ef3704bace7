"""The GPU benchmarks' parts that need no GPU: byte floors, the correctness gate, the race, the command's rehearsal."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico_kernels._triton import PICO_SHAPES

from benchmarks import gpu, gpu_session, kernel_matrix_opponents, kernel_timing
from benchmarks.gpu_session import Session, Settings, benchmark_json
from benchmarks.kernel_attention import bound, prediction_table
from benchmarks.kernel_cases import (
    CARDS,
    COPY,
    OPS,
    OURS,
    POINTWISE,
    ROPE,
    STEP,
    THEIRS,
    Case,
    byte_floor,
    cases,
    flops,
    predicted_seconds,
    prediction_tables,
)
from benchmarks.kernel_clocks import Ceilings, CpuClock, ceilings
from benchmarks.kernel_opponent import Opponent
from benchmarks.kernel_opponents import make_inputs, opponents
from benchmarks.kernel_timing import Gate, NotEnoughMemoryError, lines_of, measure

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPE = replace(PICO_SHAPES[0], vocab=131)
TINY = {op: Case(op, SHAPE, 32, seq_len=16) for op in OPS}
CEILINGS = Ceilings(1e9, 1e12)


def truth_of(op: str) -> Callable:
    return opponents(TINY[op], CPU)[0][0].truth


@pytest.mark.parametrize("op", POINTWISE)
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


def test_byte_floor_and_flops_of_attention_and_the_loss() -> None:
    q, k, v = make_inputs(TINY["attention"], CPU)
    assert byte_floor(TINY["attention"], "forward") == 2 * q.nbytes + k.nbytes + v.nbytes
    assert byte_floor(TINY["attention"], "backward") == 4 * q.nbytes + 2 * (k.nbytes + v.nbytes)
    full = 2 * sum(2 * batch * heads * 16 * 16 * 8 for batch, heads in [(2, 12)])  # both products over all scores
    assert flops(TINY["attention"], "forward") == full // 2
    assert flops(TINY["attention"], "backward") == 2.5 * full / 2
    hidden, weight = make_inputs(TINY["linear_cross_entropy"], CPU)
    assert byte_floor(TINY["linear_cross_entropy"], STEP) == 2 * hidden.nbytes + 2 * weight.nbytes + 32 * 8
    assert flops(TINY["linear_cross_entropy"], STEP) == 3 * 2 * 32 * 131 * 96
    assert flops(TINY["rope"], "forward") is None


def test_cases_are_every_size_and_length_the_important_first() -> None:
    found = cases()
    assert len({case.name for case in found}) == len(found) == 4 * (4 * 2 + 3 + 2) + 3
    assert {case.shape.d_model for case in found if case.op != "attention"} == {96, 384, 768, 1536}
    assert {(case.tokens, case.seq_len, case.shape.head_dim) for case in found if case.op == "attention"} == {
        (32768, seq_len, head_dim) for seq_len in (512, 2048, 8192) for head_dim in (8, 16, 32, 64, 128)
    }
    assert [case.name for case in found[:3]] == [
        "attention-d96-32k-s2048",
        "linear_cross_entropy-d96-32k",
        "attention-d768-32k-s2048",
    ]
    assert {case.op for case in cases(["rope", "attention"])} == {"rope", "attention"}
    rotated = [case.tokens for case in cases(["rope"])]
    assert rotated == [65536] * 4 + [16384] * 4


def test_an_unknown_op_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"byte_floor: op: expected one of rms_norm, .* got 'conv'"):
        byte_floor(replace(TINY["rope"], op="conv"), "forward")


def test_prediction_is_floor_over_copy_rate() -> None:
    case = Case("rms_norm", PICO_SHAPES[2], 65536)
    h200 = CARDS[0]
    assert predicted_seconds(case, "forward", h200) == pytest.approx(1.5e-6 + (2 * 65536 * 768 * 2 + 768 * 4) / 4.3e12)


def test_the_document_has_the_tables_that_the_benchmark_uses() -> None:
    assert prediction_tables().strip() in (ROOT / "docs" / "performance-kernels-gpu.md").read_text()


def test_the_document_has_the_bounds_of_attention() -> None:
    assert prediction_table().strip() in (ROOT / "docs" / "performance-attention-gpu.md").read_text()
    tiny = bound(Case("attention", PICO_SHAPES[0], 32768, 2048), "forward")
    assert tiny.seconds == tiny.exponentials == pytest.approx(16 * 12 * 2048 * 1024 / (132 * 16 * 1.75e9))
    large = bound(Case("attention", PICO_SHAPES[3], 32768, 2048), "backward")
    assert large.seconds == large.products == pytest.approx(7 * 2 * 16 * 12 * 2048 * 1024 * 128 / 790e12)


def test_an_opponent_that_writes_over_its_arguments_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts every round from the same values, and the others never see what it left."""
    seen: dict[str, set] = {"careless": set(), "careful": set()}
    truth = truth_of("swiglu")

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
    monkeypatch.setattr(Gate, "why_wrong", lambda *arguments: None)
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
    for line in lines_of(result, CEILINGS):
        assert len(line["seconds"]) >= 5
        assert line["percent_of_copy"] > 0
        assert line["bytes"] == byte_floor(case, line["direction"])


@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy"])
def test_opponents_that_run_here_pass_the_gate_and_are_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those of other libraries, of a GPU and of Triton's interpreter, which the rehearsal runs."""
    case = TINY[op]
    found, missing = opponents(case, CPU)
    assert {opponent.name for opponent in found} | set(missing) == {*OURS[op], *THEIRS[op]}
    quick = [opponent for opponent in found if opponent.name not in ("triton", "tiles", "chunks")]
    monkeypatch.setattr(kernel_timing, "opponents", lambda case, device: (quick, {}) if case.op == op else rope)
    rope = ([Opponent("torch", lambda q, k: (q * 2, k), lambda q, k: (q * 2, k))], {})
    monkeypatch.setattr(CpuClock, "peak_bytes", lambda self, work: work() or 77)
    result = measure(case, CPU, CpuClock(), 0.0)
    assert {name for name, reason in result.refused.items() if "No viable backend" not in reason} == set()
    here = {"auto", "sdpa flash"} if op == "attention" else {"auto", "torch", "plain"}
    assert {name for name, _ in result.timings} >= here
    for line in lines_of(result, CEILINGS):
        assert len(line["seconds"]) >= 5
        if line["opponent"] == ROPE:
            assert line["bytes"] == byte_floor(replace(case, op="rope"), line["direction"])
        else:
            rate = flops(case, line["direction"]) / statistics.median(line["seconds"])
            assert line["percent_of_matmul"] == pytest.approx(100 * rate / 1e12)
            assert line["peak_bytes"] == 77
    assert (ROPE in {name for name, _ in result.timings}) == (op == "attention")


def test_an_opponent_too_large_for_the_memory_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = truth_of("linear_cross_entropy")
    found = [Opponent("small", truth, truth), Opponent("large", truth, truth, bytes_per_call=1 << 40)]
    monkeypatch.setattr(kernel_timing, "opponents", lambda case, device: (found, {}))
    result = measure(TINY["linear_cross_entropy"], CPU, CpuClock(), 0.0)
    assert set(result.timings) == {("small", STEP)}
    assert result.refused == {"large": "not timed: needs some 1100 GB, 0 are free"}


def test_an_opponent_of_much_memory_is_timed_on_as_many_buffers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = TINY["swiglu"], {"small": 0, "large": 0}
    truth = truth_of("swiglu")

    def counted(name: str) -> Callable:
        def call(*tensors: torch.Tensor) -> tuple:
            calls[name] += 1
            return truth(*tensors)

        return call

    share = 0.8 * CpuClock().free_bytes()
    found = [
        Opponent("small", counted("small"), truth),
        Opponent("large", counted("large"), truth, bytes_per_call=int(share / 1.5)),
        Opponent("huge", truth, truth, bytes_per_call=int(share * 1.01)),
    ]
    monkeypatch.setattr(kernel_timing, "opponents", lambda case, device: (found, {}))
    result = measure(case, CPU, CpuClock(), 0.0)
    assert set(result.refused) == {"huge"}
    assert {name for name, _ in result.timings} == {"small", "large", COPY}
    timed = {name: count - 1 for name, count in calls.items()}  # the gate calls each once
    assert timed["small"] == 2 * timed["large"] > 0


def fake_liger(*arguments: object) -> tuple:
    """Of the signature of liger_kernel 0.8.5's LigerFusedLinearCrossEntropyFunction.apply, and its four results."""
    hidden, weight, target, bias, class_weight, ignore_index, lse_square_scale, smoothing, reduction = arguments[:9]
    softcap, return_z_loss, accumulator = arguments[9:]
    assert (bias, class_weight, lse_square_scale, smoothing, softcap, return_z_loss) == (None, None, 0, 0, None, False)
    assert (reduction, accumulator) == ("mean", torch.float32)
    loss = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), target, ignore_index=ignore_index)
    return loss, None, None, None


def fake_cut(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, **options: object) -> torch.Tensor:
    """Of the signature of cut_cross_entropy 25.1.1's linear_cross_entropy."""
    assert e.dtype == c.dtype == torch.bfloat16
    assert options == {"filter_eps": None}
    return torch.nn.functional.cross_entropy((e @ c.t()).float(), targets)


@pytest.mark.parametrize("name", ["liger", "cut_cross_entropy"])
def test_other_libraries_are_called_as_they_want(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    liger = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    liger.LigerFusedLinearCrossEntropyFunction = types.SimpleNamespace(apply=fake_liger)
    cut = types.ModuleType("cut_cross_entropy")
    cut.linear_cross_entropy = fake_cut
    for path in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    monkeypatch.setitem(sys.modules, cut.__name__, cut)
    case = TINY["linear_cross_entropy"]
    (opponent,) = [opponent for opponent in opponents(case, CPU)[0] if opponent.name == name]
    inputs = make_inputs(case, CPU)
    assert Gate(inputs, (torch.tensor(0.5),)).why_wrong(opponent) is None


def test_the_strategy_that_is_not_chosen_is_an_opponent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_matrix_opponents, "_implementation", lambda *arguments: lambda *tensors: None)
    names = {"tiles", "chunks"}
    for shape in PICO_SHAPES:
        found, missing = opponents(Case("linear_cross_entropy", shape, 32), CPU)
        forced = {opponent.name for opponent in found} & names
        assert len(forced) == (1 if shape.d_model <= 384 else 0)
        assert names - forced == names & set(missing)


def test_ceilings_are_positive_rates() -> None:
    found = ceilings(CPU, CpuClock())
    assert 1e7 < found.copy_bytes_per_second < 1e13
    assert 1e6 < found.matmul_flops_per_second < 1e14


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


def test_a_session_measures_only_the_ops_asked_for() -> None:
    session = Session(Settings(rehearse=True, only=("rope", "linear_cross_entropy")))
    assert session.case_names == ["rope-d96-16", "linear_cross_entropy-d96-16"]
    assert session.points[0] == ("rope-d96-16", "forward", "triton")
    assert ("rope-d96-16", "backward", COPY) in session.points
    assert session.points[-1] == ("linear_cross_entropy-d96-16", STEP, "cut_cross_entropy")
    assert Session(Settings(rehearse=True)).points.count(("attention-d96-16-s8", "forward", ROPE)) == 1


def test_every_file_of_gpu_tests_is_run_and_only_leaves_out_other_ops() -> None:
    everything = gpu.selected_tests(OPS)
    files = ["tests/kernels/test_gpu.py", "tests/kernels/test_gpu_matrix.py"]
    assert everything == [*files, "-m", "gpu"]
    *others, flag, expression = gpu.selected_tests(("rope", "attention"))
    assert (others, flag) == ([*files, "-m", "gpu"], "-k")

    def chosen(test: str) -> bool:  # pytest's expressions are Python's, names being parts of the test's
        return eval(expression, {}, {op: op in test for op in OPS})

    assert chosen("test_zero_rows[attention]")
    assert chosen("test_rope_numbers[8]")
    assert chosen("test_a_mix_of_devices_is_an_error")
    assert not chosen("test_linear_cross_entropy_conforms[tiles]")
    assert not chosen("test_norm_numbers[add_rms_norm-96]")


def test_an_unknown_op_ends_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as the command does: put back for the tests after this
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path), "--only", "attention,atention"])
    assert stopped.value.code == 2
    assert "--only: expected some of rms_norm, add_rms_norm, rope, " in capsys.readouterr().err


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
    without = set() if importlib.util.find_spec("triton") else {"triton", "tiles", "chunks"}
    chosen = {"tiles"}  # by `triton`: not measured under its own name too
    assert timed >= {
        (op, direction, name)
        for op in OPS
        for direction in TINY[op].directions
        for name in set(OURS[op]) - without - chosen
    }
    lines = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    by_key = {(line["op"], line["direction"], line["opponent"]): line for line in lines if "seconds" in line}
    for benchmark in found["benchmarks"]:  # what pytest-benchmark reports is what was measured
        key = tuple(benchmark["extra_info"][name] for name in ("op", "direction", "opponent"))
        assert sorted(benchmark["stats"]["data"]) == pytest.approx(sorted(by_key[key]["seconds"]), rel=1e-6)
    assert any(reason.startswith("torch.compile: ") for reason in found["not_measured"])
    assert found["planned"] == list(dict.fromkeys(line["case"] for line in lines))
    text = (tmp_path / "kernels.md").read_text()
    assert all(f"## {title}" in text for title in ("swiglu backward", "attention forward", "RoPE beside attention"))


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
