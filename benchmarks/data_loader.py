"""Tokens per second of the data loader alone, on one core: ``python -m benchmarks.data_loader``.

Local parquet in pico's schema, rows of 2,049 ids, is made in a temporary folder; files are in the page cache. Beside
:class:`~pico_fast.data.stream.BatchStream` the way pico-train reads is timed: ``datasets`` streaming, Python lists.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pico_fast.data.packing import write_shard
from pico_fast.data.source import open_rows
from pico_fast.data.stream import BatchStream

ROW_LEN, VOCAB_SIZE, BATCH = 2049, 50304, 1024
GOAL = 20e6  # tokens/s on one core


def make_rows(folder: Path, shards: int, rows: int) -> None:
    """Write shards of ids distributed as words are (Zipf), which is what decides how well they compress."""
    generator = np.random.default_rng(0)
    (folder / "data").mkdir()
    for shard in range(shards):
        ids = (generator.zipf(1.2, (rows, ROW_LEN)) % VOCAB_SIZE).astype(np.int32)
        write_shard(folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet", ids, shard * rows)


def batch_stream(folder: Path) -> Iterator[int]:
    """Tokens of each batch as pico-fast gives them."""
    rows = open_rows(str(folder), row_len=ROW_LEN, vocab_size=VOCAB_SIZE)
    with BatchStream(rows, batch_size=BATCH, micro_batches=8) as stream:
        for batch in stream:
            yield batch.numel()


def python_lists(folder: Path) -> Iterator[int]:
    """Tokens of each batch of 64 rows as pico-train reads them: ``datasets`` streaming, each row a Python list."""
    import datasets

    files = [str(file) for file in sorted((folder / "data").iterdir())]
    while True:
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        for batch in torch.utils.data.DataLoader(rows, batch_size=64, collate_fn=_collate):
            yield torch.tensor(batch, dtype=torch.long).numel()


def _collate(examples: list[dict[str, list[int]]]) -> list[list[int]]:
    return [example["input_ids"] for example in examples]


def tokens_per_second(source: Callable[[Path], Iterator[int]], folder: Path, seconds: float) -> float:
    """Rate over ``seconds``, after one batch that is not counted."""
    batches = source(folder)
    next(batches)
    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        tokens += next(batches)
    return tokens / (time.perf_counter() - started)


def one_core() -> str:
    """Hold this process, all its threads, on one core; how that was done."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return "thread pools of one (this system cannot pin a process to a core)"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f"pinned to core {core}"


def main() -> int:
    """Print the rates; exit code 1 below the goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_loader", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement (%(default)s)")
    parser.add_argument("--rows", type=int, default=8192, help="per shard, of two (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    held = one_core()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder, 2, arguments.rows)
        stored = sum(file.stat().st_size for file in (folder / "data").iterdir()) / (2 * arguments.rows * ROW_LEN)
        print(f"rows of {ROW_LEN:,} ids, {stored:.2f} bytes per id, zstd; {held}")
        fast = tokens_per_second(batch_stream, folder, arguments.seconds)
        slow = tokens_per_second(python_lists, folder, arguments.seconds)
    print(f"BatchStream   {fast / 1e6:7.1f} million tokens/s (goal: {GOAL / 1e6:.0f})")
    print(f"Python lists  {slow / 1e6:7.1f} million tokens/s (as pico-train reads)")
    print(f"ratio         {fast / slow:7.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"batch_stream": fast, "python_lists": slow, "unit": "tokens/s"}) + "\n")
    return 0 if fast >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
