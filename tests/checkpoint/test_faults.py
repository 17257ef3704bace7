"""At every system call a crash, an error, a short write, a power cut: the disk holds the old checkpoints or the new."""

import errno
import itertools
import random
import shutil

import pytest

from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.filesystem import FileSystem
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.save import remove_leftovers
from tests.checkpoint.faulty_disk import Crash, Faulty, PowerCut, Quick, Scenario, save

SCENARIOS = [
    Scenario("the first step", {}, old=None, new=(0, 1)),
    Scenario("a new step", {1: 1}, old=(1, 1), new=(2, 2)),
    Scenario("over debris", {1: 1}, old=(1, 1), new=(2, 2), debris=True),
    Scenario("over a damaged step", {1: 1, 2: 2}, old=(1, 1), new=(2, 3), damaged=2),
    Scenario("prune", {1: 1, 2: 2, 3: 3}, old=(3, 3), new=(3, 3)),
]
by_name = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


def calls_of(scenario: Scenario, layout: RunLayout) -> list[str]:
    fs = Faulty(-1, "crash")
    scenario.operate(layout, fs)
    scenario.check(layout, done=True)
    return fs.calls


@by_name
def test_a_crash_at_every_call(scenario, fresh):
    calls = calls_of(scenario, fresh(scenario))
    assert len(calls) > 10
    for at in range(len(calls)):
        layout = fresh(scenario)
        with pytest.raises(Crash):
            scenario.operate(layout, Faulty(at, "crash", lasting=True))
        scenario.check(layout)
        remove_leftovers(layout, Quick())  # the next start
        scenario.check(layout)
        assert not [path for path in layout.checkpoints.rglob(".t*") if path != layout.next_latest]
        scenario.operate(layout, Quick())
        scenario.check(layout, done=True)


def failure(scenario: Scenario, layout: RunLayout, fs: FileSystem) -> Exception | None:
    try:
        scenario.operate(layout, fs)
    except (CheckpointError, OSError) as error:
        return error
    return None


@by_name
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_an_error_at_every_call(scenario, fresh, fault, lasting):
    calls = calls_of(scenario, fresh(scenario))
    for at in range(len(calls)):
        layout = fresh(scenario)
        error = failure(scenario, layout, Faulty(at, fault, lasting))
        if isinstance(error, CheckpointError):
            assert error.errno == getattr(errno, fault)
            assert str(layout.root) in str(error.path)
            assert f"({fault})" in str(error)
            latest = layout.latest_step()
            assert (
                f"step_{latest} is still the latest checkpoint" in str(error)
                or (latest is None and "there is no earlier checkpoint" in str(error))
                or (latest == scenario.new[0] and "is complete and the latest" in str(error))
            )
        scenario.check(layout)
        if not lasting and scenario.name != "prune" and calls[at] != "remove_tree":  # the disk is not left full
            assert not list(layout.checkpoints.glob("*/.tmp-*"))
        scenario.operate(layout, Quick())
        scenario.check(layout, done=True)
        assert not list(layout.checkpoints.rglob(".tmp-*"))


@by_name
def test_a_short_write_at_every_call(scenario, fresh):
    for at in range(len(calls_of(scenario, fresh(scenario)))):
        layout = fresh(scenario)
        scenario.operate(layout, Faulty(at, "short"))
        scenario.check(layout, done=True)
    layout = fresh(scenario)
    scenario.operate(layout, Faulty(0, "short", lasting=True))
    scenario.check(layout, done=True)


def test_a_write_that_takes_nothing_is_an_error(tmp_path):
    class Stuck(Quick):
        def write(self, fd, data):
            return 0

    with pytest.raises(CheckpointError, match="EIO"):
        save(RunLayout(tmp_path), 1, 1, Stuck())


@by_name
def test_a_power_cut_at_every_call(scenario, fresh, folder):
    layout = fresh(scenario)
    chance = random.Random(0)
    cuts = itertools.count()

    def cut(fs: PowerCut, done: bool = False) -> None:
        for draw in range(10):
            root = folder / f"cut{next(cuts)}"
            fs.after_the_cut(root, chance if draw else None)
            after = RunLayout(root)
            scenario.check(after, done=done)
            if not draw:
                remove_leftovers(after, Quick())
                scenario.check(after, done=done)
                assert scenario.name != "prune" or after.step_dirs() == after.steps()  # no half checkpoint is left
            shutil.rmtree(root)

    fs = PowerCut(layout.root, cut)
    if scenario.debris:
        del fs.root.names["checkpoints"].durable[f"step_{scenario.new[0]}"]
    scenario.operate(layout, fs)
    cut(fs, done=True)
    assert next(cuts) > 100
