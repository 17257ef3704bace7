"""The trainer in several processes: the same run as in one, whatever the layout, and what happens when a rank fails."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pico_fast import train
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.config_io import load_config
from pico_fast.monitor import read_metrics
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LONG = {"max_steps": 400, "checkpointing.save_every_n_steps": 400, "evaluation.metrics": []}
LINE = "another process of this run has ended or does not answer"


def layout_of(config_file) -> RunLayout:
    return RunLayout.from_config(load_config(config_file).checkpointing)


def numbers_of(layout) -> tuple[dict[int, float], dict[int, float]]:
    """Loss by step, perplexity by step."""
    events = read_metrics(layout.metrics)
    losses = {entry["step"]: entry["loss"] for entry in events if entry["event"] == "train"}
    return losses, {entry["step"]: entry["paloma"] for entry in events if entry["event"] == "eval"}


def trained_rows(legs: list[list[str]]) -> list[np.ndarray]:
    """Run the trainer with each of ``legs`` (arguments) one after the other; the rows of every step, as they came."""
    seen = []

    def watch(model, optimizer, micro_batches, **settings):
        seen.append(micro_batches.numpy().copy())
        return step(model, optimizer, micro_batches, **settings)

    step, train.training_step = train.training_step, watch
    stop, train.stop_parallel = train.stop_parallel, lambda: None  # the next leg uses the same process group
    try:
        for leg in legs:
            assert train.main(leg) == 0
    finally:
        train.training_step, train.stop_parallel = step, stop
    return seen


def test_a_run_goes_on_in_any_layout_with_the_same_rows_and_losses(small_run, capsys):
    """One process -> tp2 x dp2 -> fsdp4 -> tp4 -> hsdp -> tp2 x fsdp2 -> dp4 -> one process, two steps each."""
    settings = {
        "model.attention_n_kv_heads": 4,
        "training.optimization.lr_scheduler": "constant",
        "training.optimization.max_grad_norm": 0.5,
        "evaluation.paloma.batch_size": 3,
        "evaluation.every_n_steps": 2,
    }
    whole = small_run("whole", max_steps=16, **settings)
    expected_rows = trained_rows([["--config", str(whole)]])
    losses, perplexities = numbers_of(layout_of(whole))

    file = small_run("moving", **settings)
    sizes = [(2, 1, 2), (1, 4, 1), (4, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 4)]
    parts = [f"parallel.tp={tp} parallel.dp_shard={shard}".split() for tp, shard, _ in sizes]
    legs = [["--config", str(file), f"training.max_steps={4 + 2 * leg}", *part] for leg, part in enumerate(parts)]
    capsys.readouterr()
    assert train.main(["--config", str(file), "training.max_steps=2"]) == 0
    per_rank = run_ranks(trained_rows, 4, legs, timeout=180)
    assert train.main(["--config", str(file), "training.max_steps=16"]) == 0
    assert "layout was tp 1 x dp_shard 1 x dp_replicate 4, now tp 1" in capsys.readouterr().out

    found_losses, found_perplexities = numbers_of(layout_of(file))
    assert found_losses.keys() == losses.keys() == set(range(16))
    assert list(found_losses.values()) == pytest.approx(list(losses.values()), rel=1e-5)
    assert found_perplexities.keys() == perplexities.keys() == set(range(0, 17, 2))
    assert list(found_perplexities.values()) == pytest.approx(list(perplexities.values()), rel=1e-4)
    for leg, (tp, shard, replicate) in enumerate(sizes):
        for step in (2 * leg, 2 * leg + 1):
            for neighbour in range(tp):  # the ranks of one tp group read the same rows, each group its share
                shares = [per_rank[group * tp + neighbour][step] for group in range(shard * replicate)]
                np.testing.assert_array_equal(np.concatenate(shares, axis=1), expected_rows[2 + step])


class Ranks:
    """The trainer as several processes of this machine, started as a cluster's launcher would, or by torchrun."""

    def __init__(self, config_file: Path, world_size: int, *arguments: str, torchrun: bool = False):
        command = ["pico_fast.train", "--config", str(config_file), *arguments]
        if torchrun:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "-m"]
            self.processes = [self._start([*launcher, *command], {})]
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.processes = [
            self._start(
                command,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
            )
            for rank in range(world_size)
        ]

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore::FutureWarning", "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                child.kill()
            process.kill()
            process.communicate()

    def pid(self, rank: int) -> int:
        """The process of ``rank`` below torchrun, or the one that was started for it."""
        if len(self.processes) > 1:
            return self.processes[rank].pid
        children = psutil.Process(self.processes[0].pid).children(recursive=True)
        return next(child.pid for child in children if child.environ().get("RANK") == str(rank))

    def wait_for_step(self, layout: RunLayout, step: int) -> None:
        deadline = time.monotonic() + 120
        while not (layout.metrics.exists() and f'"step": {step},' in layout.metrics.read_text()):
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended, ended[0].communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def outputs(self, timeout: float = 60) -> list[str]:
        return [process.communicate(timeout=timeout)[0] for process in self.processes]

    @property
    def codes(self) -> list[int]:
        return [process.returncode for process in self.processes]


def test_torchrun_trains_as_one_process_does_and_a_killed_rank_ends_it_by_name(small_run):
    file = small_run("single", **{"model.attention_n_kv_heads": 4})
    assert train.main(["--config", str(file)]) == 0
    whole = small_run("parallel", **{"model.attention_n_kv_heads": 4})
    with Ranks(whole, 4, "parallel.tp=2", torchrun=True) as ranks:
        (output,) = ranks.outputs(120)
        assert ranks.codes == [0], output
    assert output.count("Done: 8 steps") == 1
    assert output.count("4 processes: tp 2 x dp_shard 1 x dp_replicate 2") == 1
    for found, expected in zip(numbers_of(layout_of(whole)), numbers_of(layout_of(file)), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)

    killed = small_run("killed", **LONG)
    with Ranks(killed, 2, "parallel.tp=2", torchrun=True) as ranks:
        ranks.wait_for_step(layout_of(killed), 4)
        os.kill(ranks.pid(1), signal.SIGKILL)
        start = time.monotonic()
        (output,) = ranks.outputs()
        assert time.monotonic() - start < 20
        assert ranks.codes == [1]
    assert "rank      : 1" in output  # torchrun's own report
    assert "Signal 9 (SIGKILL)" in output
    assert f"pico_fast.train: {LINE}" in output
    assert f"the last checkpoint is {layout_of(killed).step_dir(0)}" in output


@pytest.mark.parametrize(("layout", "victim"), [("parallel.dp_shard=2", 0), ("parallel.tp=1", 1)])
def test_without_torchrun_a_killed_rank_ends_the_others_too(small_run, layout, victim):
    file = small_run(**LONG)
    with Ranks(file, 2, layout) as ranks:
        ranks.wait_for_step(layout_of(file), 4)
        os.kill(ranks.pid(victim), signal.SIGKILL)
        start = time.monotonic()
        survivor = 1 - victim
        output = ranks.outputs()[survivor]
        assert time.monotonic() - start < 20
        assert ranks.codes[survivor] == 1, output
    who = "" if survivor == 0 else "rank 1: "
    (line,) = (line for line in output.splitlines() if LINE in line)
    assert line.startswith(f"pico_fast.train: {who}{LINE}")
    assert line.endswith(f"the last checkpoint is {layout_of(file).step_dir(0)}")
    assert verify_step(layout_of(file), 0).good


def test_a_signal_to_one_rank_stops_all_after_the_same_step(small_run):
    file = small_run(**LONG)
    layout = layout_of(file)
    with Ranks(file, 2, "parallel.tp=2") as ranks:
        ranks.wait_for_step(layout, 4)
        os.kill(ranks.pid(1), signal.SIGTERM)
        outputs = ranks.outputs()
        assert ranks.codes == [0, 0], outputs
    step = layout.latest_step()
    assert 4 < step < 400
    assert verify_step(layout, step).good
    assert f"SIGTERM: stopped after {step} steps; the same command goes on from there" in outputs[0]
    assert "stopped after" not in outputs[1]
    with Ranks(file, 2, f"training.max_steps={step + 1}") as ranks:  # tp 2 -> dp 2
        outputs = ranks.outputs()
        assert ranks.codes == [0, 0], outputs
    assert "layout was tp 2 x dp_shard 1 x dp_replicate 1, now tp 1 x dp_shard 1 x dp_replicate 2" in outputs[0]
    assert set(numbers_of(layout)[0]) == set(range(step + 1))


def test_bad_data_on_one_rank_saves_and_ends_all_with_its_message_once(small_run, tmp_path):
    """Row 39, the last of the first file, is of step 4's last micro-batch: of two ranks the second one's."""
    file = small_run("poor", max_steps=8, **{"evaluation.metrics": [], "data.dataloader.prefetch": 1})
    path = tmp_path / "dataset" / "data" / "train-00000-of-00002.parquet"
    good = path.read_bytes()
    rows = [row.copy() for row in pq.read_table(path)["input_ids"].to_numpy()]
    rows[39][3] = 64  # model.vocab_size
    pq.write_table(pa.table({"input_ids": rows}), path, row_group_size=1)
    with Ranks(file, 2) as ranks:
        outputs = ranks.outputs()
        assert ranks.codes == [2, 2], outputs
    messages = [line for output in outputs for line in output.splitlines() if line.startswith("pico_fast.train: ")]
    assert len(messages) == 1
    assert messages[0] in outputs[0]
    assert messages[0].startswith("pico_fast.train: rank 1: ")
    assert "64" in messages[0]
    assert messages[0].endswith("step 4 is saved, mend the data and start again")
    assert layout_of(file).latest_step() == 4
    path.write_bytes(good)
    assert train.main(["--config", str(file)]) == 0
    assert layout_of(file).latest_step() == 8


def refusals(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each command."""
    found = []
    for command in commands:
        with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(error):
            found.append((train.main(command), error.getvalue()))
    return found


def test_wrong_input_is_one_message_of_rank_0_and_exit_code_2_on_all(small_run, tmp_path):
    file = small_run()
    cases = {
        "parallel.tp=3": "parallel.tp: 3 does not divide",  # before the processes have met
        f"data.dataset.name={tmp_path / 'absent'}": "absent",
        f"checkpointing.runs_dir={file}": "the run directory must be writable",
    }
    commands = [["--config", str(file), argument] for argument in cases]
    of_0, of_1 = run_ranks(refusals, 2, commands)
    for shown, (code, output) in zip(cases.values(), of_0, strict=True):
        assert code == 2
        assert output.count("pico_fast.train: ") == 1
        assert shown in output
    assert of_1 == [(2, "")] * 3
    assert not layout_of(file).root.exists()


def only_node(overrides: dict[int, str], config_file: str) -> tuple[int, str]:
    """The trainer with an override that this rank alone is given."""
    mine = overrides.get(int(os.environ["RANK"]))
    ((code, output),) = refusals([["--config", config_file, *([mine] if mine else [])]])
    return code, output


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("training.optimization.lr=0.5", r"rank\(s\) 1 have another configuration"),
        ("data.dataset.name=/absent/data", r"rank 1: .*/absent/data"),
    ],
)
def test_what_is_wrong_on_one_node_only_is_said_by_rank_0(small_run, override, shown):
    (code, output), of_1 = run_ranks(only_node, 2, {1: override}, str(small_run()))
    assert code == 2
    assert re.search(shown, output), output
    assert output.count("pico_fast.train: ") == 1
    assert of_1 == (2, "")


def test_only_rank_0_writes_metrics_and_logs(small_run):
    file = small_run(max_steps=3)
    with Ranks(file, 2, "parallel.dp_shard=2") as ranks:
        outputs = ranks.outputs()
        assert ranks.codes == [0, 0], outputs
    layout = layout_of(file)
    assert outputs[1].strip() == ""
    assert len(list(layout.logs.iterdir())) == 1
    lines = [json.loads(line) for line in layout.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [0, 1, 2]
    assert all(line["tokens"] == (line["step"] + 1) * 8 * 16 for line in lines if line["event"] == "train")
