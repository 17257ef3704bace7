"""Reading the newest good checkpoint."""

from __future__ import annotations

from pico_fast.checkpoint.errors import CheckpointError, NoGoodCheckpointError
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout, step_name
from pico_fast.checkpoint.legacy import load_legacy
from pico_fast.checkpoint.state import LoadedState
from pico_fast.checkpoint.tensorfile import read_tensors


def latest_good(layout: RunLayout) -> tuple[int, LoadedState, list[tuple[int, str]]] | None:
    """The newest step whose state verifies, and the newer ones that were rejected, with reasons, newest first.

    Steps with only pico-train's own state count too. None if the run has no checkpoint at all; NoGoodCheckpointError
    if it has some and all are damaged: starting anew would then throw a run away without a word.
    """
    rejected: list[tuple[int, str]] = []
    ours = set(layout.steps())
    for step in sorted(ours.union(layout.legacy_steps()), reverse=True):
        try:
            return step, load_step(layout, step) if step in ours else load_legacy(layout, step), rejected
        except CheckpointError as error:  # noqa: PERF203 (a handful of reads of gigabytes)
            rejected.append((step, str(error)))
    if rejected:
        reasons = "".join(f"\n  - {step_name(step)}: {reason}" for step, reason in rejected)
        raise NoGoodCheckpointError(
            f"{layout.checkpoints}: none of {len(rejected)} checkpoint(s) can be resumed from:{reasons}\n"
            "restore one, or give another checkpointing.run_name to start anew",
            rejected=rejected,
        )
    return None


def load_step(layout: RunLayout, step: int) -> LoadedState:
    """The state of a committed step.

    Raises CheckpointError that names the damage if it is not bit for bit what was saved.
    """
    verdict = verify_step(layout, step)
    if verdict.state or verdict.manifest is None:
        raise CheckpointError("; ".join(verdict.state), path=layout.state_dir(step))
    manifest = verdict.manifest
    if manifest.world_size != 1:
        raise CheckpointError(
            f"written by {manifest.world_size} processes; only states of one process can be read",
            path=layout.state_dir(step),
        )
    tensors = {}
    for file in sorted({entry.file for entry in manifest.tensors}):
        path = layout.state_dir(step) / file
        try:
            tensors.update(read_tensors(path, [entry for entry in manifest.tensors if entry.file == file]))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}", path=path) from error
    return LoadedState(step, tensors, manifest.meta, layout.step_dir(step), warnings=verdict.exports)
