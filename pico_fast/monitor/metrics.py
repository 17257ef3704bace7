"""``metrics.jsonl``: one strict JSON object per line, only ever appended to.

Events: ``start`` (a process began), ``train``, ``eval``, ``checkpoint``, and ``resume`` at step N: training goes on
from the state with N updates applied, so what an earlier process wrote beyond that state no longer counts (see
:func:`read_metrics`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class MetricsError(Exception):
    """A line of a metrics file is not what this program writes."""


def _strict(value: Any) -> Any:
    """``value`` for strict JSON: NaN and the infinities become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


class MetricsFile:
    """Appends events to ``path``; each line reaches the operating system before :meth:`write` returns.

    Raises OSError if the file cannot be opened. Later failures (a full disk) go to ``on_error``: the event is lost and
    counted there, and what was half written of it is taken back.
    """

    def __init__(self, path: Path, on_error: Callable[[OSError], None]):
        self._on_error = on_error
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._descriptor).st_size
        self.was_empty = size == 0
        # A killed process leaves a torn last line; the next event must not continue it.
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def write(self, event: str, fields: Mapping[str, Any]) -> None:
        """Append ``{"event": event, **fields}``; a NaN or infinity is written as null."""
        if self._descriptor is None:
            raise ValueError("the metrics file is closed")
        text = json.dumps(_strict({"event": event, **fields}), allow_nan=False, ensure_ascii=False)
        line = ("\n" if self._torn else "").encode() + text.encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            self._torn = self._torn or written > 0
            if written:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                    self._torn = line.startswith(b"\n")
            self._on_error(error)
        else:
            self._torn = False

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError as error:
                self._on_error(error)


def _event(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("event"), str) else None


def _parse(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    torn: int | None = None  # number of a line that is no event; allowed only where a process ended
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            entry = _event(line)
            if torn is not None and (entry is None or entry["event"] not in ("start", "resume")):
                raise MetricsError(
                    f"{path}, line {torn}: not an event, and not where a process ended; remove this line"
                )
            torn = number if entry is None else None
            if entry is not None:
                found.append(entry)
    return found


def _superseded(entry: Mapping[str, Any], step: int) -> bool:
    """Whether resuming from the state with ``step`` updates applied undoes what ``entry`` tells of."""
    if "step" not in entry or entry["event"] in ("start", "resume"):
        return False
    # A train entry bears the index of its update before it is applied; the others the number of updates applied.
    return bool(entry["step"] >= step if entry["event"] == "train" else entry["step"] > step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The events of a metrics file that still count, in file order.

    A ``resume`` at step N supersedes the earlier ``train`` entries with step >= N and other entries with step > N: the
    evaluation and the checkpoint of the state that was resumed from stay. A torn line where a process ended is left
    out. Raises OSError, and MetricsError that names the line for anything else that is not an event.
    """
    kept: list[dict[str, Any]] = []
    for entry in _parse(Path(path)):
        if entry["event"] == "resume":
            kept = [earlier for earlier in kept if not _superseded(earlier, entry["step"])]
        kept.append(entry)
    return kept
