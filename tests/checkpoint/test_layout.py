"""The names in a run directory."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from pico_fast.checkpoint.layout import RunLayout, default_run_name, rank_file, step_name, step_of
from pico_fast.config import CheckpointingConfig


def test_paths_are_picos(tmp_path):
    config = CheckpointingConfig(run_name="r", runs_dir=str(tmp_path))
    layout = RunLayout.from_config(config)
    below = {
        layout.training_config: "training_config.yaml",
        layout.metrics: "metrics.jsonl",
        layout.logs: "logs",
        layout.eval_results(7): "eval_results/step_7.json",
        layout.checkpoints: "checkpoints",
        layout.latest: "checkpoints/latest",
        layout.step_dir(7): "checkpoints/step_7",
        layout.state_dir(7): "checkpoints/step_7/state",
        layout.manifest(7): "checkpoints/step_7/state/manifest.json",
        layout.learning_dynamics(7): "checkpoints/step_7/learning_dynamics",
        layout.fabric_state(7): "checkpoints/step_7/fabric_state/checkpoint.pt",
        layout.lock: ".lock",
        layout.wandb_id: "wandb_id",
    }
    assert {path: path.relative_to(tmp_path / "r").as_posix() for path in below} == below
    assert rank_file(3) == "rank_00003.safetensors"


def test_configured_names_are_used():
    config = CheckpointingConfig(run_name="r", checkpoints_dir="c", logs_dir="l", fabric_checkpoint_dir="f")
    config.evaluation.eval_results_dir = "e"
    layout = RunLayout.from_config(config)
    assert layout.root == Path("runs/r")
    assert layout.step_dir(1) == Path("runs/r/c/step_1")
    assert (layout.logs, layout.eval_results(1)) == (Path("runs/r/l"), Path("runs/r/e/step_1.json"))
    assert layout.fabric_state(1) == Path("runs/r/c/step_1/f/checkpoint.pt")
    assert layout.reserved == {"state", "learning_dynamics", "f"}


def test_a_run_without_a_name_is_refused():
    with pytest.raises(ValueError, match="run_name is null"):
        RunLayout.from_config(CheckpointingConfig())
    assert default_run_name(datetime(2026, 1, 2, 3, 4, 5)) == "2026-01-02_03-04-05"


@pytest.mark.parametrize(
    "name", ["step_", "step_01", "step_-1", "step_1.bad", "latest", "xstep_1", "step_1\n", "step_١"]
)
def test_names_that_are_no_steps(name):
    assert step_of(name) is None


def test_steps(tmp_path):
    layout = RunLayout(tmp_path)
    assert layout.steps() == layout.legacy_steps() == []
    assert layout.latest_step() is None
    for step in (100, 20, 3):
        layout.state_dir(step).mkdir(parents=True)
    layout.step_dir(50).mkdir()
    layout.fabric_state(40).parent.mkdir(parents=True)
    (layout.checkpoints / "step_7").write_text("a file")
    layout.latest.symlink_to(step_name(100))
    assert layout.steps() == [3, 20, 100]
    assert layout.legacy_steps() == [40]
    assert layout.latest_step() == 100
    for target, expected in (("step_40", 40), ("step_50", None), ("step_9", None), ("elsewhere", None)):
        os.unlink(layout.latest)
        layout.latest.symlink_to(target)
        assert layout.latest_step() == expected
