"""A run stopped at any moment and resumed is the same run: losses, weights, moments, next batches, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.legacy import pico_parameter_names
from pico_fast.checkpoint.load import latest_good
from pico_fast.config_io import load_config
from pico_fast.monitor import read_metrics
from pico_fast.runtime import GracefulStop, start_runtime
from pico_fast.setup_run import prepare_run
from pico_fast.train import main, run_steps


def layout_of(config_file) -> RunLayout:
    return RunLayout.from_config(load_config(config_file).checkpointing)


def trajectory(layout):
    """(step, loss, gradient norm) of every step, and the final state."""
    lines = [entry for entry in read_metrics(layout.metrics) if entry["event"] == "train"]
    _, state, rejected = latest_good(layout)
    assert not rejected
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines], state.tensors


def assert_same_run(config_file, expected):
    losses, tensors = trajectory(layout_of(config_file))
    assert losses == expected[0]
    assert tensors.keys() == expected[1].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[1][name]), name


WHOLE = {}  # trajectories of runs that nothing stopped, by their settings: several tests compare with the same one


@pytest.fixture
def uninterrupted(small_run):
    """Trajectory of a run that nothing stopped; call with the settings of :func:`small_run`."""

    def run(**settings):
        key = repr(sorted(settings.items()))
        if key not in WHOLE:
            file = small_run("whole", **settings)
            assert main(["--config", str(file)]) == 0
            WHOLE[key] = trajectory(layout_of(file))
        return WHOLE[key]

    return run


class StopAt(GracefulStop):
    """Asks the run to stop once it has applied ``step`` updates."""

    def __init__(self, step):
        super().__init__()
        self.at = step
        self.run = None

    def __call__(self):
        if self.run is not None and self.run.step >= self.at:
            self.received = signal.SIGTERM
        return super().__call__()


def run_until(config_file, step):
    config = load_config(config_file)
    stop = StopAt(step)
    with prepare_run(config, start_runtime(config), stop) as run:
        stop.run = run
        run_steps(run)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_stopped_at_every_step(small_run, uninterrupted, precision):
    settings = {"training.fabric.precision": precision, "training.optimization.max_grad_norm": 0.5}
    expected = uninterrupted(**settings)
    file = small_run("stopped", **settings)
    for step in range(1, 8):
        run_until(file, step)
        assert layout_of(file).latest_step() == step
    assert main(["--config", str(file)]) == 0
    assert_same_run(file, expected)


def test_a_finished_run_started_again_does_nothing(small_run):
    file = small_run()
    layout = layout_of(file)
    assert main(["--config", str(file)]) == 0
    expected = trajectory(layout)
    before = {path: path.stat().st_mtime_ns for path in layout.checkpoints.rglob("*")}
    assert main(["--config", str(file)]) == 0
    assert {path: path.stat().st_mtime_ns for path in layout.checkpoints.rglob("*")} == before
    assert_same_run(file, expected)


def test_a_damaged_checkpoint_is_passed_over_and_made_again(small_run, uninterrupted, capsys):
    expected = uninterrupted()
    file = small_run("damaged")
    layout = layout_of(file)
    run_until(file, 5)
    state = layout.state_dir(5) / "rank_00000.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert main(["--config", str(file)]) == 0
    assert "step_5 was passed over" in capsys.readouterr().out
    assert_same_run(file, expected)


def start(config_file, *, torchrun=False, **environment):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"] if torchrun else []
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "pico_fast.train", "--config", str(config_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def wait_for_step(process, layout, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if layout.metrics.exists() and f'"step": {step},' in layout.metrics.read_text():
            return
        if process.poll() is not None:
            raise AssertionError(process.stdout.read())
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached in two minutes")


MANY = {"max_steps": 200, "checkpointing.save_every_n_steps": 200, "evaluation.metrics": []}


@pytest.mark.parametrize(
    ("number", "torchrun"),
    [
        (signal.SIGTERM, False),
        (signal.SIGINT, False),
        (signal.SIGUSR1, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, True),
    ],
)
def test_a_signal_finishes_the_step_commits_and_exits_0(small_run, uninterrupted, number, torchrun):
    """Without torchrun the signal comes twice at once; with it the terminal's Ctrl-C reaches torchrun and its worker,
    and torchrun forwards it: twice as well. torchrun's own exit code is its own affair."""
    expected = uninterrupted(**MANY)
    file = small_run("signalled", **MANY)
    layout = layout_of(file)
    process = start(file, torchrun=torchrun)
    wait_for_step(process, layout, 5)
    os.killpg(process.pid, number)
    if not torchrun:
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    step = layout.latest_step()
    assert 5 < step < 200, output
    assert f"{number.name}: finishing the step, then saving" in output
    assert verify_step(layout, step).good
    if not torchrun:
        assert process.returncode == 0, output
        assert f"{number.name}: stopped after {step} steps" in output
    assert main(["--config", str(file)]) == 0
    assert_same_run(file, expected)


def test_kill_9_at_random_moments_loses_nothing_committed(small_run, uninterrupted):
    expected = uninterrupted(**MANY)  # the saves in between change nothing
    file = small_run("killed", **{**MANY, "checkpointing.save_every_n_steps": 3, "checkpointing.keep_last": 3})
    layout, moments = layout_of(file), random.Random(0)
    for _ in range(5):
        before = layout.latest_step() or 0
        process = start(file)
        wait_for_step(process, layout, before + 4)
        time.sleep(moments.uniform(0, 0.25))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        latest = layout.latest_step()
        assert latest is not None
        assert latest >= before
        assert verify_step(layout, latest).good
    assert main(["--config", str(file)]) == 0
    assert_same_run(file, expected)


def test_a_run_of_pico_train_goes_on(small_run, uninterrupted):
    """Rewrite a checkpoint as pico-train's Lightning Fabric would have written it; the rest of the run is the same."""
    settings = {"evaluation.metrics": []}
    expected = uninterrupted(**settings)
    file = small_run("of-pico", **settings)
    layout = layout_of(file)
    run_until(file, 4)
    _, state, _ = latest_good(layout)
    model = {name: state.tensors[f"model/{name}"] for name in pico_parameter_names(n_layers=2)}
    moments = {
        number: {key: state.tensors[f"optimizer/{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for number, name in enumerate(model)
    }
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": list(range(len(model)))}
    shutil.rmtree(layout.checkpoints)
    layout.fabric_state(4).parent.mkdir(parents=True)
    fabric = {
        "_model": model,
        "_optimizer": {"state": moments, "param_groups": [group]},
        "_lr_scheduler": {"last_epoch": 4},
        "_checkpoint_step": 4,
        "_rng_states": {"torch": torch.get_rng_state(), "python": random.getstate()},
    }
    torch.save(fabric, layout.fabric_state(4))
    layout.metrics.unlink()
    assert main(["--config", str(file)]) == 0
    losses, tensors = trajectory(layout)
    assert losses == expected[0][4:]
    assert layout.steps() == [4, 8]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[1][name]), name
