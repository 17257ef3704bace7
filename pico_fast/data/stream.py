"""Batches in the global order, read in the background.

Step ``t`` trains on rows ``[t*B, (t+1)*B)`` of the global order, row numbers taken modulo the number of rows: the
dataset repeats in the same order. Micro-batch ``m`` of ``M`` is rows ``t*B + m*B/M + [0, B/M)``, of which rank ``r``
of ``W`` takes the ``r``-th slice of ``B/(M*W)``. So the rows of a step depend on ``t`` and ``B`` alone, and resuming
is ``start_step=t``.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from pico_fast.data.source import TokenRows

_POLL_S = 0.2  # how often a waiting consumer looks whether it should stop


def row_starts(step: int, *, batch_size: int, micro_batches: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """First row of each micro-batch of ``step`` on ``rank``, before the modulo; ``B/(M*W)`` rows follow from there."""
    per_micro_batch = batch_size // micro_batches
    per_rank = per_micro_batch // world_size
    return [step * batch_size + m * per_micro_batch + rank * per_rank for m in range(micro_batches)]


def row_indices(
    step: int, n_rows: int, *, batch_size: int, micro_batches: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Global row numbers of ``step`` on ``rank``: int64 (micro_batches, B/(M*W)), of a dataset of ``n_rows``."""
    starts = row_starts(step, batch_size=batch_size, micro_batches=micro_batches, rank=rank, world_size=world_size)
    per_rank = batch_size // (micro_batches * world_size)
    return (np.array(starts, np.int64)[:, None] + np.arange(per_rank, dtype=np.int64)) % n_rows


def _fill(rows: TokenRows, out: np.ndarray, start: int) -> None:
    """Rows from ``start`` on, modulo the number of rows, into ``out``; asks for that number only at the end."""
    filled = 0
    while filled < len(out):
        first, stop = start + filled, start + len(out)
        if not rows.has(stop - 1):
            first %= rows.n_rows
            stop = min(rows.n_rows, first + len(out) - filled)
        rows.read(first, stop, out[filled : filled + stop - first])
        filled += stop - first


class _Prefetch:
    """What the reading thread and the consumer share: finished batches, an error, and whether to stop."""

    def __init__(self, capacity: int):
        self._changed = threading.Condition()  # re-entrant
        self._batches: deque[torch.Tensor] = deque()
        self._capacity = capacity
        self._error: BaseException | None = None
        self._stopped = False

    def wait_for_room(self) -> bool:
        """Block until a batch is wanted; False: stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._batches) < self._capacity)
            return not self._stopped

    def put(self, batch: torch.Tensor) -> None:
        with self._changed:
            if not self._stopped:
                self._batches.append(batch)
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._batches.clear()
            self._changed.notify_all()

    def get(self, should_stop: Callable[[], bool] | None) -> torch.Tensor:
        """The next batch when it is there; StopIteration after :meth:`stop`, or when ``should_stop`` says so."""
        with self._changed:
            while not self._changed.wait_for(
                lambda: self._stopped or bool(self._batches) or self._error is not None,
                timeout=None if should_stop is None else _POLL_S,
            ):
                if should_stop is not None and should_stop():
                    self.stop()
            if self._batches:
                batch = self._batches.popleft()
                self._changed.notify_all()
                return batch
            if self._stopped:
                raise StopIteration
            assert self._error is not None
            raise self._error


class BatchStream:
    """Iterator over the batches of one rank, without end: int32 (micro_batches, rows per micro-batch and rank,
    row_len).

    A thread reads up to ``prefetch`` batches ahead; what goes wrong there is raised by ``next`` where the batch is
    missing. The thread ends with :meth:`close`, with the ``with`` block, or when the stream is no longer referenced.

    Args:
        rows: read by the thread alone from here on.
        batch_size: global number of rows per step.
        micro_batches: pieces in which a step is computed.
        rank, world_size: which slice of every micro-batch this process takes.
        start_step: the first step to give.
        prefetch: batches ready at most, besides the one in use.
        pin_memory: page-locked memory, for asynchronous copies to a GPU.
        should_stop: asked while ``next`` waits; once it is true the iteration ends, without the batch that is late, so
            that a read that hangs holds up nobody. A batch that is ready is given nevertheless.

    Raises ValueError if ``batch_size`` does not divide.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        batch_size: int,
        micro_batches: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
        should_stop: Callable[[], bool] | None = None,
    ):
        if min(batch_size, micro_batches, world_size, prefetch) < 1 or start_step < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, micro_batches {micro_batches}, world_size {world_size} and prefetch "
                f"{prefetch} must be at least 1, start_step {start_step} at least 0, rank {rank} less than world_size"
            )
        if batch_size % (micro_batches * world_size):
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of micro_batches * world_size = "
                f"{micro_batches * world_size}"
            )
        self._prefetch, self._should_stop = _Prefetch(prefetch), should_stop
        self._thread = threading.Thread(
            target=_read_batches,
            args=(self._prefetch, rows, batch_size, micro_batches, rank, world_size, start_step, pin_memory),
            name="pico-fast-data",
            daemon=True,
        )
        # the thread refers to the shared state only, never to the stream: dropping the stream ends it
        self._finalizer = weakref.finalize(self, self._prefetch.stop)
        self._thread.start()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> torch.Tensor:
        return self._prefetch.get(self._should_stop)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; batches read ahead are dropped. A read that hangs on the network is not waited for."""
        self._finalizer()
        self._thread.join(timeout=5)


def _read_batches(
    prefetch: _Prefetch,
    rows: TokenRows,
    batch_size: int,
    micro_batches: int,
    rank: int,
    world_size: int,
    step: int,
    pin_memory: bool,
) -> None:
    shape = (micro_batches, batch_size // (micro_batches * world_size), rows.row_len)
    try:
        while prefetch.wait_for_room():
            batch = torch.empty(shape, dtype=torch.int32, pin_memory=pin_memory)
            array = batch.numpy()
            starts = row_starts(
                step, batch_size=batch_size, micro_batches=micro_batches, rank=rank, world_size=world_size
            )
            for m, start in enumerate(starts):
                _fill(rows, array[m], start)
            prefetch.put(batch)
            step += 1
    except BaseException as error:  # also MemoryError and the like: the consumer must not wait for ever
        prefetch.fail(error)
    finally:
        rows.close()
