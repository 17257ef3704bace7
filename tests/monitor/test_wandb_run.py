import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pico_fast.config import Config
from pico_fast.monitor import MonitorError
from pico_fast.monitor.wandb_run import WandbRun


class AuthenticationError(Exception):
    pass


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        if self.error:
            raise self.error
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    """The part of wandb 0.31 that is used, without its service process."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(AuthenticationError=AuthenticationError)
        self.calls: list[dict[str, Any]] = []
        self.run = FakeRun()
        self.fail: Callable[[dict[str, Any]], None] = lambda arguments: None
        self.torn_down = 0

    def Settings(self, **values: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(base_url="https://wandb.example", **values)

    def init(self, **arguments: Any) -> FakeRun:
        self.calls.append(arguments)
        self.fail(arguments)
        return self.run

    def teardown(self) -> None:
        self.torn_down += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return fake


def start(folder: Path, mode: str = "online", **settings: Any) -> tuple[WandbRun, list[BaseException], list[str]]:
    config = Config()
    config.monitoring.wandb.mode = mode
    for name, value in settings.items():
        setattr(config.monitoring.wandb, name, value)
    config.data.dataset.name = "https://user:" + "k" * 40 + "@host/data"
    errors: list[BaseException] = []
    said: list[str] = []
    run = WandbRun(
        config, run_dir=folder / "my-run", id_file=folder / "wandb_id", on_error=errors.append, say=said.append
    )
    return run, errors, said


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MonitorError, match=r"needs the package wandb.*pip install 'pico-fast\[wandb\]'"):
        start(tmp_path)


def test_missing_key_is_an_early_error_online_only(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(MonitorError, match=r"needs WANDB_API_KEY.*mode: offline"):
        start(tmp_path)
    start(tmp_path, "offline")
    assert [call["mode"] for call in wandb.calls] == ["offline"]


def test_the_key_of_wandb_login_is_enough(wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine wandb.example login user password {'k' * 40}\n")
    netrc.chmod(0o600)
    start(tmp_path)
    assert len(wandb.calls) == 1


def test_a_refused_key_is_an_early_error(wandb: FakeWandb, tmp_path: Path) -> None:
    def refuse(arguments: dict[str, Any]) -> None:
        raise AuthenticationError(f"bad key {'k' * 40}")

    wandb.fail = refuse
    with pytest.raises(MonitorError, match=r"WANDB_API_KEY is refused \(bad key \*\*\*\)"):
        start(tmp_path)


def test_a_resumed_run_continues_under_its_id(wandb: FakeWandb, tmp_path: Path) -> None:
    start(tmp_path)
    start(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    start(tmp_path / "elsewhere")
    ids = [call["id"] for call in wandb.calls]
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text().strip()
    assert ids[2] != ids[0]
    assert all(call["resume"] == "allow" for call in wandb.calls)


def test_project_name_and_configuration_without_secrets(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "of-the-environment")
    start(tmp_path)
    start(tmp_path, project="of-the-config", entity="lab")
    assert [call["project"] for call in wandb.calls] == ["pico-fast", "of-the-environment", "of-the-config"]
    assert [call["entity"] for call in wandb.calls] == [None, None, "lab"]
    assert wandb.calls[0]["name"] == "my-run"
    assert wandb.calls[0]["config"]["data"]["dataset"]["name"] == "https://user:***@host/data"
    assert wandb.calls[0]["config"]["model"]["d_model"] == 768


def test_steps_are_a_metric_so_that_a_resume_may_go_back(wandb: FakeWandb, tmp_path: Path) -> None:
    run, errors, _ = start(tmp_path)
    run.log(10, {"train/loss": 2.5, "perf/mfu": None})
    run.log(5, {"eval/paloma": 3.0})
    run.finish()
    assert wandb.run.logged == [
        {"train/loss": 2.5, "trainer/global_step": 10},
        {"eval/paloma": 3.0, "trainer/global_step": 5},
    ]
    assert ("*", "trainer/global_step") in wandb.run.axes
    assert wandb.run.finished
    assert errors == []


def test_without_network_it_goes_on_offline(wandb: FakeWandb, tmp_path: Path) -> None:
    def unreachable(arguments: dict[str, Any]) -> None:
        if arguments["mode"] == "online":
            raise ConnectionError("no such host")
        assert wandb.torn_down == 1  # else wandb says that the run id is in use

    wandb.fail = unreachable
    run, errors, said = start(tmp_path)
    run.log(1, {"train/loss": 1.0})
    assert [call["mode"] for call in wandb.calls] == ["online", "offline"]
    assert wandb.calls[0]["id"] == wandb.calls[1]["id"]
    assert len(wandb.run.logged) == 1
    assert "no such host" in said[0]
    assert "wandb sync" in said[0]
    assert errors == []


def test_when_nothing_works_it_goes_on_without(wandb: FakeWandb, tmp_path: Path) -> None:
    def broken(arguments: dict[str, Any]) -> None:
        raise ConnectionError("broken")

    wandb.fail = broken
    run, errors, _ = start(tmp_path)
    run.log(1, {"train/loss": 1.0})
    run.finish()
    assert [str(error) for error in errors] == ["broken"]


def test_a_connection_lost_while_training_is_only_counted(wandb: FakeWandb, tmp_path: Path) -> None:
    run, errors, _ = start(tmp_path)
    wandb.run.error = ConnectionError("gone")
    run.log(1, {"train/loss": 1.0})
    run.log(2, {"train/loss": 1.0})
    assert [str(error) for error in errors] == ["gone", "gone"]


def test_the_real_package_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="an optional dependency; the tests' own dependencies bring it")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "my-run").mkdir()
    for step in (1, 0):
        run, errors, said = start(tmp_path, "offline")
        run.log(step, {"train/loss": 1.0})
        run.finish()
        assert (errors, said) == ([], [])
    run_id = (tmp_path / "wandb_id").read_text().strip()
    files = [path for path in (tmp_path / "my-run").rglob("*") if path.is_file()]
    assert [path.name for path in files].count(f"run-{run_id}.wandb") >= 1
    assert not [path for path in files if b"k" * 40 in path.read_bytes()]
