"""``python -m benchmarks.loss_cpu``: who is timed, what is printed, what the exit code says."""

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import loss_cpu

SMALL = ["--tokens", "16", "--width", "8", "--rounds", "1", "--threads", "1", "--no-memory"]


def test_what_is_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {name: loss_cpu.contestants()[name] for name in ("torch", "reference", "plain")}
    losses["doubled"] = lambda *inputs: 2 * losses["plain"](*inputs)
    losses["not a number"] = lambda *inputs: math.nan * losses["plain"](*inputs)
    monkeypatch.setattr(loss_cpu, "contestants", lambda: losses)
    monkeypatch.setattr(loss_cpu, "VOCAB", 300)
    file = tmp_path / "loss.json"
    loss_cpu.main([*SMALL, "--dtype", "float32", "bfloat16", "--json", str(file)])
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["dtype"] for entry in entries] == ["float32", "bfloat16"]
    for entry in entries:
        wrong = {name for name, seconds in entry["seconds"].items() if math.isnan(seconds)}
        assert wrong == {"doubled", "not a number"}
        assert all(seconds > 0 for name, seconds in entry["seconds"].items() if name not in wrong)
    for row in capsys.readouterr().out.splitlines()[-2:]:
        assert row.endswith("| wrong | wrong |")
        assert "(1.00)" in row


@pytest.mark.parametrize(("opponent", "code"), [(0.9, 1), (1.1, 0), (math.nan, 0)])
def test_a_faster_opponent_is_a_failure(opponent: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_cpu, "times", lambda *_: {"torch": 1.0, "plain": opponent})
    assert loss_cpu.main([*SMALL, "--losses", "plain"]) == code


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset through /proc")
def test_the_peak_of_plain_holds_the_logits_and_ours_does_not() -> None:
    # In processes of their own: in this one they may fit into what earlier tests freed.
    plain, ours = (loss_cpu._apart(name, 512, 8, "float32", 1) for name in ("plain", "torch"))
    logits = 512 * loss_cpu.VOCAB * 4
    assert plain >= logits > ours > 0
