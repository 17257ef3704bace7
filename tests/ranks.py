"""Several processes for one test: on a free port, ended after a while, with the failing rank's traceback."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from pico_fast.parallel.layout import Layout

# Importing torch costs 3 s of CPU time per process. So on Linux a server imports it once, computes nothing (torch then
# has no threads or locks that a child could find in a bad state), and every process is forked from it
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(
        [
            "pico_fast",  # first: it sets what OpenMP reads when torch is imported
            "torch._dynamo",  # FSDP2 and others import it when first used
            "torch.distributed.checkpoint",
            "torch.distributed.fsdp",
            "torch.distributed.launcher",
            "pico_fast.setup_run",
            "pandas",  # pyarrow imports it when first asked for numbers
            "pytest",
        ]
    )


class RankFailedError(AssertionError):
    """A rank raised, died or was still running at the end of its time; the message has every traceback."""


def every_layout(world_size: int) -> list[Layout]:
    """All ways to arrange ``world_size`` processes."""
    sizes = itertools.product(range(1, world_size + 1), repeat=3)
    return [Layout(*layout) for layout in sizes if math.prod(layout) == world_size]


def environments(world_size: int) -> list[dict[str, str]]:
    """What torchrun would set for each rank of one node, which meet on a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(world_size)
    ]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` new processes; returns what each rank returned (it must pickle).

    ``function`` is at module level. The environment is torchrun's for one node, torch has one thread, and the process
    group, which ``start_parallel`` makes, is left at the end. Raises RankFailedError with the traceback of every
    rank that failed; the others are killed a moment later, all of them after ``timeout`` seconds.
    """
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank_main, args=(function, environment, args, results))
        for environment in environments(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank_main(function: Callable[..., Any], environment: dict[str, str], args: tuple[Any, ...], results: Any) -> None:
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = int(environment["RANK"])
    try:
        returned = function(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    else:
        results.put((rank, True, returned))


def _collect(processes: list[Any], results: Any, timeout: float) -> list[Any]:
    """Every rank's result in order, or RankFailedError."""
    deadline = time.monotonic() + timeout
    returned: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(returned) + len(failures) < len(processes):
        try:
            rank, good, value = results.get(timeout=0.2)
            (returned if good else failures)[rank] = value
            if not good:  # the others may follow with errors of their own, or wait for this one for ever
                deadline = min(deadline, time.monotonic() + 5)
            continue
        except queue.Empty:
            pass
        for rank, process in enumerate(processes):
            if process.exitcode not in (None, 0) and rank not in {*returned, *failures}:
                failures[rank] = f"died with exit code {process.exitcode} (negative: the signal that killed it)"
                deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            break
    if failures or len(returned) < len(processes):
        running = [rank for rank in range(len(processes)) if rank not in returned and rank not in failures]
        report = [f"rank {rank}:\n{text}" for rank, text in failures.items()]
        if running:
            report.append(f"rank(s) {', '.join(map(str, running))}: no result within {timeout:g} s")
        raise RankFailedError("\n".join(report))
    return [returned[rank] for rank in range(len(processes))]
