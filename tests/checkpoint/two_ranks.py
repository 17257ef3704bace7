"""Two ranks that save one checkpoint as threads that take turns: each runs until it has to wait for the other, so that
every run is the same."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.filesystem import FileSystem
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.ranks import Ranks
from pico_fast.checkpoint.save import SaveReport, save_checkpoint
from pico_fast.parallel.mesh import Parallel
from pico_fast.parallel.slices import Slice
from tests.checkpoint.faulty_disk import Crash, Quick, Scenario, export_of, tensors_of


class PeerDiedError(RuntimeError):
    """What gloo raises when the other end of a connection is gone."""


class Turns:
    """Lets one of ``size`` threads run at a time, and keeps what each gave to each collective."""

    def __init__(self, size: int):
        self.size = size
        self.given: dict[tuple[int, int], object] = {}  # (number of the collective, rank)
        self.ended: set[int] = set()
        self._turn = 0
        self._changed = threading.Condition()

    def wait(self, rank: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn == rank, timeout=30), "the ranks wait for each other"

    def pass_on(self, rank: int) -> None:
        with self._changed:
            others = [other % self.size for other in range(rank + 1, rank + 1 + self.size)]
            self._turn = next((other for other in others if other not in self.ended), -1)
            self._changed.notify_all()

    def end(self, rank: int) -> None:
        self.ended.add(rank)
        self.pass_on(rank)


class TurnTakingRanks(Ranks):
    """A rank among threads, in place of one among processes."""

    def __init__(self, rank: int, turns: Turns):
        super().__init__(Parallel(rank, turns.size))
        self.turns, self.number = turns, 0

    def _give(self, value, needed: Sequence[int]) -> list:
        number, self.number = self.number, self.number + 1
        self.turns.given[number, self.rank] = value
        self.turns.pass_on(self.rank)
        self.turns.wait(self.rank)
        if any((number, rank) not in self.turns.given for rank in needed):
            raise PeerDiedError("Connection closed by peer")
        return [self.turns.given[number, rank] for rank in needed]

    def gather(self, value):
        return self._give(value, range(self.size) if self.is_main else [])

    def broadcast(self, value):
        return self._give(value, [0])[0]


def together(function: Callable[[int, Ranks], object], size: int = 2) -> list:
    """What ``function(rank, ranks)`` returned or raised on each rank."""
    turns, results = Turns(size), [None] * size

    def main(rank: int) -> None:
        try:
            turns.wait(rank)
            results[rank] = function(rank, TurnTakingRanks(rank, turns))
        except BaseException as error:
            results[rank] = error
        finally:
            turns.end(rank)

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in results:
        if isinstance(error, BaseException) and not isinstance(error, (CheckpointError, Crash, PeerDiedError)):
            raise error
    return results


def save_as_two(layout: RunLayout, step: int, version: int, disks: Sequence[FileSystem]) -> list:
    """Rank 0 has the first 30 numbers of each tensor, rank 1 the last 20."""

    def save(rank: int, ranks: Ranks) -> SaveReport:
        begin, end = ((0, 30), (30, 50))[rank]
        mine = {name: tensor[begin:end] for name, tensor in tensors_of(version).items()}
        return save_checkpoint(
            layout,
            step,
            tensors=mine,
            slices={name: Slice((50,), (begin,), (end - begin,)) for name in mine},
            meta={"version": version if rank == 0 else "of another rank"},
            write_extra=export_of(version),
            fs=disks[rank],
            ranks=ranks,
        )

    return together(save)


@dataclass(frozen=True)
class TwoRanks(Scenario):
    """A save by two ranks, each with its disk."""

    def operate(self, layout: RunLayout, *disks: FileSystem) -> list:
        return save_as_two(layout, *self.new, disks or (Quick(), Quick()))
