"""Several processes for one test: spawned, on a free port, ended after a while, with the failing rank's traceback."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


class RankFailedError(AssertionError):
    """A rank raised, died or was still running at the end of its time; the message has every traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` new processes; returns what each rank returned (it must pickle).

    ``function`` is at module level. The environment is torchrun's for one node, torch has one thread, and the process
    group, which ``start_parallel`` makes, is left at the end. Raises RankFailedError with the traceback of every
    rank that failed; the others are killed a moment later, all of them after ``timeout`` seconds.
    """
    context = multiprocessing.get_context("spawn")  # a forked child would share torch's threads and locks
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank_main, args=(function, rank, world_size, port, args, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], results: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
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
