import functools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pico_fast.config import Config
from pico_fast.monitor import Monitor, read_metrics
from pico_fast.monitor.throughput import Throughput

STAMP = r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2} - pico-train - INFO - "
# The two patterns of the dashboard script in pico-train's fork ThomasVuNguyen/pico-train (scripts/generate_data.py).
FORK_TRAINING = (
    STAMP
    + r"Step (\d+) -- 🔄 Training Metrics\n"
    + STAMP
    + r"├── Loss: ([\d.]+)\n"
    + STAMP
    + r"├── Learning Rate: ([\d.e+-]+)\n"
    + STAMP
    + r"└── Inf/NaN count: (\d+)"
)
FORK_EVALUATION = STAMP + r"Step (\d+) -- 📊 Evaluation Results\n" + STAMP + r"└── paloma: ([\d.e+-]+)"

Open = Callable[..., Monitor]


@pytest.fixture
def config() -> Config:
    config = Config()
    config.training.max_steps = 100
    config.monitoring.logging.log_every_n_steps = 10
    config.monitoring.progress = "plain"
    return config


@pytest.fixture
def open_monitor(tmp_path: Path, config: Config) -> Iterator[Open]:
    opened: list[Monitor] = []

    def make(**changes: Any) -> Monitor:
        arguments: dict[str, Any] = {
            "run_dir": tmp_path,
            "metrics_file": tmp_path / "metrics.jsonl",
            "logs_dir": tmp_path / "logs",
            "wandb_id_file": tmp_path / "wandb_id",
            "start_step": 0,
            "tokens_per_step": 512,
            "flops_per_token": 1e6,
            "peak": (1e12, "of the vendor's dense bf16 peak, 1 TFLOP/s (test)"),
            "device": torch.device("cpu"),
            "resumed": False,
        }
        opened.append(Monitor(config, **{**arguments, **changes}))
        return opened[-1]

    yield make
    for monitor in opened:
        monitor.close()


def log_text(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted((folder / "logs").glob("log_*.log")))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(folder / "metrics.jsonl") if event["event"] == kind]


def test_log_lines_are_what_pico_trains_forks_parse(tmp_path: Path, open_monitor: Open) -> None:
    with open_monitor() as monitor:
        for step in range(21):
            monitor.train_step(step, 11.0131 - step / 10, step * 1e-4, 1.5, 0)
        monitor.evaluation(20, {"paloma": 59205.7958984375, "paloma_token_weighted": 51000.5, "documents": 8})
    text = log_text(tmp_path)
    # Interval means: step 0 alone, 1..10, 11..20.
    assert re.findall(FORK_TRAINING, text) == [
        ("0", "11.0131", "0.00e+00", "0"),
        ("10", "10.4631", "1.00e-03", "0"),
        ("20", "9.4631", "2.00e-03", "0"),
    ]
    assert re.findall(FORK_EVALUATION, text) == [("20", "59205.7958984375")]
    assert "paloma_token_weighted 51,000" in text
    assert re.fullmatch(r"log_\d{8}_\d{6}\.log", next((tmp_path / "logs").iterdir()).name)


def test_what_the_forks_read_of_the_configuration_is_in_the_log(
    tmp_path: Path, config: Config, open_monitor: Open
) -> None:
    config.model.d_model = 96
    open_monitor().close()
    text = log_text(tmp_path)
    assert re.search(r"d_model: (\d+)", text)[1] == "96"  # type: ignore[index]
    assert re.search(r"max_steps: (\d+)", text)[1] == "100"  # type: ignore[index]
    assert "Starting from step: 0" in text


def test_metrics_of_an_interval(tmp_path: Path, open_monitor: Open) -> None:
    losses = [5.0, 4.0, math.nan, 2.0, math.inf, *[1.0] * 6]
    nonfinite = 3  # of the run before this process
    monitor = open_monitor(nonfinite_before=3)
    for step, loss in enumerate(losses):
        nonfinite += not math.isfinite(loss)
        monitor.train_step(step, loss, 1e-3, 0.25, nonfinite)
    monitor.close()
    first, second = events(tmp_path, "train")
    assert (first["step"], first["loss"], first["nonfinite"], first["tokens"]) == (0, 5.0, 0, 512)
    assert second["loss"] == pytest.approx((4 + 2 + 6 * 1) / 8)
    assert (second["step"], second["nonfinite"], second["nonfinite_total"], second["tokens"]) == (10, 2, 5, 11 * 512)
    assert (second["lr"], second["grad_norm"]) == (1e-3, 0.25)
    assert second["mfu"] == pytest.approx(second["tokens_per_second"] * 1e6 / 1e12)
    assert 1e7 < second["memory_bytes"] < 1e12
    assert abs(second["time"] - time.time()) < 60
    assert "└── Inf/NaN count: 2\n" in log_text(tmp_path)


def test_an_interval_without_a_finite_loss(tmp_path: Path, config: Config, open_monitor: Open) -> None:
    config.monitoring.logging.log_every_n_steps = 1
    with open_monitor() as monitor:
        monitor.train_step(0, math.nan, 1e-3, math.nan, 1)
    (event,) = events(tmp_path, "train")
    assert (event["loss"], event["grad_norm"], event["nonfinite"]) == (None, None, 1)
    assert "├── Loss: inf\n" in log_text(tmp_path)  # as pico-train


def test_close_reports_the_partial_interval_once(tmp_path: Path, open_monitor: Open) -> None:
    monitor = open_monitor()
    for step in range(14):
        monitor.train_step(step, float(step), 1e-3, None, 0)
    monitor.close()
    monitor.close()
    assert [(event["step"], event["loss"]) for event in events(tmp_path, "train")] == [(0, 0), (10, 5.5), (13, 12)]
    assert not logging.getLogger("pico-train").handlers


def test_tokens_per_second_is_of_the_steps_alone(
    tmp_path: Path, config: Config, open_monitor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that reports one step late, and two together before a pause: each figure is that of single steps."""
    config.monitoring.logging.log_every_n_steps = 1
    now = 0.0
    monkeypatch.setattr("pico_fast.monitor.monitor.Throughput", functools.partial(Throughput, lambda: now))
    monitor = open_monitor()
    for step in range(8):
        now += 0.5
        monitor.step_done()
        if step > 0 and step != 4:
            monitor.train_step(step - 1, 1.0, 1e-3, None, 0)
        if step == 3:
            monitor.train_step(3, 1.0, 1e-3, None, 0)
            with monitor.paused():
                now += 100
    monitor.close()
    rates = [event["tokens_per_second"] for event in events(tmp_path, "train")]
    assert len(rates) == 7
    assert {rate for rate in rates if rate is not None} == {1024.0}
    assert rates.count(None) == 1  # the step that was reported together with another


def test_evaluation_and_checkpoint_events(
    tmp_path: Path, open_monitor: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = open_monitor()
    monitor.evaluation(0, {"paloma": 60000.0, "paloma_token_weighted": math.inf})
    monitor.checkpoint(0, 1.25, 45_000_000)
    monitor.event("capture", step=0, bytes=7)
    assert events(tmp_path, "eval")[0]["paloma"] == 60000.0
    assert events(tmp_path, "eval")[0]["paloma_token_weighted"] is None
    assert (events(tmp_path, "checkpoint")[0]["seconds"], events(tmp_path, "checkpoint")[0]["bytes"]) == (
        1.25,
        45_000_000,
    )
    assert events(tmp_path, "capture")[0]["bytes"] == 7
    output = capsys.readouterr().out
    assert "step 0: evaluation: paloma 60,000" in output
    assert "step 0: checkpoint: 45 MB in 1.25 s" in output


def test_start_event_tells_where_it_ran_but_no_secret(
    tmp_path: Path, open_monitor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setattr(sys, "argv", ["train", "key=0123456789abcdef"])
    monitor = open_monitor()
    monitor.warning("the key is 0123456789abcdef")
    monitor.close()
    (start,) = events(tmp_path, "start")
    assert start["argv"] == ["train", "key=***"]
    assert start["versions"]["torch"] == str(torch.__version__)
    assert re.fullmatch("[0-9a-f]{64}", start["config_sha256"])
    assert "0123456789abcdef" not in log_text(tmp_path) + (tmp_path / "metrics.jsonl").read_text()
    assert "WARNING - the key is ***" in log_text(tmp_path)


def test_resume_appends_and_supersedes(tmp_path: Path, open_monitor: Open) -> None:
    first = open_monitor()
    for step in range(31):
        first.train_step(step, 3.0, 1e-3, None, 0)
    first.close()
    second = open_monitor(start_step=15, resumed=True)
    for step in range(15, 21):
        second.train_step(step, 2.0, 1e-3, None, 0)
    second.close()
    assert [(event["step"], event["loss"]) for event in events(tmp_path, "train")] == [(0, 3.0), (10, 3.0), (20, 2.0)]
    assert [event["step"] for event in events(tmp_path, "resume")] == [15]


def test_a_run_started_over_in_its_directory_supersedes_all_steps(tmp_path: Path, open_monitor: Open) -> None:
    """Killed before the first checkpoint: nothing to resume from, but the metrics are there."""
    first = open_monitor()
    first.train_step(0, 3.0, 1e-3, None, 0)
    first.close()
    second = open_monitor()
    second.train_step(0, 2.0, 1e-3, None, 0)
    second.close()
    assert [event["loss"] for event in events(tmp_path, "train")] == [2.0]


def test_a_full_disk_is_said_once_and_stops_nothing(
    tmp_path: Path, open_monitor: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.symlink_to("/dev/full")
    monitor = open_monitor()
    (log,) = (tmp_path / "logs").iterdir()
    handler = next(h for h in logging.getLogger("pico-train").handlers if isinstance(h, logging.FileHandler))
    handler.stream.close()
    handler.stream = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    for step in range(41):
        monitor.train_step(step, 1.0, 1e-3, None, 0)
    monitor.close()
    output = capsys.readouterr()
    assert output.out.count(f"{metrics}: [Errno 28] No space left on device") == 1
    assert output.out.count(f"{log.parent}: [Errno 28] No space left on device") == 1
    # the start and 5 reports; 5 reports of 5 lines, and the attempt to write the rest on closing
    assert f"writes that failed: 6 to {metrics}, 26 to log file in {log.parent}" in output.out
    assert "step 40: loss 1.0000" in output.out
    assert "Traceback" not in output.err


@pytest.mark.parametrize("mode", ["plain", "bar", "off"])
def test_progress_modes(mode: str, config: Config, open_monitor: Open, capsys: pytest.CaptureFixture[str]) -> None:
    config.monitoring.progress = mode
    with open_monitor() as monitor:
        for step in range(11):
            monitor.train_step(step, 1.0, 1e-3, None, 0)
        monitor.info("said")
    output = capsys.readouterr()
    assert ("step 10: loss 1.0000, lr 1.00e-03" in output.out) == (mode == "plain")
    assert ("11/100" in output.err) == (mode == "bar")
    assert ("MFU: percent of the vendor's dense bf16 peak" in output.out) == (mode != "off")
    assert "said\n" in output.out


def test_log_level_of_the_configuration(
    tmp_path: Path, config: Config, open_monitor: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    config.monitoring.logging.log_level = "WARNING"
    with open_monitor() as monitor:
        monitor.info("quiet")
        monitor.warning("loud")
    assert "quiet" not in log_text(tmp_path) + capsys.readouterr().out
    assert "loud" in log_text(tmp_path)


def test_logs_tells_the_steps_that_are_reported(tmp_path: Path, open_monitor: Open) -> None:
    monitor = open_monitor()
    assert [step for step in range(25) if monitor.logs(step)] == [0, 10, 20]


def test_a_directory_that_cannot_be_written_is_an_early_error(tmp_path: Path, open_monitor: Open) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_monitor(logs_dir=tmp_path / "file" / "logs")
    assert not logging.getLogger("pico-train").handlers


def test_metrics_file_is_strict_json_throughout(tmp_path: Path, open_monitor: Open) -> None:
    with open_monitor() as monitor:
        monitor.train_step(0, math.nan, 0.0, math.inf, 1)
        monitor.evaluation(1, {"paloma": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    entries = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert {"train", "eval"} <= {entry["event"] for entry in entries}
