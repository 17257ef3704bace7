"""What ``make bench`` runs: the benchmarks this machine can run, with a report, in about five minutes.

On a GPU :mod:`benchmarks.gpu`. On a CPU every op at small shapes (``torch`` against the reference), the data loader and
the training step, its memory too; two threads, as the documented figures. Results go to ``.benchmarks/`` or ``--out``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pico_fast  # noqa: F401 (sets what OpenMP reads when torch is imported; the suites inherit it)

ROOT = Path(__file__).parents[1]


def cpu_steps(out: Path) -> dict[str, tuple[list[str], Path]]:
    """Title to the command's module and arguments, and the JSON it leaves."""
    ops, loader, step, memory = (out / f"{name}.json" for name in ("ops", "data_loader", "train_step", "step_memory"))
    return {
        "Ops on the CPU": (["pytest", "benchmarks/test_ops_cpu.py", f"--benchmark-json={ops}"], ops),
        "Data loader": (["benchmarks.data_loader", "--seconds", "3", "--rows", "4096", "--json", str(loader)], loader),
        "Training step": (
            [
                "benchmarks.train_step",
                "--sequence",
                "512",
                "2048",
                "--steps",
                "2",
                "--micro-batches",
                "1",
                "--json",
                str(step),
            ],
            step,
        ),
        "Memory of a training step": (
            ["benchmarks.step_memory", "--tokens", "4096", "--json", str(memory)],
            memory,
        ),
    }


def main(argv: list[str] | None = None) -> int:
    """Run them in turn; exit code 1 if one did not get as far as its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".benchmarks", help="folder for the results (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="budget on a GPU (%(default)s)")
    arguments = parser.parse_args(argv)
    import torch

    if torch.cuda.is_available():
        from benchmarks.gpu import main as gpu

        return gpu(["--out", str(arguments.out), "--minutes", str(arguments.minutes)])
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print("no GPU: the CPU benchmarks", flush=True)
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    failed = []
    for title, (command, result) in cpu_steps(out).items():
        print(f"\n{title}", flush=True)
        result.unlink(missing_ok=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
        # The data loader's exit code says whether its goal was met; a slow machine is a result, not a failure.
        if not result.exists() or (code and title != "Data loader"):
            failed.append(title)
        elif title == "Ops on the CPU":
            report = [sys.executable, "-m", "benchmarks.report", str(result)]
            if subprocess.run(report, cwd=ROOT, env=environment).returncode:
                failed.append("report")
    print(f"results in {out}" + (f"; failed: {', '.join(failed)}" if failed else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
