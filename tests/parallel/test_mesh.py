"""The mesh: every rank's place, its groups, and what happens when ranks fail."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pico_fast.config import Config
from pico_fast.parallel.mesh import DIMENSIONS, SINGLE, Parallel, start_parallel
from pico_fast.runtime import UsageError
from tests.ranks import RankFailedError, run_ranks

pytestmark = pytest.mark.distributed


def join(**sizes: int) -> Parallel:
    config = Config()
    config.parallel.timeout_s = 60
    for name, size in sizes.items():
        setattr(config.parallel, name, size)
    return start_parallel(config, torch.device("cpu"))


def every_layout_of_four() -> None:
    made, new_group = [], dist.new_group
    dist.new_group = lambda *args, **settings: made.append(args) or new_group(*args, **settings)
    for replicate, shard in itertools.product((1, 2, 4), repeat=2):
        if replicate * shard > 4 or 4 % (replicate * shard):
            continue
        tp = 4 // (replicate * shard)
        before = len(made)
        parallel = join(dp_replicate=replicate, dp_shard=shard, tp=tp)
        several = sum(size > 1 for size in (replicate, shard, tp))
        assert len(made) - before == several + 1, "of each dimension its own group, and the hosts'"
        rank = dist.get_rank()
        assert (parallel.rank, parallel.world_size, parallel.active) == (rank, 4, True)
        assert parallel.is_main == (rank == 0)
        assert parallel.tp.rank == rank % tp
        assert parallel.dp_rank == rank // tp == parallel.dp_replicate.rank * shard + parallel.dp_shard.rank
        assert parallel.dp_size == replicate * shard
        for name in DIMENSIONS:
            axis = getattr(parallel, name)
            assert (axis.group is None) == (axis.size == 1) == (name not in parallel.mesh.mesh_dim_names)
            if axis.group is not None:
                assert axis.size == parallel.mesh[name].size()
                members = [None] * axis.size
                dist.all_gather_object(members, rank, group=axis.group)
                assert members[axis.rank] == rank
                stride = {"tp": 1, "dp_shard": tp, "dp_replicate": tp * shard}[name]
                assert members == [rank + (other - axis.rank) * stride for other in range(axis.size)]
                assert parallel.mesh.get_group(name) is axis.group
    automatic = join(tp=2)
    assert (automatic.dp_replicate.size, automatic.tp.size) == (2, 2)
    together = torch.ones(1)
    dist.all_reduce(together, group=automatic.hosts)
    assert together == 4


def test_every_rank_knows_its_place_in_every_layout():
    run_ranks(every_layout_of_four, 4)


def only_rank_1_is_told(key: str, value: object) -> tuple[str, float]:
    config = Config()
    config.parallel.timeout_s = 30
    section, name = key.split(".")
    if os.environ["RANK"] == "1":
        setattr(getattr(config, section), name, value)
    dist.init_process_group("gloo")
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        start_parallel(config, torch.device("cpu"))
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("parallel.tp", 2, "on rank 1: parallel.tp is 2 (on rank 0 1);"),
        ("runtime.seed", 7, "on rank 1: runtime.seed is 7 (on rank 0 42);"),
    ],
)
def test_another_configuration_on_one_rank_is_said_by_all_before_they_wait(key, value, shown):
    for message, seconds in run_ranks(only_rank_1_is_told, 2, key, value):
        assert message.startswith("rank(s) 1 have another configuration than rank 0; ")
        assert shown in message
        assert seconds < 15  # not parallel.timeout_s


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_parallel(Config(), torch.device("cpu")) is SINGLE
    assert not dist.is_initialized()
    assert SINGLE.is_main
    assert not SINGLE.active
    assert (SINGLE.dp_rank, SINGLE.dp_size) == (0, 1)


def fail_on_rank_1(how: str) -> str:
    rank = int(os.environ["RANK"])
    if rank == 1 and how == "raise":
        raise KeyError("a mistake of rank one")
    if rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "hang":
        time.sleep(60)
    return f"result of {rank}"


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("raise", r"(?s)rank 1:\nTraceback.*fail_on_rank_1.*KeyError: 'a mistake of rank one'"),
        ("die", r"rank 1:\ndied with exit code -9"),
        ("hang", r"rank\(s\) (0, )?1: no result within 8 s"),  # 0 too, where importing torch takes that long
    ],
)
def test_the_helper_shows_the_rank_that_fails(how, shown):
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=shown):
        run_ranks(fail_on_rank_1, 2, how, timeout=8 if how == "hang" else 60)
    assert time.monotonic() - start < 40


def test_the_helper_returns_every_ranks_result():
    assert run_ranks(fail_on_rank_1, 2, "not") == ["result of 0", "result of 1"]


def a_peer_that_does_not_come(done: Path) -> float:
    dist.init_process_group("gloo")  # for meeting, which takes its time on a busy machine, not within timeout_s
    config = Config()
    config.parallel.timeout_s, config.parallel.tp = 4, 2
    parallel = start_parallel(config, torch.device("cpu"))
    start = time.monotonic()
    if parallel.rank == 1:
        while not done.exists() and time.monotonic() - start < 60:
            time.sleep(0.05)
        return 0.0
    for group in (parallel.tp.group, parallel.hosts):
        with pytest.raises(RuntimeError, match=r"(?i)timed out"):
            dist.all_reduce(torch.ones(1), group=group)
    done.touch()
    return time.monotonic() - start


def test_a_collective_gives_up_after_timeout_s(tmp_path):
    seconds, _ = run_ranks(a_peer_that_does_not_come, 2, tmp_path / "done")
    assert 8 <= seconds < 40
