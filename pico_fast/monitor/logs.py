"""pico-train's log: its logger, file name, line format and metric lines, and reading them back.

People parse these files by regular expression (pico-train's forks draw their dashboards from them), so the lines of
:func:`train_lines` and :func:`evaluation_lines` must stay as pico-train writes them, and nothing may come between them.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pico_fast.env import SecretFilter
from pico_fast.monitor.console import Console

LOGGER_NAME = "pico-train"
_FORMAT, _DATE_FORMAT = "%(asctime)s - %(name)s - %(levelname)s - %(message)s", "%Y-%m-%d %H:%M:%S"


def train_lines(step: int, loss: float, learning_rate: float, nonfinite: int) -> list[str]:
    """pico-train's block for one logged step; ``nonfinite`` is the count since the block before."""
    return [
        f"Step {step} -- 🔄 Training Metrics",
        f"├── Loss: {loss:.4f}",
        f"├── Learning Rate: {learning_rate:.2e}",
        f"└── Inf/NaN count: {nonfinite}",
    ]


def evaluation_lines(step: int, results: Mapping[str, float]) -> list[str]:
    """pico-train's block for one evaluation."""
    names = list(results)
    return [
        f"Step {step} -- 📊 Evaluation Results",
        *(f"{'└──' if name == names[-1] else '├──'} {name}: {results[name]}" for name in names),
    ]


class _LogFile(logging.FileHandler):
    """A file handler whose write errors are reported, not printed with a traceback for every record."""

    def __init__(self, path: Path, on_error: Callable[[OSError], None]):
        super().__init__(path, encoding="utf-8")
        self._on_error = on_error

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._on_error(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # what was still buffered does not fit either
            self._on_error(error)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        prefix = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        self._console.line(prefix + self.format(record))


class RunLog:
    """Connects the ``pico-train`` logger to a new file in ``logs_dir`` and to the console until :meth:`close`.

    Any module may use ``logging.getLogger("pico-train")``. Secrets are redacted. Raises OSError if the file cannot be
    made.
    """

    def __init__(self, logs_dir: Path, level: str, console: Console, on_error: Callable[[OSError], None]):
        logs_dir.mkdir(parents=True, exist_ok=True)
        self.path = logs_dir / f"log_{datetime.now():%Y%m%d_%H%M%S}.log"
        file_handler = _LogFile(self.path, on_error)
        file_handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
        self.logger = logging.getLogger(LOGGER_NAME)
        self._before = (self.logger.level, self.logger.propagate)
        self.logger.setLevel(level)
        self.logger.propagate = False  # a root handler of another library would print every line twice
        self._handlers: list[logging.Handler] = [file_handler, _ConsoleHandler(console)]
        for handler in self._handlers:
            handler.addFilter(SecretFilter())
            self.logger.addHandler(handler)

    def file_lines(self, lines: Iterable[str]) -> None:
        """Write ``lines`` to the file, not to the console."""
        for line in lines:
            self.logger.info(line, extra={"file_only": True})

    def close(self) -> None:
        """Disconnect; a second call does nothing."""
        for handler in self._handlers:
            self.logger.removeHandler(handler)
            handler.close()
        if self._handlers:
            self.logger.setLevel(self._before[0])
            self.logger.propagate = self._before[1]
        self._handlers = []


_ANY = re.compile(r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) - pico-train - ")
_PREFIX = _ANY.pattern + "INFO - "
_HEADER = re.compile(_PREFIX + r"Step (?P<step>\d+) -- (?P<kind>🔄 Training Metrics|📊 Evaluation Results)$")
_BRANCH = re.compile(_PREFIX + r"[├└]── (?P<name>[^:]+): (?P<value>\S+)$")
_NAMES = {"Loss": "loss", "Learning Rate": "lr", "Inf/NaN count": "nonfinite"}


def read_logs(logs_dir: Path) -> list[dict[str, Any]]:
    """The ``start``, ``train`` and ``eval`` events in pico-train's log files, like those of a metrics file.

    Files are read in the order of their names, which is that of time. Of several entries for one step the last counts:
    pico-train says nowhere that it resumed. ``time`` is in seconds since the epoch, by the local clock.
    """
    starts: list[dict[str, Any]] = []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(logs_dir.glob("*.log")):
        entry: dict[str, Any] | None = None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and (first := _ANY.match(lines[0])):
            starts.append({"event": "start", "time": _seconds(first["time"])})
        for line in lines:
            if header := _HEADER.match(line):
                event = "train" if "Training" in header["kind"] else "eval"
                entry = {"event": event, "step": int(header["step"]), "time": _seconds(header["time"])}
                found[event, entry["step"]] = entry
            elif entry is not None and (branch := _BRANCH.match(line)):
                try:
                    entry[_NAMES.get(branch["name"], branch["name"])] = float(branch["value"])
                except ValueError:
                    entry = None
            else:
                entry = None
    return starts + sorted(found.values(), key=lambda e: (e["step"], e["event"]))


def _seconds(moment: str) -> float:
    return datetime.strptime(moment, _DATE_FORMAT).timestamp()
