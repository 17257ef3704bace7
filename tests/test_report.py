import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pico_fast.monitor.logs import evaluation_lines, train_lines
from pico_fast.report import ReportError, main, plot_loss, summarise, summary_lines


def write_metrics(run: Path, *events: dict[str, Any], tail: str = "") -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"time": 1000.0 + 10 * index, **event}) + "\n" for index, event in enumerate(events)]
    (run / "metrics.jsonl").write_text("".join(lines) + tail)


def train(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"event": "train", "step": step, "loss": loss, "tokens": (step + 1) * 100, "tokens_per_second": 50.0, **more}


def evaluation(step: int, paloma: float, weighted: float) -> dict[str, Any]:
    return {"event": "eval", "step": step, "paloma": paloma, "paloma_token_weighted": weighted}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 20 steps that was resumed once, a minute after it had stopped."""
    run = tmp_path / "runs" / "demo"
    write_metrics(
        run,
        {"event": "start", "step": 0},
        evaluation(0, 60000.0, 50000.0),
        train(0, 11.0),
        train(10, 9.0, nonfinite=2),
        {"event": "resume", "step": 8, "time": 1100.0},
        {"event": "start", "step": 8, "time": 1100.0},
        train(10, 8.5, time=1110.0, nonfinite=1),
        train(19, 7.0, time=1120.0),
        evaluation(20, 1500.0, 1250.0) | {"time": 1130.0},
    )
    (run / "checkpoints" / "step_20" / "state").mkdir(parents=True)
    (run / "checkpoints" / "latest").symlink_to("step_20")
    return run


def test_summary_of_a_finished_run(run: Path) -> None:
    summary = summarise(run)
    assert summary.name == "demo"
    assert summary.losses == [(0, 11.0), (10, 8.5), (19, 7.0)]
    assert summary.perplexity("paloma") == (60000.0, 1500.0)
    assert summary.perplexity("paloma_token_weighted") == (50000.0, 1250.0)
    assert summary.tokens == 2000
    assert summary.tokens_per_second == 50.0
    assert summary.nonfinite == 1
    # 20 s before the resume (the event at 30 s is superseded) and 30 s after it; nobody worked in the time between
    assert summary.seconds == pytest.approx(50)
    assert summary.latest_checkpoint == run / "checkpoints" / "step_20"


def test_lines_tell_what_and_where(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    text = "\n".join(summary_lines(summarise(run), png=run / "loss.png", sample="def main():\n    return 1"))
    for piece in (
        "Run demo",
        "mean of documents: 60,000 before, 1,500 after (40 times lower)",
        "over all tokens: 50,000 before, 1,250 after (40 times lower)",
        "training loss: 7.0000 at step 19",
        "tokens seen: 2,000",
        "time: 0:50, 50 tokens/s",
        "NaN or infinite: 1",
        "checkpoint: runs/demo/checkpoints/step_20",
        "metrics: runs/demo/metrics.jsonl",
        "loss curve: runs/demo/loss.png",
        "| def main():\n    |     return 1",
    ):
        assert piece in text, piece


def test_a_run_that_is_still_going_on(tmp_path: Path) -> None:
    run = tmp_path / "live"
    write_metrics(
        run, {"event": "start", "step": 0}, evaluation(0, 60000.0, 50000.0), train(0, 11.0), tail='{"event": "tra'
    )
    summary = summarise(run)
    assert summary.perplexity("paloma") == (60000.0, None)
    assert "60,000 (one evaluation so far)" in "\n".join(summary_lines(summary))
    assert plot_loss(summary, tmp_path / "loss.png").stat().st_size > 5000


def test_evaluation_files_fill_in_but_not_beyond_the_present(run: Path) -> None:
    folder = run / "eval_results"
    folder.mkdir()
    (folder / "step_10.json").write_text('{"paloma": 9000.0, "paloma_token_weighted": 8000.0, "documents": 3}')
    (folder / "step_500.json").write_text('{"paloma": 1.0}')  # of a longer run that a resume has undone
    (folder / "step_15.json").write_text('{"palo')  # being written
    assert sorted(summarise(run).evaluations) == [0, 10, 20]


def test_a_run_directory_of_pico_train(tmp_path: Path) -> None:
    run = tmp_path / "pico"
    (run / "logs").mkdir(parents=True)
    lines = [
        "✨ Training Configuration",
        *train_lines(0, 11.0131, 0.0, 0),
        *train_lines(100, 9.5, 1e-4, 1),
        *evaluation_lines(200, {"paloma": 850.5}),
    ]
    (run / "logs" / "log_20260102_030405.log").write_text(
        "".join(f"2026-01-02 03:04:{10 + i} - pico-train - INFO - {line}\n" for i, line in enumerate(lines)),
        encoding="utf-8",
    )
    (run / "eval_results").mkdir()
    (run / "eval_results" / "step_0.json").write_text('{"paloma": 59435.0}')
    summary = summarise(run)
    assert summary.losses == [(0, 11.0131), (100, 9.5)]
    assert summary.perplexity("paloma") == (59435.0, 850.5)
    assert summary.metrics is None
    assert summary.tokens is None
    assert summary.seconds == pytest.approx(9)
    text = "\n".join(summary_lines(summary))
    assert "training loss: 9.5000 at step 100" in text
    assert "metrics" not in text
    assert plot_loss(summary, tmp_path / "loss.png").is_file()


def test_folder_names_of_the_runs_own_configuration(run: Path) -> None:
    (run / "eval_results_here").mkdir()
    (run / "eval_results_here" / "step_10.json").write_text('{"paloma": 9000.0}')
    (run / "training_config.yaml").write_text("checkpointing: {evaluation: {eval_results_dir: eval_results_here}}\n")
    assert 10 in summarise(run).evaluations
    (run / "training_config.yaml").write_text("checkpointing: {of_another_version: 1}\n")
    assert 10 not in summarise(run).evaluations


@pytest.mark.parametrize("content", [None, "", '{"event": "start", "step": 0, "time": 1.0}\n'])
def test_nothing_to_report_is_exit_code_2(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "empty"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    assert main([str(run)]) == 2
    message = capsys.readouterr().err
    assert f"{run}: nothing to report yet; looked for" in message
    assert not (run / "loss.png").exists()


def test_other_mistakes_are_exit_code_2(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such run directory" in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path / "missing" / "loss.png")]) == 2
    assert "--out" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('garbage\n{"event": "train", "step": 0}\n')
    with pytest.raises(ReportError, match="line 1"):
        summarise(run)


def test_losses_that_are_null_are_left_out_of_the_curve(tmp_path: Path) -> None:
    run = tmp_path / "nan"
    write_metrics(run, train(0, None, nonfinite=3), train(10, 5.0), evaluation(11, math.inf, math.nan))
    summary = summarise(run)
    assert summary.losses == [(10, 5.0)]
    assert plot_loss(summary, tmp_path / "loss.png").is_file()


def test_command(run: Path) -> None:
    """The real command: exit code 0, a PNG of the announced size, and no window system needed."""
    result = subprocess.run(
        [sys.executable, "-m", "pico_fast.report", str(run)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "40 times lower" in result.stdout
    header = (run / "loss.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1200, 720)


def test_a_perplexity_that_rose_is_called_higher(tmp_path: Path) -> None:
    run = tmp_path / "worse"
    write_metrics(run, evaluation(0, 100.0, 50.0), train(0, 5.0), evaluation(1, 250.0, 50.0))
    text = "\n".join(summary_lines(summarise(run)))
    assert "100 before, 250 after (2.5 times higher)" in text
    assert "50 before, 50 after (1 times lower)" in text
