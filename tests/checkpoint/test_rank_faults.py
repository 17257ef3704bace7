"""Two ranks save one checkpoint, one of them fails at any of its calls: the old checkpoints or the new, never other."""

import errno
import itertools
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from pico_fast.checkpoint.errors import CheckpointError, NoGoodCheckpointError, NoSpaceError
from pico_fast.checkpoint.filesystem import FileSystem
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout, rank_file
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.manifest import Manifest
from pico_fast.checkpoint.ranks import Ranks
from pico_fast.checkpoint.save import SPARE_BYTES, SaveReport, remove_leftovers, save_checkpoint
from pico_fast.parallel.slices import Slice
from tests.checkpoint.faulty_disk import Crash, Faulty, PowerCut, Quick, tensors_of
from tests.checkpoint.two_ranks import PeerDiedError, TwoRanks, save_as_two, together

SCENARIOS = [
    TwoRanks("the first step", {}, old=None, new=(0, 1)),
    TwoRanks("a new step", {1: 1}, old=(1, 1), new=(2, 2)),
    TwoRanks("over debris", {1: 1}, old=(1, 1), new=(2, 2), debris=True),
    TwoRanks("over a damaged step", {1: 1, 2: 2}, old=(1, 1), new=(2, 3), damaged=2),
]
by_name = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


def calls_of(scenario: TwoRanks, layout: RunLayout) -> list[tuple[int, int]]:
    """Every (rank, number of the call) of a save that succeeds."""
    disks = [Faulty(-1, "crash"), Faulty(-1, "crash")]
    reports = scenario.operate(layout, *disks)
    assert reports[0].bytes == reports[1].bytes > 0
    scenario.check(layout, done=True)
    assert (layout.state_dir(scenario.new[0]) / rank_file(1)).is_file()
    assert disks[1].calls[0] == "create"
    assert disks[1].calls[-2:] == ["fsync", "close"]
    return [(rank, number) for rank, disk in enumerate(disks) for number in range(len(disk.calls))]


def one_faulty(rank: int, disk: FileSystem) -> list[FileSystem]:
    return [disk if other == rank else Quick() for other in range(2)]


@by_name
def test_a_rank_dies_at_every_call(scenario, fresh):
    for rank, at in calls_of(scenario, fresh(scenario)):
        layout = fresh(scenario)
        results = scenario.operate(layout, *one_faulty(rank, Faulty(at, "crash", lasting=True)))
        assert isinstance(results[rank], Crash)
        assert isinstance(results[1 - rank], PeerDiedError)  # no CheckpointError, after which training would go on
        scenario.check(layout)
        remove_leftovers(layout, Quick())  # the next start
        scenario.check(layout)
        assert not [path for path in layout.checkpoints.rglob(".t*") if path != layout.next_latest]
        scenario.operate(layout)
        scenario.check(layout, done=True)


@by_name
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_an_error_on_one_rank_is_every_ranks_error(scenario, fresh, fault, lasting):
    failures = {0: 0, 1: 0}
    for rank, at in calls_of(scenario, fresh(scenario)):
        layout = fresh(scenario)
        disk = Faulty(at, fault, lasting)
        first, second = scenario.operate(layout, *one_faulty(rank, disk))
        assert type(first) is type(second)
        if isinstance(first, CheckpointError):
            failures[rank] += 1
            assert (str(first), first.path, first.errno) == (str(second), second.path, second.errno)
            assert first.errno == getattr(errno, fault)
            assert (f"rank {rank}: " in str(first)) == (first.path.name == rank_file(rank))
            assert rank == 0 or first.path.name == rank_file(1)
            latest = layout.latest_step()
            assert (
                f"step_{latest} is still the latest checkpoint" in str(first)
                or (latest is None and "there is no earlier checkpoint" in str(first))
                or (latest == scenario.new[0] and "is complete and the latest" in str(first))
            )
        scenario.check(layout)
        if rank == 1 or (not lasting and disk.calls[at] != "remove_tree"):  # the disk is not left full
            assert not list(layout.checkpoints.glob("*/.tmp-*"))
        scenario.operate(layout)
        scenario.check(layout, done=True)
    assert failures[0] > 10
    assert failures[1] >= (5 if fault == "EIO" else 4)  # create, writes, fsync, close; close cannot run out of space


@by_name
def test_short_writes_on_one_rank(scenario, fresh):
    for rank, at in calls_of(scenario, fresh(scenario)):
        layout = fresh(scenario)
        scenario.operate(layout, *one_faulty(rank, Faulty(at, "short")))
        scenario.check(layout, done=True)


@by_name
def test_a_power_cut_of_all_ranks_at_every_call(scenario, fresh, folder):
    layout = fresh(scenario)
    chance, cuts = random.Random(0), itertools.count()

    def cut(disk: PowerCut, done: bool = False) -> None:
        for draw in range(6):
            root = folder / f"cut{next(cuts)}"
            disk.after_the_cut(root, chance if draw else None)
            scenario.check(RunLayout(root), done=done)
            if not draw:
                remove_leftovers(RunLayout(root), Quick())
                scenario.check(RunLayout(root), done=done)
            shutil.rmtree(root)

    disk = PowerCut(layout.root, cut)
    if scenario.debris:
        del disk.root.names["checkpoints"].durable[f"step_{scenario.new[0]}"]
    scenario.operate(layout, disk, disk)
    cut(disk, done=True)
    assert next(cuts) > 100


def test_both_ranks_fail(tmp_path):
    layout = RunLayout(tmp_path)
    first, second = save_as_two(layout, 1, 1, [Faulty(8, "EIO", lasting=True), Faulty(0, "EIO")])
    assert str(first) == str(second)
    assert "rank 0 and 1 more: Input/output error (EIO)" in str(first)
    assert layout.steps() == []


def test_a_step_that_is_there_is_left_by_all(tmp_path):
    layout = RunLayout(tmp_path)
    save_as_two(layout, 1, 1, [Quick(), Quick()])
    before = {path: path.stat().st_mtime_ns for path in layout.step_dir(1).rglob("*")}
    reports = save_as_two(layout, 1, 2, [Quick(), Quick()])
    assert [report.bytes for report in reports] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in layout.step_dir(1).rglob("*")} == before


def test_the_manifest_lists_every_ranks_file(tmp_path):
    layout = RunLayout(tmp_path)
    save_as_two(layout, 1, 1, [Quick(), Quick()])
    manifest = Manifest.from_bytes(layout.manifest(1).read_bytes())
    assert manifest.world_size == 2
    assert manifest.meta == {"version": 1}
    assert [entry.path for entry in manifest.files[:2]] == [
        "state/rank_00000.safetensors",
        "state/rank_00001.safetensors",
    ]
    assert {
        (entry.name, entry.file, *entry.offset, *entry.shape, *entry.global_shape) for entry in manifest.tensors
    } == {
        (name, rank_file(rank), begin, length, 50)
        for name in tensors_of(1)
        for rank, begin, length in ((0, 0, 30), (1, 30, 20))
    }
    for rank in (0, 1):
        path = layout.state_dir(1) / rank_file(rank)
        path.rename(path.with_suffix(".away"))
        assert verify_step(layout, 1).state == [f"state/{rank_file(rank)} is missing"]
        path.with_suffix(".away").rename(path)


class Elsewhere(Quick):
    """The disk of a node that does not share the run directory, though it has a folder of that name."""

    def __init__(self, folder):
        self.folder = folder

    def create(self, path):
        return super().create(self.folder / path.name)


def test_a_file_that_rank_0_does_not_find_is_no_checkpoint(tmp_path):
    layout = RunLayout(tmp_path / "run")
    errors = save_as_two(layout, 1, 1, [Quick(), Elsewhere(tmp_path)])
    for error in errors:
        assert "rank_00001.safetensors: written by its rank, but rank 0 does not find its" in str(error)
        assert "on a file system that all ranks share" in str(error)
    assert layout.steps() == []


def test_a_folder_that_a_rank_does_not_see(tmp_path):
    class Vanishing(Quick):
        """Takes the folder of the ranks' files away when rank 0 has written its own."""

        def close(self, fd):
            super().close(fd)
            for state in tmp_path.rglob("state"):
                shutil.rmtree(state)

    errors = save_as_two(RunLayout(tmp_path), 1, 1, [Vanishing(), Quick()])
    for error in errors:
        assert "rank 1: rank 0 has made the folder, but it is not there: the run directory" in str(error)


@pytest.mark.parametrize(
    "slices",
    [
        [Slice((50,), (0,), (30,)), Slice((50,), (31,), (19,))],  # a gap
        [Slice((50,), (0,), (30,)), Slice((50,), (29,), (21,))],  # an overlap
        [Slice((50,), (0,), (50,)), Slice((50,), (0,), (50,))],  # twice
        [Slice((50,), (0,), (30,)), Slice((50,), (30,), (19,))],  # an end that nobody has
        [Slice((50,), (0,), (30,)), Slice((51,), (30,), (21,))],  # not of one tensor
        [Slice((9, 5), (0, 0), (9, 2)), Slice((9, 5), (2, 2), (7, 3))],  # a hole in a corner
    ],
)
def test_slices_that_do_not_make_a_tensor_are_refused(tmp_path, slices):
    def save(rank: int, ranks: Ranks) -> SaveReport:
        part = slices[rank]
        mine = {"model/w": torch.zeros(part.shape)}
        return save_checkpoint(
            RunLayout(tmp_path), 1, tensors=mine, slices={"model/w": part}, meta={}, fs=Quick(), ranks=ranks
        )

    for error in together(save):
        assert isinstance(error, CheckpointError)
        assert "tensor 'model/w': its" in str(error)
    assert RunLayout(tmp_path).steps() == []


def test_all_ranks_load_what_rank_0_chose(tmp_path):
    layout = RunLayout(tmp_path)
    assert together(lambda rank, ranks: latest_good(layout, ranks=ranks)) == [None, None]
    for step in (1, 2):
        save_as_two(layout, step, step, [Quick(), Quick()])
    path = layout.state_dir(2) / rank_file(1)
    path.write_bytes(path.read_bytes()[:-1])
    for step, state, rejected in together(lambda rank, ranks: latest_good(layout, ranks=ranks)):
        assert (step, state.meta) == (1, {"version": 1})
        assert [number for number, _ in rejected] == [2]
        assert rank_file(1) in rejected[0][1]
        for name, tensor in tensors_of(1).items():
            part = Slice((50,), (25,), (10,))  # across both files
            assert torch.equal(state.tensors.read(name, part), tensor[25:35])
            assert torch.equal(state.tensors[name], tensor)


def test_all_ranks_hear_that_nothing_is_good(tmp_path):
    layout = RunLayout(tmp_path)
    save_as_two(layout, 1, 1, [Quick(), Quick()])
    layout.manifest(1).unlink()
    first, second = together(lambda rank, ranks: latest_good(layout, ranks=ranks))
    assert type(first) is type(second)
    assert str(first) == str(second)
    assert first.rejected == second.rejected == [(1, "state/manifest.json is missing")]


def test_a_rank_that_cannot_read_stops_all(tmp_path):
    layout = RunLayout(tmp_path / "run")
    save_as_two(layout, 1, 1, [Quick(), Quick()])
    elsewhere = RunLayout(tmp_path / "elsewhere")
    errors = together(lambda rank, ranks: latest_good((layout, elsewhere)[rank], ranks=ranks))
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith("rank 1: step_1, which rank 0 verified, cannot be read: rank_00000.safetensors")
    assert errors[0].errno == errno.ENOENT


def test_the_space_for_all_ranks_is_checked_before_any_writes(tmp_path):
    class Full(Quick):
        def __init__(self, free: int):
            self.free, self.written = free, 0

        def free_bytes(self, path):
            return self.free

        def create(self, path):
            self.written += 1
            return super().create(path)

    layout = RunLayout(tmp_path)
    disks = [Full(1000), Full(1 << 40)]  # rank 0 asks
    first, second = save_as_two(layout, 1, 1, disks)
    assert isinstance(first, NoSpaceError)
    assert isinstance(second, NoSpaceError)
    assert (str(first), first.needed, first.free) == (str(second), second.needed, 1000)
    assert [disk.written for disk in disks] == [0, 0]
    reports = save_as_two(layout, 1, 1, [Full(first.needed), Full(0)])
    state = sum(path.stat().st_size for path in layout.state_dir(1).glob("*.safetensors"))
    parameters = tensors_of(1)["model/w"].nbytes
    assert first.needed == state + parameters + SPARE_BYTES
    assert [report.bytes > state for report in reports] == [True, True]


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("a message", path=Path("a/file"), errno=5),
        NoSpaceError("full", path=Path("a"), needed=7, free=3),
        NoGoodCheckpointError("none", rejected=[(3, "damaged")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error):
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert (str(other), vars(other)) == (str(error), vars(error))
