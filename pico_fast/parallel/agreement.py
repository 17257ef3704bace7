"""What the ranks must agree on, so that all of them take the same branch: stop, fail, go on.

Every function here is a collective over :attr:`Parallel.hosts`, on the CPU: it costs one round trip between the hosts
and never waits for a device. On one process each is what it says, without communication.

Errors of any class travel here, packed by this module and raised as they are. A save or load is another matter, though
it too sends outcomes by pickle (:mod:`pico_fast.checkpoint.ranks`): there rank 0 judges every rank's outcome and cleans
up before anyone raises, and each failure is a CheckpointError, which pickles by itself.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pico_fast.parallel.mesh import Parallel

T = TypeVar("T")


class PeerLostError(Exception):
    """Another rank has ended or does not answer; the message says how that showed. No rank can go on."""


def highest(parallel: Parallel, *numbers: int) -> tuple[int, ...]:
    """The maximum of each of ``numbers`` over all ranks, which must give the same count of them."""
    if parallel.hosts is None:
        return numbers
    votes = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=parallel.hosts)
    return tuple(votes.tolist())


def sum_over_ranks(parallel: Parallel, numbers: torch.Tensor) -> torch.Tensor:
    """``numbers``, a tensor on the CPU, added up over all ranks, in place."""
    if parallel.hosts is not None:
        dist.all_reduce(numbers, group=parallel.hosts)
    return numbers


def ranks_that_differ(parallel: Parallel, value: object) -> list[int]:
    """The ranks whose ``value`` differs from rank 0's; it must pickle."""
    if parallel.hosts is None:
        return []
    values: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(values, value, group=parallel.hosts)
    return [rank for rank, other in enumerate(values) if other != values[0]]


class Poll:
    """A question asked again and again whose answer may come one question late, so that asking costs no waiting.

    The ranks must call :meth:`ask` equally often.
    """

    def __init__(self, parallel: Parallel):
        self._group = parallel.hosts
        self._asked: tuple[torch.Tensor, Any] | None = None

    def ask(self, mine: bool) -> bool:
        """Whether any rank said True the time before (on one process: whether this one does so now)."""
        if self._group is None:
            return mine
        answer = self._answer()
        vote = torch.tensor(int(mine), dtype=torch.int64)
        self._asked = vote, dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        vote, work = self._asked
        work.wait()
        return bool(vote.item())


@contextlib.contextmanager
def together(parallel: Parallel) -> Iterator[None]:
    """Do the body on every rank; if it fails on any, all leave it with the error of the lowest rank that failed.

    The body must not contain a collective that a failing rank would not reach.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_first(parallel, error)


def raise_first(parallel: Parallel, error: Exception | None) -> None:
    """Raise the error of the lowest rank that has one, on every rank: there itself, elsewhere one of the same class and
    with the same message, marked with the rank it comes from (see :func:`origin`)."""
    if parallel.hosts is not None and highest(parallel, int(error is not None)) != (0,):
        found: list[Any] = [None] * parallel.world_size
        dist.all_gather_object(found, None if error is None else _packed(error), group=parallel.hosts)
        first = next(rank for rank, packed in enumerate(found) if packed is not None)
        if first != parallel.rank:
            error = _unpacked(found[first], first)
    if error is not None:
        raise error


def from_main(parallel: Parallel, make: Callable[[], T]) -> T:
    """``make()`` of rank 0, on every rank; it must pickle. An error of it is raised on every rank."""
    if parallel.hosts is None:
        return make()
    made: list[Any] = [None, None]
    failure: Exception | None = None
    if parallel.is_main:
        try:
            made[0] = make()
        except Exception as raised:
            failure = raised
            made[1] = _packed(raised)
    dist.broadcast_object_list(made, src=0, group=parallel.hosts)
    if made[1] is not None:
        raise failure if failure is not None else _unpacked(made[1], 0)
    return made[0]


def origin(error: BaseException) -> str:
    """``rank 3: `` before the message of an error that rank 3 sent; empty for this rank's own and rank 0's."""
    rank = error.__dict__.get("rank", 0)
    return f"rank {rank}: " if rank else ""


def _packed(error: Exception) -> tuple[type[Exception], tuple[Any, ...], dict[str, Any]]:
    """Class, arguments and attributes; only the message where those do not pickle."""
    packed = type(error), error.args, dict(error.__dict__)
    try:
        pickle.dumps(packed)
    except Exception:
        return RuntimeError, (f"{type(error).__name__}: {error}",), {}
    return packed


def _unpacked(packed: tuple[type[Exception], tuple[Any, ...], dict[str, Any]], rank: int) -> Exception:
    kind, arguments, attributes = packed
    error = kind.__new__(kind, *arguments)  # not kind(...): its own arguments may be others
    error.__dict__.update(attributes, rank=rank)
    return error


@contextlib.contextmanager
def naming_lost_peers(parallel: Parallel) -> Iterator[None]:
    """Turn the error of a collective whose other side is gone into PeerLostError, caused by it.

    Other errors of a collective pass as they are: different shapes on two ranks (gloo's ``enforce fail``), a wrong call
    (NCCL's ``invalid usage``) and the like are mistakes, and the traceback shows where.
    """
    try:
        yield
    except RuntimeError as error:
        if not parallel.active or not _is_of_a_lost_peer(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise PeerLostError(f"another process of this run has ended or does not answer ({reason})") from error


# gloo raises plain RuntimeErrors, and NCCL's DistBackendErrors may be anything: only the words tell. In this order the
# words of gloo, of the system (gloo puts strerror into its messages) and of NCCL and its watchdog
_LOST = re.compile(
    "connection closed by peer|timed out (waiting|connecting)|(socket|connect|read|write|wait|application) timeout"
    "|connection (reset|refused|aborted|timed out)|broken pipe|network is unreachable|no route to host"
    "|remote process exited|ncclRemoteError|collective operation timeout|communicator was aborted",
    re.IGNORECASE,
)


def _is_of_a_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or _LOST.search(str(error)) is not None
