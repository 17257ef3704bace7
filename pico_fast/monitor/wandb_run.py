"""A Weights & Biases run that a resumed training continues, and that can never stop a training."""

from __future__ import annotations

import dataclasses
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pico_fast.config import Config
from pico_fast.env import redact
from pico_fast.monitor.errors import MonitorError

_DEFAULT_PROJECT = "pico-fast"


def _has_key(service_url: str) -> bool:
    """Whether Weights & Biases will find a key: in the environment, or where ``wandb login`` writes it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(service_url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    """The id in ``path``; a new one is written there first, so that it outlives a kill during start-up."""
    if path.exists():
        run_id = path.read_text(encoding="utf-8").strip()
        if run_id:
            return run_id
    run_id = secrets.token_hex(4)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(run_id + "\n", encoding="utf-8")
    temporary.replace(path)
    return run_id


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return value


class WandbRun:
    """Logs to the run whose id is in ``id_file``, resumed if it exists; the step axis is ``trainer/global_step``.

    Steps are logged as a metric, as pico-train does, not as W&B's own step, which refuses to go back when a run resumes
    from an earlier checkpoint. Raises MonitorError if the package or, in mode ``online``, a valid key is missing. If
    the service cannot be reached the run goes on offline; every failure after that goes to ``on_error``.
    """

    def __init__(
        self,
        config: Config,
        *,
        run_dir: Path,
        id_file: Path,
        on_error: Callable[[BaseException], None],
        say: Callable[[str], None],
    ):
        try:
            import wandb
        except ImportError:
            raise MonitorError(
                "monitoring.save_to_wandb: true needs the package wandb, which is not installed; "
                "run pip install 'pico-fast[wandb]' or set it to false"
            ) from None
        self._on_error = on_error
        self._run: Any = None
        settings = config.monitoring.wandb
        service_url = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
        if settings.mode == "online" and not _has_key(service_url):
            raise MonitorError(
                "monitoring.wandb.mode: online needs WANDB_API_KEY in the environment or in .env, which is not set; "
                "set it, or use `mode: offline` and `wandb sync` later"
            )
        arguments: dict[str, Any] = {
            "mode": settings.mode,
            "project": settings.project or os.environ.get("WANDB_PROJECT") or _DEFAULT_PROJECT,
            "entity": settings.entity or None,
            "id": _run_id(id_file),
            "name": run_dir.name,
            "resume": "allow",
            "dir": str(run_dir),
            "config": _redacted(dataclasses.asdict(config)),
            "settings": wandb.Settings(console="off"),  # it would record every redraw of the bar
        }
        try:
            self._run = wandb.init(**arguments)
        except wandb.errors.AuthenticationError as error:
            raise MonitorError(
                f"monitoring.wandb: WANDB_API_KEY is refused ({redact(str(error))}); correct it, or use `mode: offline`"
            ) from None
        except Exception as error:  # whatever the network does must not stop the training
            if settings.mode != "online":
                raise MonitorError(f"monitoring.wandb: {redact(str(error))}; or set save_to_wandb: false") from None
            say(f"Weights & Biases cannot be reached ({error}); this run is logged offline, `wandb sync` uploads it")
            self._attempt(wandb.teardown)  # its service still holds the id of the run that did not start
            self._attempt(lambda: setattr(self, "_run", wandb.init(**{**arguments, "mode": "offline"})))
        if self._run is None:
            return
        self._attempt(self._run.define_metric, "trainer/global_step")
        self._attempt(self._run.define_metric, "*", step_metric="trainer/global_step")

    def _attempt(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        try:
            call(*arguments, **keywords)
        except Exception as error:  # a lost connection, a full disk, a service that changed: all the same here
            self._on_error(error)

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Log ``values`` at ``step``; None is left out."""
        if self._run is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        self._attempt(self._run.log, {**known, "trainer/global_step": step})

    def finish(self) -> None:
        """Upload what is left and end the run."""
        if self._run is not None:
            self._attempt(self._run.finish)
