"""The ahead-of-time suite: every Triton kernel at every published size, compiled without a GPU, against its table.

The compiler does not work in a process whose Triton interprets, as this one's does: it runs in subprocesses.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pico_kernels import aot
from pico_kernels._triton import PICO_SHAPES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

TABLE = Path(__file__).parent / "aot_table.json"


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel_compiles_within_its_budget_for_one_target() -> None:
    """`make aot` does the same for all of them, some six times as long."""
    done = compiling("-m", "pico_kernels.aot", "--check", str(TABLE), "--target", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ kernels compiled with Triton \S+: 0 problems$", done.stdout, re.MULTILINE)


def test_the_table_has_every_op_size_and_target() -> None:
    _, rows = aot.read_table(TABLE)
    assert list(rows) == sorted(rows)
    names = [key.split("/") for key in rows]
    published = {shape.name for shape in PICO_SHAPES}
    assert {size for name, size, _ in names if not name.startswith("attention_")} == published
    assert {size for name, size, _ in names if name.startswith("attention_")} - published == {
        "head_16",
        "head_96",
        "head_256",
    }
    assert {target for *_, target in names} == set(aot.TARGETS)
    for op in ("rms_norm", "add_rms_norm", "rope", "swiglu"):
        for direction in ("forward", "backward"):
            kernels = {name for name, *_ in names if name.startswith(f"{op}_{direction}")}
            assert kernels, (op, direction)
            for kernel in kernels:
                assert len([1 for name, *_ in names if name == kernel]) == len(PICO_SHAPES) * len(aot.TARGETS)
    for part in ("forward-bf16", "forward-fp32", "query_gradient-bf16", "key_gradient-bf16", "forward-split-bf16"):
        found = {(size, target) for name, size, target in names if name == f"attention_{part}"}
        assert found >= {(size, target) for size in published for target in aot.MODULES["attention_triton"]}
    for size in (shape.name for shape in PICO_SHAPES):  # which strategy a size takes is the loss's own choice
        found = {target for name, at, target in names if name.startswith("linear_cross_entropy_") and at == size}
        assert found == set(aot.MODULES["linear_cross_entropy_triton"])
    assert aot.violations(rows) == []


TOYS = """
import dataclasses, json, sys
import triton, triton.language as tl
from pico_kernels._triton import AotCase
from pico_kernels.aot import compile_case

@triton.jit
def scale(x_ptr, factor, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, (tl.load(at) * factor).to(tl.float32))

@triton.jit
def reversed_sum(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    x = tl.load(at)
    total = tl.sum(x, 0)
    tl.store(at, x / total)

def budget(kernel, signature, block, warps, target):
    constants = {"BLOCK": block}
    signature = {**signature, "BLOCK": "constexpr"}
    case = AotCase("toy", kernel, signature, constants, warps, aligned=("x_ptr",))
    return dataclasses.asdict(compile_case(case, target))

result = {}
for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
    result[target] = {
        "float32": budget(scale, {"x_ptr": "*fp32", "factor": "fp32"}, 128, 1, target),
        "float64": budget(scale, {"x_ptr": "*fp32", "factor": "fp64"}, 128, 1, target),
    }
result["sm_90"]["spilling"] = budget(reversed_sum, {"x_ptr": "*fp32"}, 32768, 1, "sm_90")
result["sm_90"]["shared"] = budget(reversed_sum, {"x_ptr": "*fp32"}, 1024, 4, "sm_90")
print(json.dumps(result))
"""


def test_spills_shared_memory_and_float64_are_seen(tmp_path: Path) -> None:
    (tmp_path / "toys.py").write_text(TOYS, encoding="utf-8")
    done = compiling(str(tmp_path / "toys.py"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for target, kernels in result.items():
        assert kernels["float32"]["f64"] == 0 < kernels["float64"]["f64"], target
        assert kernels["float32"]["spills"] == 0
        assert 1 <= kernels["float32"]["registers"] <= 32
        assert 5 <= kernels["float32"]["instructions"] <= 60
    assert result["sm_90"]["spilling"]["spills"] > 100
    assert result["sm_90"]["shared"]["shared"] == 16  # one float32 of each of 4 warps


ROW = {"registers": 32, "spills": 0, "shared": 0, "instructions": 100, "f64": 0}


def test_violations() -> None:
    found = {
        "a/tiny/sm_90": ROW,
        "b/tiny/sm_90": ROW | {"spills": 4},
        "b/tiny/gfx942": ROW | {"spills": 4},
        "c/tiny/sm_80": ROW | {"f64": 2, "shared": 166_912},
        "c/tiny/sm_90": ROW | {"shared": 232_449},
        "d/tiny/sm_80": {"error": "CompilationError: at 3:4"},
    }
    assert aot.violations(found) == [
        "b/tiny/sm_90: 4 accesses to spilled registers",
        "c/tiny/sm_80: 2 float64 instructions",
        "c/tiny/sm_90: 232449 bytes of shared memory, a program has 232448",
        "d/tiny/sm_80: does not compile: CompilationError: at 3:4",
    ]


def test_differences(tmp_path: Path) -> None:
    table = {"a/tiny/sm_90": ROW, "b/tiny/sm_90": ROW, "b/tiny/sm_80": ROW}
    found = {"a/tiny/sm_90": ROW | {"registers": 40, "shared": 8}, "c/tiny/sm_90": ROW}
    assert aot.differences(table, found) == [
        "b/tiny/sm_90: in the table, but there is no such kernel",
        "a/tiny/sm_90: registers 32 -> 40, shared 0 -> 8",
        "c/tiny/sm_90: not in the table",
    ]
    path = tmp_path / "table.json"
    aot.write_table(path, "3.9.0", table)
    assert aot.read_table(path) == ("3.9.0", table)
    assert sum("registers" in line for line in path.read_text().splitlines()) == len(table)


@pytest.mark.parametrize("content", ["", "[]", '{"triton": "3.9.0"}'])
def test_a_file_that_is_no_table(content: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a table of compiled kernels"):
        aot.read_table(path)


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (
            ["--target", "sm_09"],
            "0",
            "--target: expected one of sm_80, sm_90, sm_100, gfx942, got 'sm_09', did you mean",
        ),
        (["--write", "table.json", "--target", "sm_90"], "0", "--write: expected every target, got a part of them"),
        (["--target", "sm_90"], "1", "TRITON_INTERPRET is set: unset it"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str],
    interpret: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as stopped:
        aot.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_table_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert aot.main(["--check", str(tmp_path / "none.json")]) == 2
    assert "not a table of compiled kernels: FileNotFoundError" in capsys.readouterr().err
