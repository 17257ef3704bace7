"""``python -m benchmarks`` on a CPU: which failures count, and that later steps run all the same."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

command = importlib.import_module("benchmarks.__main__")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it runs benchmarks.gpu")


def module(folder: Path, name: str, exit_code: int, result: Path | None) -> list[str]:
    """A module that leaves a JSON, or none, and exits."""
    write = f"open({str(result)!r}, 'w').write('{{}}')\n" if result else ""
    (folder / f"{name}.py").write_text(f"import sys\n{write}sys.exit({exit_code})\n")
    return [name]


def test_a_missed_goal_is_a_result_and_a_crash_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    goal_missed = {"Data loader": (module(tmp_path, "below_goal", 1, a), a)}
    fine = {"Training step": (module(tmp_path, "fine_step", 0, b), b)}
    monkeypatch.setattr(command, "cpu_steps", lambda out: goal_missed | fine)
    assert command.main(["--out", str(tmp_path)]) == 0
    b.unlink()
    crashed = {"Data loader": (module(tmp_path, "crashing", 1, None), tmp_path / "none.json")}
    monkeypatch.setattr(command, "cpu_steps", lambda out: crashed | fine)
    assert command.main(["--out", str(tmp_path)]) == 1
    assert b.exists()
    assert "failed: Data loader" in capsys.readouterr().out


def test_every_step_names_a_module_that_exists(tmp_path: Path) -> None:
    for arguments, result in command.cpu_steps(tmp_path).values():
        assert importlib.util.find_spec(arguments[0]) is not None
        assert result.parent == tmp_path
