"""The trainer in several processes: the same run as in one, whatever the layout, and what happens when a rank fails."""

import contextlib
import io
import json
import os
import re
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pico_fast import train
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.config_io import load_config
from pico_fast.monitor import read_metrics
from pico_fast.parallel.layout import Layout
from tests.ranks import every_layout, run_ranks
from tests.train.trainers import Trainers

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
    """One process, every layout of four, one process again, two steps each."""
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
    layouts = every_layout(4)
    legs = [
        [
            f"--config={file}",
            f"training.max_steps={4 + 2 * leg}",
            f"parallel.tp={to.tp}",
            f"parallel.dp_shard={to.dp_shard}",
        ]
        for leg, to in enumerate(layouts)
    ]
    capsys.readouterr()
    assert train.main(["--config", str(file), "training.max_steps=2"]) == 0
    per_rank = run_ranks(trained_rows, 4, legs, timeout=180)
    assert train.main(["--config", str(file), "training.max_steps=16"]) == 0
    assert f"layout was {layouts[-1]}, now {Layout()}" in capsys.readouterr().out

    found_losses, found_perplexities = numbers_of(layout_of(file))
    assert found_losses.keys() == losses.keys() == set(range(16))
    assert list(found_losses.values()) == pytest.approx(list(losses.values()), rel=1e-5)
    assert found_perplexities.keys() == perplexities.keys() == set(range(0, 17, 2))
    assert list(found_perplexities.values()) == pytest.approx(list(perplexities.values()), rel=1e-4)
    for leg, layout in enumerate(layouts):
        for step in (2 * leg, 2 * leg + 1):
            for neighbour in range(layout.tp):  # the ranks of one tp group read the same rows, each group its share
                shares = [per_rank[group * layout.tp + neighbour][step] for group in range(layout.dp_size)]
                np.testing.assert_array_equal(np.concatenate(shares, axis=1), expected_rows[2 + step])


def test_torchrun_trains_as_one_process_does_and_a_killed_rank_ends_it_by_name(small_run):
    file = small_run("single", **{"model.attention_n_kv_heads": 4})
    assert train.main(["--config", str(file)]) == 0
    whole = small_run("parallel", **{"model.attention_n_kv_heads": 4})
    with Trainers.torchrun(whole, 2, "parallel.tp=2") as trainers:
        (output,) = trainers.outputs(120)
        assert trainers.codes == [0], output
    assert output.count("Done: 8 steps") == 1
    assert output.count("2 processes: tp 2 x dp_shard 1 x dp_replicate 1") == 1
    for found, expected in zip(numbers_of(layout_of(whole)), numbers_of(layout_of(file)), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)

    killed = small_run("killed", **LONG)
    with Trainers.torchrun(killed, 2) as trainers:
        trainers.wait_for_step(layout_of(killed), 4)
        os.kill(trainers.pid(1), signal.SIGKILL)
        start = time.monotonic()
        (output,) = trainers.outputs()
        assert time.monotonic() - start < 20
        assert trainers.codes == [1]
    assert "rank      : 1" in output  # torchrun's own report
    assert "Signal 9 (SIGKILL)" in output
    assert f"pico_fast.train: {LINE}" in output
    assert f"the last checkpoint is {layout_of(killed).step_dir(0)}" in output


def test_without_torchrun_a_killed_rank_0_ends_the_others_too(small_run):
    file = small_run(**LONG)
    with Trainers.ranks(file, 2, "parallel.dp_shard=2") as trainers:
        trainers.wait_for_step(layout_of(file), 4)
        os.kill(trainers.pid(0), signal.SIGKILL)
        start = time.monotonic()
        output = trainers.outputs()[1]
        assert time.monotonic() - start < 20
        assert trainers.codes == [-signal.SIGKILL, 1], output
    (line,) = (line for line in output.splitlines() if LINE in line)
    assert line.startswith(f"pico_fast.train: rank 1: {LINE}")
    assert line.endswith(f"the last checkpoint is {layout_of(file).step_dir(0)}")
    assert verify_step(layout_of(file), 0).good


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_other_ranks_go_on(small_run):
    file = small_run(**LONG)
    layout = layout_of(file)
    with Trainers.ranks(file, 2, "parallel.tp=2") as trainers:
        trainers.wait_for_step(layout, 4)
        os.kill(trainers.pid(1), signal.SIGTERM)
        outputs = trainers.outputs()
        assert trainers.codes == [0, 0], outputs
    step = layout.latest_step()
    assert 4 < step < 400
    assert verify_step(layout, step).good
    assert f"SIGTERM: stopped after {step} steps; the same command goes on from there" in outputs[0]
    assert "stopped after" not in outputs[1]
    with Trainers.ranks(file, 2, f"training.max_steps={step + 1}") as trainers:  # tp 2 -> dp 2
        outputs = trainers.outputs()
        assert trainers.codes == [0, 0], outputs
    assert "layout was tp 2 x dp_shard 1 x dp_replicate 1, now tp 1 x dp_shard 1 x dp_replicate 2" in outputs[0]
    assert set(numbers_of(layout)[0]) == set(range(step + 1))
    assert outputs[1].strip() == ""  # rank 0 alone prints, logs and writes metrics
    assert len(list(layout.logs.iterdir())) == 2
    lines = [json.loads(line) for line in layout.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(step + 1))
    assert all(line["tokens"] == (line["step"] + 1) * 8 * 16 for line in lines if line["event"] == "train")


def test_bad_data_on_one_rank_saves_and_ends_all_with_its_message_once(small_run, tmp_path):
    """Row 39, the last of the first file, is of step 4's last micro-batch: of two ranks the second one's."""
    file = small_run("poor", max_steps=8, **{"evaluation.metrics": [], "data.dataloader.prefetch": 1})
    path = tmp_path / "dataset" / "data" / "train-00000-of-00002.parquet"
    good = path.read_bytes()
    rows = [row.copy() for row in pq.read_table(path)["input_ids"].to_numpy()]
    rows[39][3] = 64  # model.vocab_size
    pq.write_table(pa.table({"input_ids": rows}), path, row_group_size=1)
    with Trainers.ranks(file, 2) as trainers:
        outputs = trainers.outputs()
        assert trainers.codes == [2, 2], outputs
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


def refusals(config_file: str, arguments: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """Exit code and output of the trainer with each of ``arguments``: rank 0 is given the first, rank 1 the second."""
    train.SPEAKER_S = 0.1  # there is no launcher to end who waits
    found = []
    for given in arguments:
        mine = given[int(os.environ["RANK"])]
        with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(error):
            found.append((train.main(["--config", config_file, *mine.split()]), error.getvalue()))
    return found


def test_wrong_input_is_one_message_of_rank_0_and_exit_code_2_on_all(small_run, tmp_path):
    file = small_run()
    both = {
        "parallel.tp=3": "parallel.tp: 3 does not divide",  # before the processes have met
        f"data.dataset.name={tmp_path / 'absent'}": "absent",
        f"checkpointing.runs_dir={file}": "the run directory must be writable",
    }
    one_node = {
        "training.optimization.lr=0.5": r"rank\(s\) 1 have another configuration",
        "data.dataset.name=/absent/data": r"rank\(s\) 1 have another configuration.*/absent/data",
    }
    arguments = [*((argument, argument) for argument in both), *(("", argument) for argument in one_node)]
    of_0, of_1 = run_ranks(refusals, 2, str(file), arguments)
    for shown, (code, output) in zip([*both.values(), *one_node.values()], of_0, strict=True):
        assert code == 2
        assert output.count("pico_fast.train: ") == 1
        assert re.search(shown, output), output
    assert of_1 == [(2, "")] * len(arguments)
    assert not layout_of(file).root.exists()


FAULTY_TRAINER = """
import os, sys, time
from torch.distributed.elastic.multiprocessing.errors import record
from pico_fast import run, train

rank = int(os.environ["RANK"])
{fault}
sys.exit(record(train.main)())
"""


def root_cause(output: str) -> str:
    """The part of torchrun's report that blames a rank."""
    return output.split("Root Cause (first observed failure):")[1]


def test_the_message_of_a_slow_rank_0_is_not_lost_when_another_sees_the_mistake_first(small_run, tmp_path):
    """torchrun ends all processes as soon as one has ended."""
    script = tmp_path / "slow.py"
    script.write_text(FAULTY_TRAINER.format(fault="time.sleep(0 if rank else 3)"))
    with Trainers.torchrun(small_run(), 2, "parallel.tp=3", script=str(script)) as trainers:
        (output,) = trainers.outputs()
    assert trainers.codes == [1]
    assert output.count("pico_fast.train: ") == 1
    assert "parallel.tp: 3 does not divide" in output
    assert "rank      : 0 (local_rank: 0)\n  exitcode  : 2" in root_cause(output)


MISTAKE_IN_A_STEP = """
def overdue(self):  # asked in the middle of a step
    if rank == 1 and self.step == 3:
        raise KeyError("a mistake of rank one")
    return ask(self)
ask, run.Run.overdue = run.Run.overdue, overdue
"""


def test_torchrun_blames_the_rank_that_raised_and_shows_where(small_run, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY_TRAINER.format(fault=MISTAKE_IN_A_STEP))
    with Trainers.torchrun(small_run(), 2, "parallel.tp=2", script=str(script)) as trainers:
        (output,) = trainers.outputs()
    assert trainers.codes == [1]
    assert "rank      : 1 (local_rank: 1)" in root_cause(output)
    assert "KeyError: 'a mistake of rank one'" in root_cause(output)
    assert "in overdue" in root_cause(output)
    assert f"pico_fast.train: {LINE}" in output


MISTAKE_BEFORE_A_SAVE = """
def gather_full(model, parallel):  # the second time: step 4; the other rank sends its parts, and goes on to the save
    calls.append(1)
    if rank == 0 and len(calls) == 2:
        raise MemoryError("no room for all weights")
    return gather(model, parallel)
calls, gather, run.gather_full = [], run.gather_full, gather_full
"""


def test_a_rank_that_fails_alone_before_a_save_ends_the_run_at_once(small_run, tmp_path):
    """It is no failed save, which all ranks would be told of."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY_TRAINER.format(fault=MISTAKE_BEFORE_A_SAVE))
    file = small_run()
    with Trainers.ranks(file, 2, "parallel.tp=2", script=str(script)) as trainers:
        of_0, of_1 = trainers.outputs()
        assert trainers.codes == [1, 1], of_0
    assert "MemoryError: no room for all weights" in of_0
    assert "training goes on" not in of_0
    assert f"pico_fast.train: rank 1: {LINE}" in of_1
    assert layout_of(file).latest_step() == 0


def test_an_assertion_on_a_device_is_said_by_its_rank(small_run, monkeypatch, capsys):
    """The others only see that they have lost a peer."""

    def failing(model, optimizer, micro_batches, **settings):
        if settings["step"] == 2:
            raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")
        return step(model, optimizer, micro_batches, **settings)

    step = train.training_step
    monkeypatch.setattr(train, "training_step", failing)
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--config", str(small_run())]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pico_fast.train: rank 1: an assertion failed on cpu, in step 2 or shortly before it (CUDA")
