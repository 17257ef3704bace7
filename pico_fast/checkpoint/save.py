"""Writing one checkpoint, so that at every moment the disk holds the old set of checkpoints or the new one."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pico_fast.checkpoint import commit
from pico_fast.checkpoint.errors import CheckpointError, NoSpaceError, described, errno_of
from pico_fast.checkpoint.filesystem import FileSystem, naming, write_all
from pico_fast.checkpoint.integrity import Verdict, file_entry, verify_step
from pico_fast.checkpoint.layout import MANIFEST, STATE, RunLayout, rank_file, step_name
from pico_fast.checkpoint.manifest import BlockChecksums, FileEntry, Manifest, TensorEntry
from pico_fast.checkpoint.retention import empty_trash
from pico_fast.checkpoint.state import MODEL
from pico_fast.checkpoint.tensorfile import file_bytes, write_tensors

SPARE_BYTES = 4 << 20  # asked for beyond the tensors: manifest, tokenizer, folders


@dataclass(frozen=True)
class SaveReport:
    """``bytes`` written in ``seconds`` until durable, in the folder ``path``; 0 bytes if the step was there already."""

    seconds: float
    bytes: int
    path: Path


def save_checkpoint(
    layout: RunLayout,
    step: int,
    *,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    write_extra: Callable[[Path], None] | None = None,
    fs: FileSystem | None = None,
) -> SaveReport:
    """Write ``tensors`` and ``meta`` (JSON) as checkpoint ``step``: on return durable, and what ``latest`` names.

    ``write_extra(folder)`` writes what becomes the top level of ``step_N`` (the Hugging Face model and tokenizer);
    those files are made durable and checksummed with the rest. A step that is there and verifies is left as it is; a
    damaged one is moved to ``step_N/.bad-K``. The caller holds the run's :class:`~pico_fast.checkpoint.lock.RunLock`:
    leftovers of dead saves go.

    Raises CheckpointError with path and errno, after removing what was written, when anything fails (NoSpaceError
    before writing if the disk is too full); ``latest`` then still names the checkpoint it named before, unless it had
    just moved.
    """
    fs = fs or FileSystem()
    start = time.perf_counter()
    earlier = layout.latest_step()
    step_dir, tmp = layout.step_dir(step), commit.temporary_dir(layout, step)
    written = 0
    try:
        remove_leftovers(layout, fs)
        there = verify_step(layout, step) if layout.state_dir(step).is_dir() else None
        if there is not None and not there.good and earlier == step:
            earlier = _retreat(layout, step, fs)
        if there is None or not there.good:
            commit.execute(commit.prepare(layout, step), fs)
            _require_space(layout, tensors, write_extra is not None, fs)
            manifest, written = _write(layout, step, tensors, meta, write_extra, fs)
            exports = [entry.path for entry in manifest.files if not entry.path.startswith(f"{STATE}/")]
            commit.execute(commit.publish(layout, step, exports, _displaced(layout, step, there, exports)), fs)
        else:  # an earlier call may have failed after its commit point
            commit.execute([commit.Op("sync", step_dir), commit.Op("sync", layout.checkpoints)], fs)
        commit.execute(commit.point_latest(layout, step), fs)
        _remove(tmp, fs)
    except Exception as error:
        _remove(tmp, fs)
        with contextlib.suppress(OSError):
            fs.rmdir(step_dir)  # only if nothing else is in it
        raise _failure(layout, step, earlier, error) from error
    return SaveReport(seconds=time.perf_counter() - start, bytes=written, path=step_dir)


def remove_leftovers(layout: RunLayout, fs: FileSystem | None = None) -> None:
    """Remove what dead saves and deletions left behind; for the start of a run, under its lock.

    What cannot go stays.
    """
    fs = fs or FileSystem()
    for path in commit.leftovers(layout):
        _remove(path, fs)
        with contextlib.suppress(OSError):
            fs.rmdir(path.parent)
    with contextlib.suppress(OSError):
        empty_trash(layout, fs)


def _write(
    layout: RunLayout,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    write_extra: Callable[[Path], None] | None,
    fs: FileSystem,
) -> tuple[Manifest, int]:
    """Write and fsync everything into the temporary folder, the manifest last.

    Returns it and the number of bytes written.
    """
    tmp = commit.temporary_dir(layout, step)
    entries, state = _write_state(tmp / STATE / rank_file(0), tensors, fs)
    files = [state]
    if write_extra is not None:
        write_extra(tmp / commit.EXPORT)
        mode = stat.S_IMODE((tmp / STATE / rank_file(0)).stat().st_mode)  # 0644 less the umask
        files += _settle_exports(tmp / commit.EXPORT, layout, mode, fs)
    manifest = Manifest(step, 1, torch.__version__, dict(meta), entries, files)
    data = manifest.to_bytes()
    _write_file(tmp / STATE / MANIFEST, lambda emit: emit(data), fs)
    return manifest, sum(entry.size for entry in files) + len(data)


def _write_state(
    path: Path, tensors: Mapping[str, torch.Tensor], fs: FileSystem
) -> tuple[list[TensorEntry], FileEntry]:
    checksums = BlockChecksums()
    entries: list[TensorEntry] = []

    def content(emit: Callable[[Any], None]) -> None:
        def checked(data: Any) -> None:
            checksums.update(data)
            emit(data)

        entries.extend(write_tensors(tensors, path.name, checked))

    _write_file(path, content, fs)
    return entries, FileEntry(path=f"{STATE}/{path.name}", size=checksums.size, crc32c=checksums.blocks())


def _write_file(path: Path, content: Callable[[Callable[[Any], None]], None], fs: FileSystem) -> None:
    """Create ``path``, let ``content`` emit its bytes, fsync."""
    with naming(path):
        fd = fs.create(path)
        try:
            content(lambda data: write_all(fs, fd, memoryview(data)))
            fs.fsync(fd)
        finally:
            fs.close(fd)


def _settle_exports(folder: Path, layout: RunLayout, mode: int, fs: FileSystem) -> list[FileEntry]:
    """Make the files that other libraries wrote durable and readable, and take their checksums."""
    entries = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in layout.reserved:
            raise CheckpointError(f"the export wrote {name!r}, a name that pico-fast keeps for itself", path=path)
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"the export wrote {name!r}, which is neither a file nor a folder", path=path)
        if path.is_file():
            with naming(path):
                fs.chmod(path, mode)
                fs.sync(path)
                entries.append(file_entry(path, name))
    return entries


def _displaced(layout: RunLayout, step: int, there: Verdict | None, exports: list[str]) -> list[str]:
    """What of an earlier checkpoint in ``step_N`` must move aside: a damaged one of ours, or pico-train's files."""
    step_dir = layout.step_dir(step)
    if there is not None:
        listed = [entry.path for entry in there.manifest.files] if there.manifest else []
        # state/ last: while it is there, a save that takes over from a crash knows that the rest is still to be moved
        names = [*dict.fromkeys(name for name in [*listed, *exports] if not name.startswith(f"{STATE}/")), STATE]
    elif layout.fabric_state(step).parent.exists():
        names = exports
    else:
        return []
    return [name for name in names if (step_dir / name).exists()]


def _retreat(layout: RunLayout, step: int, fs: FileSystem) -> int:
    """Let ``latest`` name the newest good step instead of the damaged ``step``, which is about to move aside."""
    for other in reversed(layout.steps()):
        if other != step and verify_step(layout, other).good:
            commit.execute(commit.point_latest(layout, other), fs)
            return other
    return step


def _require_space(layout: RunLayout, tensors: Mapping[str, torch.Tensor], export: bool, fs: FileSystem) -> None:
    needed = file_bytes(tensors) + SPARE_BYTES
    if export:  # the Hugging Face file holds the parameters once more
        needed += sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(MODEL))
    free = fs.free_bytes(layout.checkpoints)
    if free < needed:
        raise NoSpaceError(
            f"{needed} bytes needed, {free} bytes free", path=layout.checkpoints, needed=needed, free=free
        )


def _remove(path: Path, fs: FileSystem) -> None:
    """Remove a temporary folder if it can be removed; what stays is found by the next save."""
    with contextlib.suppress(OSError):
        if os.path.lexists(path):
            fs.remove_tree(path)


def _failure(layout: RunLayout, step: int, earlier: int | None, error: Exception) -> CheckpointError:
    path = Path(error.filename) if isinstance(error, OSError) and error.filename else getattr(error, "path", None)
    path = path or layout.step_dir(step)
    latest = layout.latest_step()
    kept = (
        f"{step_name(latest)} is still the latest checkpoint"
        if latest is not None
        else "there is no earlier checkpoint"
    )
    if latest == step != earlier:
        kept = "it is complete and the latest, but a power cut may still lose it"
    reason = str(error) if isinstance(error, CheckpointError) else described(error)
    message = f"{step_name(step)} was not saved: {path}: {reason}; {kept}"
    if isinstance(error, NoSpaceError):
        return NoSpaceError(message, path=path, needed=error.needed, free=error.free)
    number = error.errno if isinstance(error, CheckpointError) else errno_of(error)
    return CheckpointError(message, path=path, errno=number)
