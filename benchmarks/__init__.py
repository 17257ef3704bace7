"""Speed and memory, measured: each module prints its numbers when run with ``python -m benchmarks.NAME``."""
