from pathlib import Path

from pico_fast.monitor.logs import evaluation_lines, read_logs, train_lines

STAMP = "2026-01-02 03:04:{second:02} - pico-train - INFO - "


def write_log(folder: Path, name: str, lines: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(
        "".join(STAMP.format(second=i) + line + "\n" for i, line in enumerate(lines)), encoding="utf-8"
    )


def test_reads_what_it_writes(tmp_path: Path) -> None:
    write_log(
        tmp_path / "logs",
        "log_1.log",
        ["hello", *train_lines(10, 10.5479, 6.67e-4, 2), *evaluation_lines(20, {"paloma": 31483.05, "other": 2.5})],
    )
    start, train, evaluation = read_logs(tmp_path / "logs")
    assert start["event"] == "start"
    assert train["time"] - start["time"] == 1
    del train["time"], evaluation["time"]
    assert train == {"event": "train", "step": 10, "loss": 10.5479, "lr": 6.67e-4, "nonfinite": 2}
    assert evaluation == {"event": "eval", "step": 20, "paloma": 31483.05, "other": 2.5}


def test_the_later_of_two_files_counts(tmp_path: Path) -> None:
    for number, loss in ((1, 3.0), (2, 2.0)):
        write_log(tmp_path / "logs", f"log_{number}.log", train_lines(10, loss, 1e-3, 0))
    assert [event["loss"] for event in read_logs(tmp_path / "logs") if event["event"] == "train"] == [2.0]


def test_a_file_that_ends_within_a_block(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "log_1.log", train_lines(0, 3.0, 1e-3, 0)[:2])
    assert [event.get("loss") for event in read_logs(tmp_path / "logs")] == [None, 3.0]


def test_no_folder(tmp_path: Path) -> None:
    assert read_logs(tmp_path / "none") == []
