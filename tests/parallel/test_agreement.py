"""What the ranks tell each other: all take the same branch, and an error of one is the error of all."""

import pickle
import threading

import pytest
import torch
import torch.distributed as dist

from pico_fast.checkpoint.lock import RunLockedError
from pico_fast.config import Config
from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.parallel.agreement import (
    PeerLostError,
    Poll,
    from_main,
    highest,
    naming_lost_peers,
    origin,
    raise_first,
    ranks_that_differ,
    sum_over_ranks,
    together,
)
from pico_fast.parallel.mesh import SINGLE, Parallel, start_parallel
from tests.ranks import run_ranks


def errors() -> list[Exception]:
    """With one argument, with two and a text made of them, with arguments that are keywords, of the system."""
    locked = RunLockedError("runs/a: in use", pid=3, host="here", since=None)
    return [DataError("file: row 3"), TokenizerError("no tokenizer", "give one"), locked, FileNotFoundError(2, "gone")]


def numbers(parallel: Parallel) -> None:
    assert highest(parallel, parallel.rank, 5 - parallel.rank) == (2, 5)
    summed = sum_over_ranks(parallel, torch.tensor([1.0, parallel.rank], dtype=torch.float64))
    assert summed.tolist() == [3.0, 3.0]
    assert ranks_that_differ(parallel, {"same": 1}) == []
    assert ranks_that_differ(parallel, parallel.rank // 2) == [2]


def a_poll_answers_one_question_late(parallel: Parallel) -> None:
    poll = Poll(parallel)
    given = [False, True, False, False, True]
    answers = [poll.ask(mine and parallel.rank == 1) for mine in given]
    assert answers == [False, *given[:-1]]


def do_together(parallel: Parallel, error: Exception | None) -> None:
    with together(parallel):
        if error is not None:
            raise error


def an_error_of_one_is_raised_by_all(parallel: Parallel) -> None:
    for failing in ([1], [2], [1, 2], [0, 2]):
        for error in errors():
            with pytest.raises(type(error)) as caught:
                do_together(parallel, error if parallel.rank in failing else None)
            assert str(caught.value) == str(error)
            assert origin(caught.value) == (
                f"rank {failing[0]}: " if failing[0] and parallel.rank != failing[0] else ""
            )
            if isinstance(error, RunLockedError):
                assert (caught.value.pid, caught.value.host) == (3, "here")
    with together(parallel):
        pass


def an_error_that_cannot_travel_sends_its_message(parallel: Parallel) -> None:
    error = DataError("broken")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        pickle.dumps(error.__dict__)
    expected = DataError if parallel.rank == 1 else RuntimeError
    with pytest.raises(expected, match="broken"):
        raise_first(parallel, error if parallel.rank == 1 else None)


def rank_0_decides(parallel: Parallel) -> None:
    assert from_main(parallel, lambda: f"of {parallel.rank}") == "of 0"

    def fail() -> None:
        raise DataError(f"of {parallel.rank}")

    with pytest.raises(DataError, match=r"^of 0$"):
        from_main(parallel, fail)


def every_agreement() -> None:
    config = Config()
    config.parallel.timeout_s = 60
    parallel = start_parallel(config, torch.device("cpu"))
    for check in (
        numbers,
        a_poll_answers_one_question_late,
        an_error_of_one_is_raised_by_all,
        an_error_that_cannot_travel_sends_its_message,
        rank_0_decides,
    ):
        check(parallel)


@pytest.mark.distributed
def test_three_ranks_agree():
    run_ranks(every_agreement, 3)


def test_one_process_agrees_with_itself():
    assert highest(SINGLE, 3, 4) == (3, 4)
    assert sum_over_ranks(SINGLE, torch.ones(1)).tolist() == [1.0]
    assert ranks_that_differ(SINGLE, object()) == []
    assert [Poll(SINGLE).ask(mine) for mine in (True, False)] == [True, False]
    assert from_main(SINGLE, lambda: 7) == 7
    for error in errors():
        with pytest.raises(type(error)) as caught, together(SINGLE):
            raise error
        assert caught.value is error
        assert origin(error) == ""


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO + "pair.cc:547] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError(GLOO + "pair.cc:464] Read error [10.0.0.1]:1: Connection reset by peer"),
        RuntimeError(GLOO + "pair.cc:364] writev [10.0.0.1]:1: Broken pipe"),
        RuntimeError(GLOO + "unbound_buffer.cc:133] Timed out waiting 60000ms for recv operation to complete"),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistBackendError(NCCL + "remote process exited or there was a network error, NCCL version 2.27.3"),
        dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"),
        dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0"),
    ],
    ids=lambda error: str(error)[-40:],
)
def test_a_closed_connection_or_silence_means_a_lost_peer(error):
    with pytest.raises(PeerLostError) as caught, naming_lost_peers(Parallel(rank=1, world_size=2)):
        raise error
    assert str(error) in str(caught.value)
    assert caught.value.__cause__ is error
    with pytest.raises(type(error)) as passed, naming_lost_peers(SINGLE):
        raise error
    assert passed.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"[enforce fail at {GLOO[1:]}pair.cc:478] op.preamble.length <= op.nbytes. 192 vs 96"),
        dist.DistBackendError(NCCL + "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.3"),
        dist.DistBackendError(NCCL + "unhandled cuda error, NCCL version 2.27.3"),
        RuntimeError("ProcessGroupGloo::allreduce: invalid tensor type"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=lambda error: str(error)[-40:],
)
def test_mistakes_in_a_collective_pass_as_they_are(error):
    with pytest.raises(RuntimeError) as caught, naming_lost_peers(Parallel(rank=1, world_size=2)):
        raise error
    assert caught.value is error
