"""kill -9 at random moments of a process that saves and prunes without pause."""

import os
import random
import signal
import time
from pathlib import Path

import torch

from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.lock import RunLock
from pico_fast.checkpoint.retention import prune
from pico_fast.checkpoint.save import SaveReport, save_checkpoint
from pico_fast.config import CheckpointingConfig

KILLS = 40
VALUES = torch.arange(200_000, dtype=torch.float32)


def export(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def save(layout: RunLayout, step: int) -> SaveReport:
    tensors = {"model/w": VALUES, "optimizer/step/w": torch.tensor(float(step))}
    return save_checkpoint(layout, step, tensors=tensors, meta={"step": step}, write_extra=export)


def save_for_ever(layout: RunLayout, step: int) -> None:
    with RunLock(layout):
        while True:
            save(layout, step)
            prune(layout, CheckpointingConfig(keep_last=2))
            step += 1


def test_a_killed_process_leaves_good_checkpoints(tmp_path):
    layout = RunLayout(tmp_path)
    chance = random.Random(0)
    seconds = save(layout, 0).seconds
    newest, progressed = 0, 0
    for _ in range(KILLS):
        child = os.fork()  # not a new interpreter: importing torch would take longer than all the saves
        if child == 0:
            try:
                save_for_ever(layout, newest + 1)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, 3) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        for step in layout.steps():
            assert verify_step(layout, step).good
        step, state, rejected = latest_good(layout)
        assert rejected == []
        assert step >= newest, "a checkpoint that was there is gone"
        assert state.meta == {"step": step}
        assert state.tensors["optimizer/step/w"].item() == step
        assert torch.equal(state.tensors["model/w"], VALUES)
        # several deaths between a commit and the link leave the link behind, but never at nothing
        assert layout.latest_step() in layout.steps()
        progressed += step > newest
        newest = step
    assert progressed > 0, "no save came through: this test shows nothing"
    with RunLock(layout):
        save_checkpoint(layout, newest + 1, tensors={}, meta={})
    assert not list(layout.checkpoints.rglob(".t*"))
