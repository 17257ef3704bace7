"""The commit protocol: the one sequence of system calls by which a checkpoint becomes visible.

1. :func:`prepare`: folders, each made durable in its parent; everything new goes to ``step_N/.tmp-PID/{state,export}``.
2. Every file is written and fsynced there, by several ranks each its own; ``manifest.json``, which covers them all,
   last. Rank 0 writes it, and does all that follows, when every rank has said that its file is durable.
3. :func:`publish`: the names in ``state/`` are fsynced, Hugging Face files are renamed into ``step_N/`` and made
   durable, then ``state/`` is renamed into place. **That rename is the commit point**: before it the step does not
   exist, after it the step is whole. Its name is then made durable, up to ``checkpoints/``.
4. :func:`point_latest`: ``latest`` moves by the rename of a new link, after the step is durable.

A crash between any two calls therefore leaves the old or the new set of checkpoints. What it can leave behind
(``.tmp-*``, ``.trash-*``, a step folder without ``state/``) counts as nothing, and :func:`leftovers` finds it.

A checkpoint that was already there but is damaged, and the Hugging Face files of an old pico-train step, are moved to
``step_N/.bad-K/``, not overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pico_fast.checkpoint.filesystem import FileSystem, naming
from pico_fast.checkpoint.layout import DAMAGED, STATE, TEMPORARY, TRASH, RunLayout, step_name

EXPORT = "export"


class Op(NamedTuple):
    """One call of a :class:`FileSystem` method: its name, its path, and what a rename or link leads to."""

    call: str
    path: Path
    target: Path | str | None = None


def execute(ops: Iterator[Op] | Sequence[Op], fs: FileSystem) -> None:
    """Do ``ops`` in order; an OSError leaves with the path it is about."""
    for call, path, target in ops:
        with naming(path):
            getattr(fs, call)(path) if target is None else getattr(fs, call)(path, target)


def temporary_dir(layout: RunLayout, step: int) -> Path:
    """Where ``step`` is written before this process publishes it."""
    return layout.step_dir(step) / f"{TEMPORARY}{os.getpid()}"


def prepare(layout: RunLayout, step: int) -> Iterator[Op]:
    """Make the folders that are missing down to the temporary one."""
    step_dir, tmp = layout.step_dir(step), temporary_dir(layout, step)
    for folder in reversed([step_dir, *step_dir.parents]):
        if not folder.exists():
            yield Op("mkdir", folder)
            yield Op("sync", folder.parent)
    yield Op("mkdir", tmp)
    yield Op("mkdir", tmp / STATE)
    yield Op("mkdir", tmp / EXPORT)


def publish(layout: RunLayout, step: int, exports: Sequence[str], displaced: Sequence[str]) -> Iterator[Op]:
    """Put the finished temporary folder in place.

    ``exports``: paths of the Hugging Face files below ``step_N``; ``displaced``: what of an earlier checkpoint stands
    there now.
    """
    step_dir, tmp = layout.step_dir(step), temporary_dir(layout, step)
    yield Op("sync", tmp / STATE)
    if displaced:
        aside = _free_name(step_dir, DAMAGED)
        yield Op("mkdir", aside)
        for name in displaced:
            yield from _missing_parents(aside, name)
            yield Op("rename", step_dir / name, aside / name)
        for folder in _folders(aside, displaced):
            yield Op("sync", folder)
    for name in exports:
        yield from _missing_parents(step_dir, name)
        yield Op("rename", tmp / EXPORT / name, step_dir / name)
    for folder in _folders(step_dir, exports):
        yield Op("sync", folder)
    yield Op("rename", tmp / STATE, layout.state_dir(step))  # the commit point
    yield Op("sync", step_dir)
    yield Op("sync", layout.checkpoints)


def point_latest(layout: RunLayout, step: int) -> Iterator[Op]:
    """Move ``latest`` to ``step``, which must be durable."""
    if os.path.lexists(layout.next_latest):
        yield Op("unlink", layout.next_latest)
    yield Op("symlink", layout.next_latest, step_name(step))
    yield Op("rename", layout.next_latest, layout.latest)
    yield Op("sync", layout.checkpoints)


def leftovers(layout: RunLayout) -> list[Path]:
    """Temporary folders of saves that never finished. Only the process that holds the run's lock may remove them."""
    found: list[Path] = []
    for step in layout.step_dirs():
        with os.scandir(layout.step_dir(step)) as entries:
            found += [Path(entry.path) for entry in entries if entry.name.startswith(TEMPORARY)]
    return sorted(found)


def trash(layout: RunLayout) -> list[Path]:
    """Folders of deletions that never finished."""
    return sorted(layout.checkpoints.glob(f"{TRASH}*")) if layout.checkpoints.is_dir() else []


def _folders(base: Path, names: Sequence[str]) -> list[Path]:
    """``base`` and the folders that hold ``names`` below it, inner ones first."""
    folders = {base, *(base / parent for name in names for parent in PurePosixPath(name).parents)}
    return sorted(folders, key=lambda path: (-len(path.parts), path))


def _missing_parents(base: Path, name: str) -> Iterator[Op]:
    for parent in reversed(PurePosixPath(name).parents):
        if not (base / parent).exists():
            yield Op("mkdir", base / parent)


def _free_name(folder: Path, prefix: str) -> Path:
    number = 0
    while (folder / f"{prefix}{number}").exists():
        number += 1
    return folder / f"{prefix}{number}"
