"""The system calls that write a checkpoint, one method each, so that a test can make any of them fail."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class FileSystem:
    """The real file system.

    Every method raises OSError; interrupted calls (EINTR) are repeated by Python itself (PEP 475).
    """

    def create(self, path: Path) -> int:
        """Open a new file for writing, mode 0644 less the umask. Returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        """Write ``data`` or a part of it. Returns the number of bytes written."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Wait until the file's bytes are on the disk."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def sync(self, path: Path) -> None:
        """fsync a file or a folder (its names) by path."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def chmod(self, path: Path, mode: int) -> None:
        """Set permission bits."""
        os.chmod(path, mode)

    def mkdir(self, path: Path) -> None:
        """Make one folder."""
        os.mkdir(path)

    def rename(self, path: Path, target: Path) -> None:
        """Rename ``path`` to ``target``, which is replaced if it is a file."""
        os.rename(path, target)

    def symlink(self, path: Path, target: str) -> None:
        """Make ``path`` a symbolic link to ``target``."""
        os.symlink(target, path)

    def unlink(self, path: Path) -> None:
        """Remove a file or link."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all in it."""
        shutil.rmtree(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the disk of ``path``."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError raised inside the path it is about, which calls on descriptors do not know."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_all(fs: FileSystem, fd: int, data: memoryview) -> None:
    """Write all of ``data``, however little each call takes."""
    while data.nbytes:
        written = fs.write(fd, data)
        if written <= 0:
            raise OSError(errno.EIO, "write took no bytes")
        data = data[written:]
