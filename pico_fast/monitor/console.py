"""Lines and the progress bar on the terminal; lines never tear the bar."""

from __future__ import annotations

import contextlib
import os
import sys

from tqdm import tqdm

from pico_fast.env import redact


class Console:
    """Lines on stdout and, in mode ``bar``, a live bar on stderr.

    ``mode`` is ``monitoring.progress``: ``bar``, ``plain`` (one line per logged step), ``off`` (neither), or ``auto``:
    ``bar`` if stderr is a terminal, else ``plain``. A terminal that went away is ignored: there is nobody left to tell.
    """

    def __init__(self, mode: str, *, total_steps: int, start_step: int):
        self.mode = ("bar" if sys.stderr.isatty() else "plain") if mode == "auto" else mode
        self._bar: tqdm | None = None
        if self.mode == "bar":
            width = _stderr_columns()
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=width > 0,
                ncols=None if width else 80,  # containers give terminals without a size; tqdm would show nothing
                nrows=None if width else 24,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                leave=True,
            )

    def line(self, text: str) -> None:
        """Print ``text``, with secrets redacted, above the bar if there is one."""
        text = redact(text)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        try:
            tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):
            pass

    def advance(self, steps_done: int, text: str) -> None:
        """Move the bar to ``steps_done`` and show ``text`` beside it."""
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(steps_done - self._bar.n)
            except (OSError, ValueError):
                self._bar = None

    def close(self) -> None:
        """End the bar; lines can still be printed."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with contextlib.suppress(OSError, ValueError):
                bar.close()


def _stderr_columns() -> int:
    """Columns of the terminal behind stderr; 0 if it does not know its size."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
        return size.columns if size.lines else 0
    except (OSError, ValueError):
        return 0


def duration(seconds: float) -> str:
    """Seconds as ``m:ss``, ``h:mm:ss`` or ``d d hh h``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(value: float) -> str:
    """A count in three or four digits: 950, 12.3k, 1.05M."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}" if value < 999.5 * scale else f"{value / scale:.0f}{unit}"
    return f"{value:.0f}"


def number(value: float) -> str:
    """A value for reading: 59,206, 123.45, 0.5."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def size(n_bytes: float) -> str:
    """Bytes in decimal units: 512 MB, 3.10 GB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
