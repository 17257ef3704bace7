"""Every test and benchmark that needs a GPU, in one command: ``python -m benchmarks.gpu --out DIR --minutes 8``.

Needs torch, Triton, numpy and pytest, uses pytest-benchmark and matplotlib where they are, and installs nothing: the
repository's own packages come from this checkout. Opponents and plots that cannot be had are left out, and said so. DIR
gets machine.json, tests.log, tests.xml, kernels.jsonl (a line per result, as it comes), kernels.json (in the form of
pytest-benchmark) and kernels.md with its plots. ``--only attention,linear_cross_entropy`` narrows tests and benchmarks.

Exit code: 0 all is well; 1 a test failed, did not run, or one of our kernels raised or gave a wrong result; 2 no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_TESTS_SHARE = 0.45  # of the time, at most: compiling some 200 specialisations takes most of it
_GRACE_SECONDS = 25.0  # a case that was begun in time may end; then the process is stopped


def main(argv: list[str] | None = None) -> int:
    """Run the tests, then the benchmarks; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="budget (%(default)s)")
    parser.add_argument("--only", metavar="OP,OP", help="these ops only, in the tests too")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU, no gpu tests: tries this command itself"
    )
    arguments = parser.parse_args(argv)
    started = time.time()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, or it does not interpret
    else:
        os.environ.pop("TRITON_INTERPRET", None)  # kernels are to be compiled here, whatever the shell says
    try:
        import torch
    except ImportError as error:
        sys.stderr.write(f"benchmarks.gpu: torch cannot be imported: {error}\n")
        return 2
    only = chosen_ops(parser, arguments.only)
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.stderr.write(f"benchmarks.gpu: no GPU: torch {torch.__version__} sees no CUDA device\n")
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    (out / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    say(f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton'] or 'is missing'}")
    end = started + 60 * arguments.minutes
    tests_failed = False
    if not arguments.rehearse and not arguments.no_tests:
        tests_failed = not run_tests(out, time.time() + _TESTS_SHARE * (end - time.time()), only)
    benchmarks_failed = not run_benchmarks(out, end, machine, only, rehearse=arguments.rehearse)
    write_report(out)
    say(f"{time.time() - started:.0f} s; results in {out}")
    return 1 if tests_failed or benchmarks_failed else 0


def chosen_ops(parser: argparse.ArgumentParser, only: str | None) -> tuple[str, ...]:
    """The ops named, or all. An unknown one ends the command. Makes this checkout's packages importable."""
    sys.path[:0] = [path for path in (str(ROOT / "kernels"), str(ROOT)) if path not in sys.path]
    from benchmarks.kernel_cases import OPS

    chosen = tuple(only.split(",")) if only else OPS
    for op in chosen:
        if op not in OPS:
            parser.error(f"--only: expected some of {', '.join(OPS)}, got {op!r}")
    return chosen


def say(text: str) -> None:
    """One line of progress."""
    print(f"benchmarks.gpu: {text}", flush=True)


def has(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    triton: str | None = None
    if has("triton"):
        import triton as module

        triton = module.__version__
    machine: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "device": platform.processor() or "CPU",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
        }
    return machine


def environment(**more: str) -> dict[str, str]:
    """Ours, with this checkout's packages importable."""
    paths = [str(ROOT / "kernels"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **more}


def run_until(command: list[str], end: float, log: Path, env: dict[str, str]) -> int | None:
    """Exit code, None if it was stopped at ``end`` (time.time()); output goes to ``log``, its last lines are shown."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    for line in log.read_text(errors="replace").splitlines()[-25:]:
        print(f"    {line}")
    return code


def _pytest(*options: str) -> list[str]:
    # --noconftest: tests/conftest.py wants pyarrow and yaml, which a bare machine lacks.
    return [sys.executable, "-m", "pytest", "--noconftest", "-v", "-rfEs", "--tb=short", *options]


def selected_tests(only: Sequence[str]) -> list[str]:
    """pytest's arguments: every file of gpu tests, without the tests that name but ops left out."""
    from benchmarks.kernel_cases import OPS

    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_gpu*.py"))
    left_out = [op for op in OPS if op not in only]
    narrowed = ["-k", f"{' or '.join(only)} or not ({' or '.join(left_out)})"] if left_out else []
    return [*files, "-m", "gpu", *narrowed]


def run_tests(out: Path, end: float, only: Sequence[str]) -> bool:
    """The tests marked gpu; whether they all ran and passed."""
    if not has("pytest"):
        say("pytest is missing: the gpu tests were not run")
        return False
    say(f"gpu tests, at most {end - time.time():.0f} s")
    command = _pytest(*selected_tests(only), f"--junitxml={out / 'tests.xml'}")
    code = run_until(command, end, out / "tests.log", environment())
    say("gpu tests " + {0: "passed", None: "were stopped: out of time"}.get(code, f"failed (pytest exit code {code})"))
    return code == 0


def run_benchmarks(out: Path, end: float, machine: dict[str, Any], only: tuple[str, ...], *, rehearse: bool) -> bool:
    """All cases of the ops until the time is used up; whether none of our kernels failed."""
    from benchmarks.gpu_session import Session, Settings, benchmark_json

    def measure_all(settings: Settings) -> None:
        session = Session(settings)
        for name in session.case_names:
            session.line(name, "", "")

    lines_file, json_file = out / "kernels.jsonl", out / "kernels.json"
    for file in (lines_file, json_file):
        file.unlink(missing_ok=True)
    settings = Settings(end - _GRACE_SECONDS, str(lines_file), 0.0 if rehearse else 2.0, rehearse, only)
    say(f"benchmarks, {end - time.time():.0f} s")
    code: int | None = 0
    if has("pytest_benchmark"):
        command = _pytest("benchmarks/test_kernels_gpu.py", f"--benchmark-json={json_file}", "--benchmark-quiet")
        code = run_until(command, end, out / "benchmarks.log", environment(**settings.to_environment()))
        if code is None:
            say("benchmarks were stopped: out of time")
        elif code and not (lines_file.exists() and lines_file.stat().st_size):
            say(f"pytest-benchmark cannot be used here (exit code {code}): measuring without it")
            json_file.unlink(missing_ok=True)
            code = 0
            measure_all(settings)
    else:
        say("pytest-benchmark is missing: measuring without it")
        measure_all(settings)
    lines = [json.loads(line) for line in lines_file.read_text().splitlines()] if lines_file.exists() else []
    if json_file.exists() and json_file.stat().st_size:
        found = json.loads(json_file.read_text())
        found["machine_info"] = machine | {"node": found["machine_info"]}
    else:
        found = benchmark_json(lines, machine)
    found["planned"] = Session(settings).case_names
    found["not_measured"] = reasons(lines)
    json_file.write_text(json.dumps(found) + "\n")
    for reason in found["not_measured"]:
        say(reason)
    wrong = any(line.get("is_error") for line in lines)
    if wrong:
        say("one of our kernels failed: see above")
    return not wrong and bool(found["benchmarks"]) and code in (0, None)


def reasons(lines: list[dict[str, Any]]) -> list[str]:
    """Why what was not measured, each reason once with the cases it concerns."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if "reason" in line:
            by_reason.setdefault((line["opponent"] or "all", line["reason"]), []).append(line["case"])
    return [
        f"{name}: {reason} ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
        for (name, reason), names in by_reason.items()
    ]


def write_report(out: Path) -> None:
    """kernels.md and its plots; a report that fails must not cost the numbers."""
    command = [sys.executable, "-m", "benchmarks.report", str(out / "kernels.json"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    say(done.stdout.strip().replace("\n", "; ") if done.returncode == 0 else f"no report: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main())
