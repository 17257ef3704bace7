"""When a step is saved and which checkpoints stay."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.retention import due, prune, superseded
from pico_fast.checkpoint.save import save_checkpoint
from pico_fast.config import CheckpointingConfig


def export(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "config.json").write_text("{}")


def filled(root: Path, steps: list[int]) -> RunLayout:
    layout = RunLayout(root)
    for step in steps:
        tensors = {"model/w": torch.full((10,), float(step))}
        save_checkpoint(layout, step, tensors=tensors, meta={}, write_extra=export)
    return layout


def test_due():
    config = CheckpointingConfig(save_every_n_steps=10)
    assert [step for step in range(31) if due(step, config)] == [0, 10, 20, 30]
    config.log_spaced = True
    assert [step for step in range(31) if due(step, config)] == [0, 1, 2, 4, 8, 10, 20, 30]


def test_pythias_154_checkpoints():
    config = CheckpointingConfig(save_every_n_steps=1000, log_spaced=True)
    steps = [step for step in range(143_001) if due(step, config)]
    assert steps[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert len(steps) == 154


@given(st.sets(st.integers(0, 60)).map(sorted), st.none() | st.integers(1, 10), st.none() | st.integers(1, 10))
def test_superseded(steps, keep_last, keep_every):
    config = CheckpointingConfig(keep_last=keep_last, keep_every=keep_every)
    given_up = set(superseded(steps, config))
    for position, step in enumerate(steps):
        kept = keep_last is None or position >= len(steps) - keep_last or bool(keep_every and step % keep_every == 0)
        assert (step not in given_up) == kept


def test_prune(tmp_path):
    layout = filled(tmp_path, [0, 1, 2, 4, 10, 20, 30, 40])
    assert prune(layout, CheckpointingConfig()) == []
    assert prune(layout, CheckpointingConfig(keep_last=2, keep_every=20)) == [1, 2, 4, 10]
    assert layout.step_dirs() == layout.steps() == [0, 20, 30, 40]
    assert {path.name for path in layout.checkpoints.iterdir()} == {"latest", "step_0", "step_20", "step_30", "step_40"}
    assert all(verify_step(layout, step).good for step in layout.steps())
    assert prune(layout, CheckpointingConfig(keep_last=2, keep_every=20)) == []
    assert prune(layout, CheckpointingConfig(keep_last=1)) == [0, 20, 30]
    assert latest_good(layout)[0] == 40


def test_what_we_did_not_write_stays(tmp_path):
    layout = filled(tmp_path, [1, 2, 3])
    layout.learning_dynamics(1).mkdir()
    (layout.learning_dynamics(1) / "train_weights.pt").write_text("data")
    (layout.step_dir(2) / "a" / "notes.txt").write_text("mine")
    layout.fabric_state(0).parent.mkdir(parents=True)
    layout.fabric_state(0).write_text("pico's")
    assert prune(layout, CheckpointingConfig(keep_last=1)) == [1, 2]
    left = {path.relative_to(layout.checkpoints).as_posix() for path in layout.checkpoints.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith(("step_3", "latest"))} == {
        "step_0/fabric_state/checkpoint.pt",
        "step_1/learning_dynamics/train_weights.pt",
        "step_2/a/notes.txt",
    }
    assert layout.steps() == [3]


def test_nothing_goes_while_the_newest_is_damaged(tmp_path):
    layout = filled(tmp_path, [1, 2, 3])
    (layout.step_dir(3) / "a" / "config.json").write_text("{ }")
    with pytest.raises(CheckpointError, match="no checkpoint was deleted: the newest, step_3, is damaged"):
        prune(layout, CheckpointingConfig(keep_last=1))
    assert layout.steps() == [1, 2, 3]


def test_nothing_goes_before_latest_has_moved(tmp_path):
    layout = filled(tmp_path, [1, 2, 3])
    for target in (None, "step_2", "step_7"):
        os.unlink(layout.latest)
        if target:
            layout.latest.symlink_to(target)
        else:
            layout.latest.symlink_to("nowhere")
        assert prune(layout, CheckpointingConfig(keep_last=1)) == []
        assert layout.steps() == [1, 2, 3]


def test_an_interrupted_deletion_is_finished_by_the_next_save(tmp_path):
    layout = filled(tmp_path, [1, 2])
    trash = layout.checkpoints / ".trash-step_1"
    trash.mkdir()
    os.rename(layout.state_dir(1), trash / "state")
    assert layout.steps() == [2]
    filled(tmp_path, [3])
    assert {path.name for path in layout.checkpoints.iterdir()} == {"latest", "step_2", "step_3"}


def test_a_step_saved_again_is_not_taken_for_trash(tmp_path):
    layout = filled(tmp_path, [1, 2])
    trash = layout.checkpoints / ".trash-step_1"
    trash.mkdir()
    os.rename(layout.state_dir(1), trash / "state")
    os.rename(trash, tmp_path / "kept")
    filled(tmp_path, [1])
    os.rename(tmp_path / "kept", trash)
    filled(tmp_path, [3])
    assert verify_step(layout, 1).good
    assert not trash.exists()
