"""What the ranks tell each other while they save or load one checkpoint.

Every step of a save or load that may fail is an :class:`Outcome`. Rank 0 collects them, decides, and tells all, so that
all ranks return or all raise the same error. A rank that dies breaks the collective: the others then get torch's own
RuntimeError, which is no CheckpointError, since training cannot go on.

:mod:`pico_fast.parallel.agreement` lets any error of a rank be raised by all at once; here one rank hears of every
failure, removes what was written and only then tells. :class:`Ranks` is a class so that tests can let two ranks take
turns, call by call, in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from pico_fast.checkpoint.errors import CheckpointError, described, errno_of
from pico_fast.parallel.mesh import Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a step returned, or why it failed. It travels between ranks by pickle."""

    result: T | None = None
    error: CheckpointError | None = None

    def get(self) -> T:
        """The result; raises the error."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


def attempt(step: Callable[[], T]) -> Outcome[T]:
    """The outcome of ``step()``; any Exception as a CheckpointError (with path and errno where they are known)."""
    try:
        return Outcome(step())
    except CheckpointError as error:
        return Outcome(error=error)
    except Exception as error:
        path = Path(error.filename) if isinstance(error, OSError) and error.filename else None
        found = CheckpointError(described(error), path=path, errno=errno_of(error))
        found.__cause__ = error
        return Outcome(error=found)


class Ranks:
    """This rank among those of ``parallel``; alone, every method returns what it is given."""

    def __init__(self, parallel: Parallel):
        self.rank, self.size = parallel.rank, parallel.world_size
        self._group = parallel.hosts

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in their order, on rank 0; elsewhere an empty list."""
        if self.size == 1:
            return [value]
        collected: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, collected, dst=0, group=self._group)
        return collected or []

    def broadcast(self, value: T | None) -> T:
        """Rank 0's ``value``, on all; what the others give does not count."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]  # type: ignore[return-value]


def first_failure(outcomes: Sequence[Outcome[Any]]) -> tuple[str, CheckpointError] | None:
    """Who failed (``rank 1: ``, nothing where there is but one rank) and the error; None if nobody did.

    Of several failures that of the lowest rank, with the number of the others.
    """
    failed = [(rank, outcome.error) for rank, outcome in enumerate(outcomes) if outcome.error is not None]
    if not failed:
        return None
    rank, error = failed[0]
    others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return (f"rank {rank}{others}: " if len(outcomes) > 1 else ""), error
