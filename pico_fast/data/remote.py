"""Files of a remote file system, read so that an outage of about a minute does not end a run."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pico_fast.monitor.logs import LOGGER_NAME

WAITS_S = (4, 8, 16, 32)  # before the second to the fifth try; huggingface_hub repeats some requests by itself
_NETWORK_LIBRARIES = {"aiohttp", "botocore", "httpcore", "httpx", "httpx2", "requests", "urllib3"}
Result = TypeVar("Result")


def transient(error: Exception) -> bool:
    """Whether what raised ``error`` may succeed a little later.

    An HTTP status decides where there is one: time-outs, rate limits and server errors pass, the rest lasts. Without
    one, OSError and the exceptions of network libraries (httpx's are no OSError) pass, save a file that is not there
    or not allowed, and the hub's offline mode.
    """
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    ancestors = type(error).__mro__
    if any(ancestor.__name__ == "OfflineModeIsEnabled" for ancestor in ancestors):
        return False
    if isinstance(error, (OSError, asyncio.TimeoutError)):  # two different things in Python 3.10
        return True
    return any(ancestor.__module__.partition(".")[0] in _NETWORK_LIBRARIES for ancestor in ancestors)


def _status(error: Exception) -> int | None:
    """The HTTP status of requests, httpx and the hub (in ``response``), or of aiohttp (``status``)."""
    response = getattr(error, "response", None)
    found = (getattr(response, "status_code", None), getattr(error, "status", None))
    return next((status for status in found if isinstance(status, int)), None)


class RemoteFile(io.RawIOBase):
    """A binary file of an fsspec file system, whose failed reads are repeated.

    After a transient error the file is opened again and the read repeated, with a warning in the log, until the
    waits of ``WAITS_S`` are used up; the last error is raised then, any other error at once.

    Args:
        filesystem: an fsspec file system.
        path: as ``filesystem`` wants it.
        sleep: waits so many seconds.
    """

    def __init__(self, filesystem: Any, path: str, sleep: Callable[[float], object] = time.sleep):
        super().__init__()
        self._filesystem, self._path, self._sleep = filesystem, path, sleep
        self._file: Any = None
        self._position = 0
        self._size: int = self._with_retries(lambda: self._opened().seek(0, io.SEEK_END))

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes before the next one that is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to ``offset`` from the start, the position or the end, and return the position; reads nothing."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, fewer only at the end of the file; all the rest for None or a negative number."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._with_retries(lambda: self._read(wanted)) if wanted else b""
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        file = self._opened()
        file.seek(self._position)
        data: bytes = file.read(size)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came where {size} were asked for")
        return data

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        file, self._file = getattr(self, "_file", None), None
        super().close()
        if file is not None:
            file.close()

    def _opened(self) -> Any:
        if self._file is None:
            # read-ahead would fetch columns and row groups that nobody asked for; arrow asks in large pieces
            self._file = self._filesystem.open(self._path, "rb", cache_type="none")
        return self._file

    def _with_retries(self, action: Callable[[], Result]) -> Result:
        for wait in WAITS_S:
            try:
                return action()
            except Exception as error:
                if not transient(error):
                    raise
                reason = first_line(error)
            self._file = None  # whatever it holds of a broken connection goes with it
            logging.getLogger(LOGGER_NAME).warning("%s: %s; trying again in %d s", self._path, reason, wait)
            self._sleep(wait)
        return action()


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
