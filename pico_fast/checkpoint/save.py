"""Writing one checkpoint, so that at every moment the disk holds the old set of checkpoints or the new one.

Every rank writes its own file into the temporary folder that rank 0 has made; rank 0 alone commits, after all have
said that theirs is durable. The folder is one for all, so the ranks of several nodes need a shared file system.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pico_fast.checkpoint import commit
from pico_fast.checkpoint.errors import CheckpointError, NoSpaceError
from pico_fast.checkpoint.filesystem import FileSystem, naming, write_all
from pico_fast.checkpoint.integrity import Verdict, file_entry, verify_step
from pico_fast.checkpoint.layout import MANIFEST, STATE, RunLayout, rank_file, step_name
from pico_fast.checkpoint.manifest import BlockChecksums, FileEntry, Manifest, TensorEntry
from pico_fast.checkpoint.ranks import Outcome, Ranks, attempt, first_failure
from pico_fast.checkpoint.retention import empty_trash
from pico_fast.checkpoint.state import MODEL
from pico_fast.checkpoint.stored import tiling_problem
from pico_fast.checkpoint.tensorfile import file_bytes, write_tensors
from pico_fast.parallel.mesh import SINGLE, Parallel
from pico_fast.parallel.slices import Slice

SPARE_BYTES = 4 << 20  # asked for beyond the tensors: manifest, tokenizer, folders

SHARE = "the run directory (checkpointing.runs_dir) must be on a file system that all ranks share"

WriteExtra = Callable[[Path], None]


@dataclass(frozen=True)
class SaveReport:
    """``bytes`` written in ``seconds`` until durable, in the folder ``path``; 0 bytes if the step was there already."""

    seconds: float
    bytes: int
    path: Path


@dataclass(frozen=True)
class _Size:
    """Bytes that one rank is about to write, and those of parameters among them."""

    file: int
    parameters: int


@dataclass(frozen=True)
class _Written:
    """The file of one rank: None where it had nothing to write."""

    entries: list[TensorEntry]
    file: FileEntry | None


def save_checkpoint(
    layout: RunLayout,
    step: int,
    *,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    write_extra: WriteExtra | None = None,
    slices: Mapping[str, Slice] | None = None,
    parallel: Parallel = SINGLE,
    fs: FileSystem | None = None,
    ranks: Ranks | None = None,
) -> SaveReport:
    """Write ``tensors`` and ``meta`` (JSON) as checkpoint ``step``: on return durable, and what ``latest`` names.

    ``write_extra(folder)`` writes what becomes the top level of ``step_N`` (the Hugging Face model and tokenizer);
    those files are made durable and checksummed with the rest. A step that is there and verifies is left as it is; a
    damaged one is moved to ``step_N/.bad-K``. The caller holds the run's :class:`~pico_fast.checkpoint.lock.RunLock`:
    leftovers of dead saves go.

    Of several ranks every one must call it. ``slices`` names those of ``tensors`` that this rank writes and which part
    of the whole each is (:func:`~pico_fast.checkpoint.state.state_slices`); without it, rank 0 writes its tensors as
    whole ones and the others nothing. ``meta`` and ``write_extra`` count on rank 0.

    Raises CheckpointError with path and errno, after removing what was written, when anything fails (NoSpaceError
    before writing if the disk is too full), the same on every rank; ``latest`` then still names the checkpoint it named
    before, unless it had just moved.
    """
    fs, ranks = fs or FileSystem(), ranks or Ranks(parallel)
    start = time.perf_counter()
    if slices is None:
        slices = {name: Slice.whole(tensor.shape) for name, tensor in tensors.items()} if ranks.is_main else {}
    mine = {name: tensors[name] for name in slices}
    committer = _Committer(layout, step, ranks.size, fs) if ranks.is_main else None

    sizes = ranks.gather(attempt(lambda: _size(mine, slices)))
    opened: Outcome[Path | None] = Outcome()
    if committer is not None:
        opened = committer.guarded(lambda: committer.open(sizes, write_extra is not None))
    folder = ranks.broadcast(opened).get()

    written: list[Outcome[_Written]] = []
    if folder is not None:
        written = ranks.gather(attempt(lambda: _write_state(folder, ranks.rank, mine, slices, fs)))
    done: Outcome[int] = Outcome()
    if committer is not None:
        done = committer.guarded(lambda: committer.finish(folder, written, meta, write_extra))
    size = ranks.broadcast(done).get()
    return SaveReport(seconds=time.perf_counter() - start, bytes=size, path=layout.step_dir(step))


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


class _Committer:
    """Rank 0's part of a save: what it decides and does for all."""

    def __init__(self, layout: RunLayout, step: int, world_size: int, fs: FileSystem):
        self.layout, self.step, self.world_size, self.fs = layout, step, world_size, fs
        self.earlier = layout.latest_step()
        self.there: Verdict | None = None
        self.tmp = commit.temporary_dir(layout, step)

    def guarded(self, part: Callable[[], Any]) -> Outcome[Any]:
        """The outcome of ``part``; after a failure nothing of this save is left, and the error says what stands."""
        outcome = attempt(part)
        if outcome.error is None:
            return outcome
        _remove(self.tmp, self.fs)
        with contextlib.suppress(OSError):
            self.fs.rmdir(self.layout.step_dir(self.step))  # only if nothing else is in it
        return Outcome(error=_failure(self.layout, self.step, self.earlier, outcome.error))

    def open(self, sizes: Sequence[Outcome[_Size]], export: bool) -> Path | None:
        """Make the folders and see whether the disk can hold ``sizes``.

        Returns the folder for the ranks' files; None if the step is there and good.
        """
        remove_leftovers(self.layout, self.fs)
        if self.layout.state_dir(self.step).is_dir():
            self.there = verify_step(self.layout, self.step)
            if self.there.good:
                return None
            if self.earlier == self.step:
                self.earlier = _retreat(self.layout, self.step, self.fs)
        commit.execute(commit.prepare(self.layout, self.step), self.fs)
        _require_space(self.layout, _results(sizes), export, self.fs)
        return self.tmp / STATE

    def finish(
        self,
        folder: Path | None,
        written: Sequence[Outcome[_Written]],
        meta: Mapping[str, Any],
        write_extra: WriteExtra | None,
    ) -> int:
        """Write the export and the manifest, commit, move ``latest``. Returns the bytes of all files."""
        layout, step, size = self.layout, self.step, 0
        if folder is not None:
            manifest, size = self._write_rest(folder, _results(written), meta, write_extra)
            exports = [entry.path for entry in manifest.files if not entry.path.startswith(f"{STATE}/")]
            displaced = _displaced(layout, step, self.there, exports)
            commit.execute(commit.publish(layout, step, exports, displaced), self.fs)
        else:  # an earlier call may have failed after its commit point
            sync = [commit.Op("sync", layout.step_dir(step)), commit.Op("sync", layout.checkpoints)]
            commit.execute(sync, self.fs)
        commit.execute(commit.point_latest(layout, step), self.fs)
        _remove(self.tmp, self.fs)
        return size

    def _write_rest(
        self, folder: Path, written: Sequence[_Written], meta: Mapping[str, Any], write_extra: WriteExtra | None
    ) -> tuple[Manifest, int]:
        """Write and fsync the exported files, and last the manifest. Returns it and the bytes of all files."""
        entries = [entry for rank in written for entry in rank.entries]
        files = [rank.file for rank in written if rank.file is not None]
        _require_whole(folder, entries, files)
        if write_extra is not None:
            write_extra(self.tmp / commit.EXPORT)
            mode = stat.S_IMODE((folder / rank_file(0)).stat().st_mode)  # 0644 less the umask
            files += _settle_exports(self.tmp / commit.EXPORT, self.layout, mode, self.fs)
        manifest = Manifest(self.step, self.world_size, torch.__version__, dict(meta), entries, files)
        data = manifest.to_bytes()
        _write_file(folder / MANIFEST, lambda emit: emit(data), self.fs)
        return manifest, sum(entry.size for entry in files) + len(data)


def _results(outcomes: Sequence[Outcome[Any]]) -> list[Any]:
    """What every rank returned. Raises the error of the first one that failed, which it names."""
    failure = first_failure(outcomes)
    if failure is None:
        return [outcome.result for outcome in outcomes]
    who, error = failure
    raise error if not who else CheckpointError(f"{who}{error}", path=error.path, errno=error.errno)


def _size(tensors: Mapping[str, torch.Tensor], slices: Mapping[str, Slice]) -> _Size:
    parameters = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(MODEL))
    return _Size(file_bytes(tensors, slices), parameters)


def _write_state(
    folder: Path, rank: int, tensors: Mapping[str, torch.Tensor], slices: Mapping[str, Slice], fs: FileSystem
) -> _Written:
    """Write and fsync the file of ``rank``; other ranks than 0 may have nothing to write."""
    if rank != 0 and not tensors:
        return _Written([], None)
    path = folder / rank_file(rank)
    if rank != 0 and not folder.is_dir():
        raise CheckpointError(f"rank 0 has made the folder, but it is not there: {SHARE}", path=path)
    checksums = BlockChecksums()
    entries: list[TensorEntry] = []

    def content(emit: Callable[[Any], None]) -> None:
        def checked(data: Any) -> None:
            checksums.update(data)
            emit(data)

        entries.extend(write_tensors(tensors, slices, path.name, checked))

    _write_file(path, content, fs)
    return _Written(entries, FileEntry(path=f"{STATE}/{path.name}", size=checksums.size, crc32c=checksums.blocks()))


def _require_whole(folder: Path, entries: Sequence[TensorEntry], files: Sequence[FileEntry]) -> None:
    """See that the ranks' slices make up whole tensors and that rank 0 finds their files; CheckpointError if not."""
    problem = tiling_problem(entries)
    if problem is not None:
        raise CheckpointError(problem)
    for entry in files:
        path = folder.parent / entry.path
        if not path.is_file() or path.stat().st_size != entry.size:
            raise CheckpointError(
                f"written by its rank, but rank 0 does not find its {entry.size} bytes: {SHARE}", path=path
            )


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


def _require_space(layout: RunLayout, sizes: Sequence[_Size], export: bool, fs: FileSystem) -> None:
    needed = sum(size.file for size in sizes) + SPARE_BYTES
    if export:  # the Hugging Face file holds the parameters once more
        needed += sum(size.parameters for size in sizes)
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


def _failure(layout: RunLayout, step: int, earlier: int | None, error: CheckpointError) -> CheckpointError:
    path = error.path or layout.step_dir(step)
    latest = layout.latest_step()
    kept = (
        f"{step_name(latest)} is still the latest checkpoint"
        if latest is not None
        else "there is no earlier checkpoint"
    )
    if latest == step != earlier:
        kept = "it is complete and the latest, but a power cut may still lose it"
    message = f"{step_name(step)} was not saved: {path}: {error}; {kept}"
    failure = CheckpointError(message, path=path, errno=error.errno)
    if isinstance(error, NoSpaceError):
        failure = NoSpaceError(message, path=path, needed=error.needed, free=error.free)
    failure.__cause__ = error.__cause__ or error
    return failure
