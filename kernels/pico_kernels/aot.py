"""Compile every Triton kernel for every published size and several GPUs, on a machine that has none.

``python -m pico_kernels.aot --check tests/kernels/aot_table.json`` compiles the ``aot_cases`` of each op's module and
compares what came out with a table: registers of a thread, spills, shared memory, instructions. ``--write`` makes the
table again. A kernel that does not compile, that spills (NVIDIA), that asks for more shared memory than a program can
have or that has a float64 instruction fails in any case.

NVIDIA's numbers are read from the cubin with the ``cuobjdump`` that Triton brings along: ``-res-usage`` for registers
and stack, ``-sass`` for the instructions, without the NOPs that pad the code; every access to local memory (LDL, STL)
counts as a spill, as Triton has no other use for it. Shared memory is Triton's metadata, the bytes a launch asks for.
``.f64`` is counted in the PTX. AMD's numbers come from the metadata and the text of the assembly.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pico_kernels._dispatch import near_miss
from pico_kernels._triton import COMPILE_OPTIONS, PICO_SHAPES, AotCase, interpreting


class Target(NamedTuple):
    """Triton's backend, architecture and warp size, and the bytes of shared memory one program can have."""

    backend: str
    architecture: int | str
    warp_size: int
    shared: int


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}
"""A100, H100 and H200, B200, MI300."""

MODULES: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("rms_norm_triton", "rope_triton", "swiglu_triton", "attention_triton", "linear_cross_entropy_triton"),
    tuple(TARGETS),
)
"""Module to the targets it is compiled for. Tiles of the matrix kernels are sized for NVIDIA: on gfx942 some spill."""

_PROCESSES = 2  # as many as the smallest machine of the suite has cores; the compiler is bound by them

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_AMD_INSTRUCTION = re.compile(r"^\t(?:[sv]|ds|global|buffer|flat|scratch)_\w+", re.MULTILINE)


@dataclass(frozen=True)
class Budget:
    """What one compiled kernel takes.

    Args:
        registers: of a thread (AMD: vector registers).
        spills: instructions that read or write local memory (AMD: spilled registers).
        shared: bytes of shared memory of a program.
        instructions: in the machine code; a loop counts once.
        f64: occurrences of float64 in the PTX (AMD: float64 instructions).
    """

    registers: int
    spills: int
    shared: int
    instructions: int
    f64: int


@functools.cache  # sizes that share a configuration share a cubin; a disassembly takes 0.3 s
def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_budget(cubin: bytes, ptx: str, shared: int) -> Budget:
    text = _disassemble(cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump: no resource usage in {text[:200]!r}")
    operations = [found for found in _INSTRUCTION.findall(text) if found != "NOP"]
    spills = sum(operation in ("LDL", "STL") for operation in operations)
    if int(usage[2]) and not spills:
        raise RuntimeError(f"cuobjdump: a stack of {usage[2]} bytes but no access to it")
    return Budget(int(usage[1]), spills, shared, len(operations), ptx.count(".f64"))


def _amd_budget(assembly: str, shared: int) -> Budget:
    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no .{key} in the assembly")
        return int(found[1])

    instructions = _AMD_INSTRUCTION.findall(assembly)
    spills = metadata("vgpr_spill_count") + metadata("sgpr_spill_count")
    f64 = sum("_f64" in instruction for instruction in instructions)
    return Budget(metadata("vgpr_count"), spills, shared, len(instructions), f64)


def compile_case(case: AotCase, target: str) -> Budget:
    """Compile one kernel for one of :data:`TARGETS` and read what it takes.

    Raises RuntimeError under TRITON_INTERPRET=1, where there is nothing to compile, and whatever the compiler raises.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    names = case.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    signature = {name: case.signature[name] for name in names}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **COMPILE_OPTIONS}
    compiled = compile_kernel(source, target=GPUTarget(*TARGETS[target][:3]), options=options)
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        return _nvidia_budget(compiled.asm["cubin"], compiled.asm["ptx"], shared)
    return _amd_budget(compiled.asm["amdgcn"], shared)


Table = dict[str, dict[str, Any]]
"""``kernel/size/target`` to the fields of a :class:`Budget`, or to ``{"error": ...}``."""


def measure(targets: Iterable[str] = TARGETS) -> Table:
    """Compile every case of every published size for every target, in two processes."""
    jobs = [(module, target) for module, target in product(MODULES, targets) if target in MODULES[module]]
    with ProcessPoolExecutor(_PROCESSES) as pool:
        tables = pool.map(_measure_module, *zip(*reversed(jobs), strict=True))  # the matrix kernels take longest
    return dict(sorted(row for table in tables for row in table.items()))


def _measure_module(module: str, target: str) -> Table:
    """A module's ``AOT_SHAPES``, else the published ones, for one target: in one process, as sizes share cubins."""
    found: Table = {}
    kernels = importlib.import_module(f"pico_kernels.{module}")
    for shape in getattr(kernels, "AOT_SHAPES", PICO_SHAPES):
        for case in kernels.aot_cases(shape):
            key = f"{case.name}/{shape.name}/{target}"
            try:
                found[key] = asdict(compile_case(case, target))
            except Exception as error:  # a compiler error is a result
                found[key] = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    return found


def violations(found: Table) -> list[str]:
    """What no table excuses: kernels that do not compile or cannot be launched, spill on NVIDIA, compute in float64."""
    lines = []
    for key, row in found.items():
        if "error" in row:
            lines.append(f"{key}: does not compile: {row['error']}")
            continue
        target = TARGETS[key.rpartition("/")[2]]
        if row["spills"] and target.backend == "cuda":
            lines.append(f"{key}: {row['spills']} accesses to spilled registers")
        if row["shared"] > target.shared:
            lines.append(f"{key}: {row['shared']} bytes of shared memory, a program has {target.shared}")
        if row["f64"]:
            lines.append(f"{key}: {row['f64']} float64 instructions")
    return lines


def differences(expected: Table, found: Table) -> list[str]:
    """Rows that differ from the table's, are not in it, or are in it for these targets and no longer exist."""
    targets = {key.rpartition("/")[2] for key in found}
    lines = [
        f"{key}: in the table, but there is no such kernel"
        for key in expected
        if key.rpartition("/")[2] in targets and key not in found
    ]
    for key, row in found.items():
        if key not in expected:
            lines.append(f"{key}: not in the table")
            continue
        changed = [
            f"{name} {expected[key].get(name)} -> {value}"
            for name, value in row.items()
            if expected[key].get(name) != value
        ]
        if changed:
            lines.append(f"{key}: {', '.join(changed)}")
    return lines


def write_table(path: Path, triton_version: str, found: Table) -> None:
    """One line per row, so that a diff reads as a table."""
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in found.items())
    path.write_text(f'{{\n"triton": {json.dumps(triton_version)},\n"kernels": {{\n{rows}\n}}\n}}\n', encoding="utf-8")


def read_table(path: Path) -> tuple[str, Table]:
    """The Triton version a table was made by, and its rows. Raises ValueError for a file that is no such table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["triton"], content["kernels"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a table of compiled kernels: {type(error).__name__}: {error}") from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pico_kernels.aot",
        description="Compile every Triton kernel, without a GPU. Exit status 1: one is wrong, 2: wrong usage.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", type=Path, metavar="TABLE", help="compare with this table")
    mode.add_argument("--write", type=Path, metavar="TABLE", help="write this table")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), metavar="T", help=f"default: {' '.join(TARGETS)}")
    options = parser.parse_args(arguments)
    for target in options.target:
        if target not in TARGETS:
            parser.error(f"--target: expected one of {', '.join(TARGETS)}, got {target!r}{near_miss(target, TARGETS)}")
    if options.write and set(options.target) != set(TARGETS):
        parser.error("--write: expected every target, got a part of them: the table would lose the others")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    try:
        import triton

        made_by, expected = read_table(options.check) if options.check else (triton.__version__, {})
    except (ImportError, ValueError) as error:
        print(f"python -m pico_kernels.aot: {error}", file=sys.stderr)
        return 2
    found = measure(options.target)
    problems = violations(found)
    if options.write:
        if not problems:
            write_table(options.write, triton.__version__, found)
    elif options.check and made_by == triton.__version__:
        problems += differences(expected, found)
    elif options.check:
        print(f"the table was made by Triton {made_by}, this is {triton.__version__}: its numbers are not compared")
    else:
        for key, row in found.items():
            print(key, json.dumps(row))
    for problem in problems:
        print(problem)
    print(f"{len(found)} kernels compiled with Triton {triton.__version__}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
