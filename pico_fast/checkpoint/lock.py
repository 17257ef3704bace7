"""One run per directory, by an advisory lock that the kernel releases when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from types import TracebackType

from pico_fast.checkpoint.layout import RunLayout


class RunLockedError(Exception):
    """Another process runs in this directory; ``pid``, ``host``, ``since`` are its own account (None if unreadable)."""

    def __init__(self, message: str, *, pid: int | None, host: str | None, since: str | None):
        super().__init__(message)
        self.pid = pid
        self.host = host
        self.since = since


class RunLock:
    """Holds the run directory of ``layout`` as a context manager; ``acquire`` and ``release`` do the same by hand.

    The lock is ``flock(2)`` on ``<root>/.lock``, which holds pid, host and start time as JSON. The file stays when
    the run ends: removing it would let two runs lock two different files of that name.
    """

    def __init__(self, layout: RunLayout):
        self.path = layout.lock
        self._fd: int | None = None

    def acquire(self) -> RunLock:
        """Lock the directory, which is made if missing. Raises RunLockedError if another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(timezone.utc).isoformat()}
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(owner).encode() + b"\n", 0)
        except BaseException as error:
            refusal = self._refusal(fd) if isinstance(error, BlockingIOError) else None
            os.close(fd)
            if refusal is not None:
                raise refusal from None
            if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                error.filename = (
                    f"{self.path} (this file system has no locks; put checkpointing.runs_dir on one that has)"
                )
            raise
        self._fd = fd
        # A forked child (data loader workers) shares the lock: without this it would outlive a killed parent.
        os.register_at_fork(after_in_child=self._forget)
        return self

    def release(self) -> None:
        """Give the directory free. Does nothing if it is not held."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _refusal(self, fd: int) -> RunLockedError:
        try:
            owner = json.loads(os.pread(fd, 4096, 0))
            pid, host, since = int(owner["pid"]), str(owner["host"]), str(owner["since"])
        except (OSError, ValueError, KeyError, TypeError):
            pid, host, since = None, None, None  # the other process has not written them yet
        by = f"process {pid} on host {host} since {since}" if pid is not None else "another process"
        return RunLockedError(
            f"{self.path.parent}: in use by {by}; wait for it, stop it, or give another checkpointing.run_name",
            pid=pid,
            host=host,
            since=since,
        )

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
