"""Errors of this package."""

from __future__ import annotations

import errno as errno_names
import os
import re
from pathlib import Path
from typing import Any


class CheckpointError(Exception):
    """A checkpoint cannot be written or read. ``path`` and ``errno`` tell where and why, where they are known.

    It can be pickled, as its subclasses can, to be raised by every rank.
    """

    def __init__(self, message: str, *, path: Path | None = None, errno: int | None = None):
        super().__init__(message)
        self.path = path
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), str(self), vars(self))


class NoSpaceError(CheckpointError):
    """The disk cannot hold the checkpoint: ``needed`` and ``free`` are bytes."""

    def __init__(self, message: str, *, path: Path, needed: int, free: int):
        super().__init__(message, path=path, errno=errno_names.ENOSPC)
        self.needed = needed
        self.free = free


class NoGoodCheckpointError(CheckpointError):
    """There are checkpoints, and not one of them can be resumed from. ``rejected``: (step, reason), newest first."""

    def __init__(self, message: str, *, rejected: list[tuple[int, str]]):
        super().__init__(message)
        self.rejected = rejected


def _restored(kind: type[CheckpointError], message: str, attributes: dict[str, Any]) -> CheckpointError:
    error = kind.__new__(kind, message)
    vars(error).update(attributes)
    return error


def errno_of(error: BaseException) -> int | None:
    """The system's error number behind ``error``, also if a Rust library (safetensors, tokenizers) put it in words."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def described(error: BaseException) -> str:
    """``error`` in words: ``No space left on device (ENOSPC)`` for a system error, else its class and message."""
    number = errno_of(error)
    if number is None:
        return f"{type(error).__name__}: {error}"
    return f"{os.strerror(number)} ({errno_names.errorcode.get(number, number)})"
