"""When a step is saved, and which checkpoints are deleted.

Deleting a step takes away what pico-fast's save wrote there (``state/`` and the Hugging Face files its manifest
lists). What else is in the folder (``learning_dynamics/``, a user's notes, a damaged checkpoint moved aside) stays,
and the folder with it. Checkpoints of pico-train are never deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pico_fast.checkpoint import commit
from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.filesystem import FileSystem
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import MANIFEST, STATE, TRASH, RunLayout, step_name, step_of
from pico_fast.checkpoint.manifest import Manifest, ManifestError
from pico_fast.config import CheckpointingConfig


def due(step: int, config: CheckpointingConfig) -> bool:
    """Whether ``step`` is saved: 0, multiples of ``save_every_n_steps``, if ``log_spaced`` also powers of 2 below it.

    Log-spaced early checkpoints are Pythia's (arXiv 2304.01373, section 2.1).
    """
    if step % config.save_every_n_steps == 0:
        return True
    return config.log_spaced and step < config.save_every_n_steps and step & (step - 1) == 0


def superseded(steps: Sequence[int], config: CheckpointingConfig) -> list[int]:
    """Those of the ascending ``steps`` that the retention rule gives up.

    Kept are the last ``keep_last`` and the multiples of ``keep_every`` (so step 0, if ``keep_every`` is given).
    ``keep_last`` null keeps all.
    """
    if config.keep_last is None:
        return []
    every = config.keep_every
    return [step for step in steps[: -config.keep_last] if not (every and step % every == 0)]


def prune(layout: RunLayout, config: CheckpointingConfig, fs: FileSystem | None = None) -> list[int]:
    """Delete the superseded checkpoints; returns their steps.

    Nothing is deleted unless ``latest`` points to the newest committed step and that step verifies, read back whole;
    the one ``latest`` points to always stays. A crash leaves each step whole or not a checkpoint. Raises OSError.
    """
    fs = fs or FileSystem()
    steps = layout.steps()
    latest = layout.latest_step()
    doomed = [step for step in superseded(steps, config) if step != latest]
    if not doomed or latest != steps[-1]:
        return []
    verdict = verify_step(layout, steps[-1])
    if not verdict.good:
        raise CheckpointError(
            f"no checkpoint was deleted: the newest, {step_name(steps[-1])}, is damaged: "
            + "; ".join([*verdict.state, *verdict.exports]),
            path=layout.step_dir(steps[-1]),
        )
    empty_trash(layout, fs)
    trash = {step: layout.checkpoints / f"{TRASH}{step_name(step)}" for step in doomed}
    commit.execute([commit.Op("mkdir", folder) for folder in trash.values()], fs)
    commit.execute([commit.Op("sync", layout.checkpoints)], fs)
    for step, folder in trash.items():
        unmake = [
            commit.Op("rename", layout.state_dir(step), folder / STATE),  # from here on the step is no checkpoint
            commit.Op("sync", folder),
            commit.Op("sync", layout.step_dir(step)),
        ]
        commit.execute(unmake, fs)
    empty_trash(layout, fs)
    return doomed


def empty_trash(layout: RunLayout, fs: FileSystem) -> None:
    """Finish deletions: remove the exported files of each checkpoint in the trash, then the trash. Raises OSError."""
    for folder in commit.trash(layout):
        step = step_of(folder.name[len(TRASH) :])
        if step is not None and not layout.state_dir(step).is_dir():  # else the step was saved again in the meantime
            _remove_exports(layout.step_dir(step), folder / STATE / MANIFEST, fs)
        fs.remove_tree(folder)


def _remove_exports(step_dir: Path, manifest: Path, fs: FileSystem) -> None:
    """Remove the files below ``step_dir`` that ``manifest`` lists, and then the folders that this leaves empty."""
    names: list[str] = []
    with contextlib.suppress(OSError, ManifestError):  # unreadable: a whole model without its state stays behind
        names = [entry.path for entry in Manifest.from_bytes(manifest.read_bytes()).files]
    folders = {step_dir}
    for name in names:
        if not name.startswith(f"{STATE}/"):
            with contextlib.suppress(FileNotFoundError):
                fs.unlink(step_dir / name)
            folders.update(step_dir / parent for parent in PurePosixPath(name).parents)
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        with contextlib.suppress(OSError):  # not empty: something that we did not write
            fs.rmdir(folder)
