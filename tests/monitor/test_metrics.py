import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_fast.monitor.metrics import MetricsError, MetricsFile, read_metrics


def fail(error: OSError) -> None:
    raise AssertionError(error)


def write(path: Path, *events: tuple[str, dict]) -> None:
    file = MetricsFile(path, fail)
    for event, fields in events:
        file.write(event, fields)
    file.close()


def train(step: int, loss: float = 1.0) -> tuple[str, dict]:
    return "train", {"step": step, "loss": loss}


def steps(path: Path, event: str) -> list[int]:
    return [entry["step"] for entry in read_metrics(path) if entry["event"] == event]


def test_lines_are_strict_json_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("train", {"step": 1, "loss": math.nan, "more": {"a": [math.inf, 2.5]}, "text": "é"}))
    line = path.read_text(encoding="utf-8")
    assert line == '{"event": "train", "step": 1, "loss": null, "more": {"a": [null, 2.5]}, "text": "é"}\n'
    assert read_metrics(path) == [json.loads(line, parse_constant=fail)]


def test_every_line_is_there_before_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, fail)
    file.write(*train(0))
    assert steps(path, "train") == [0]
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.write(*train(1))


def test_resume_supersedes_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = [train(step, loss=1.0) for step in range(6)]
    write(
        path,
        ("start", {"step": 0}),
        ("eval", {"step": 0}),
        *before,
        ("checkpoint", {"step": 4}),
        ("eval", {"step": 4}),
        ("eval", {"step": 6}),
    )
    write(path, ("resume", {"step": 4}), ("start", {"step": 4}), train(4, loss=2.0))
    entries = read_metrics(path)
    assert [(e["step"], e["loss"]) for e in entries if e["event"] == "train"] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
    ]
    assert steps(path, "eval") == [0, 4]
    assert steps(path, "checkpoint") == [4]
    assert steps(path, "start") == [0, 4]


@given(cut=st.integers(min_value=0), resume=st.integers(0, 5))
def test_a_kill_at_any_byte_loses_at_most_the_last_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, resume: int
) -> None:
    path = tmp_path_factory.mktemp("kill") / "metrics.jsonl"
    write(path, *(train(step, loss=1 / (step + 1)) for step in range(5)))
    whole = path.read_bytes()
    cut %= len(whole) + 1
    path.write_bytes(whole[:cut])
    # A whole last line without its newline counts.
    expected = sum(cut >= end for end in (i for i, byte in enumerate(whole) if byte == ord("\n")))
    assert steps(path, "train") == list(range(expected))
    write(path, ("resume", {"step": resume}), train(resume))
    assert steps(path, "train") == [*range(min(expected, resume)), resume]


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(0), train(1))
    path.write_text(path.read_text().replace('{"event": "train", "step": 0', "{", 1))
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 1: not an event"):
        read_metrics(path)


@pytest.mark.parametrize("line", ["[1, 2]", '{"step": 3}', "3"])
def test_json_that_is_no_event_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + '\n{"event": "train", "step": 1}\n')
    with pytest.raises(MetricsError, match="line 1"):
        read_metrics(path)


def test_full_disk_is_reported_for_each_event_and_never_raised(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    errors: list[OSError] = []
    file = MetricsFile(path, errors.append)
    file.write(*train(0))
    file.write(*train(1))
    file.close()
    assert [error.strerror for error in errors] == ["No space left on device"] * 2


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    errors: list[OSError] = []
    file = MetricsFile(path, errors.append)
    file.write(*train(0))
    import os

    real, calls = os.write, 0

    def short_write(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(descriptor, data[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", short_write)
    file.write(*train(1))
    monkeypatch.setattr(os, "write", real)
    file.write(*train(2))
    file.close()
    assert len(errors) == 1
    assert steps(path, "train") == [0, 2]
