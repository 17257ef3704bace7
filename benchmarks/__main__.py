"""Everything this machine can measure in a few minutes: ``python -m benchmarks`` (``make bench``)."""

from __future__ import annotations

import subprocess
import sys

SUITES = [
    ["-m", "benchmarks.data_loader"],
    ["-m", "benchmarks.train_step"],
    ["-m", "pytest", "benchmarks/test_ops_cpu.py", "--benchmark-columns=median,iqr,rounds"],
]


def main() -> int:
    """Run the suites one after the other; exit code 1 if one failed."""
    codes = [subprocess.run([sys.executable, *suite]).returncode for suite in SUITES]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
