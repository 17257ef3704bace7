"""A pool of worker processes for ``prepare``: started fresh, quiet on Ctrl-C, and never outliving their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from typing import TypeVar

from pico_fast.cores import usable_cores
from pico_fast.data.errors import DataError

Result = TypeVar("Result")


def worker_count(asked: int | None) -> int:
    """How many workers to start: ``asked``, or one per usable core for None. Raises DataError for less than 1."""
    if asked is not None and asked < 1:
        raise DataError(f"workers {asked} must be at least 1")
    return usable_cores() if asked is None else asked


def run_tasks(function: Callable[..., Result], tasks: Sequence[tuple], workers: int) -> Iterator[Result]:
    """Results of ``function(*task)`` as they are ready, in no order.

    One worker, or one task, runs in this process. ``function`` and tasks must be picklable. The first exception ends
    everything and is raised here.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield function(*task)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads (tokenizers, arrow) can hang it
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
