"""Reading the newest good checkpoint, into any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pico_fast.checkpoint.errors import CheckpointError, NoGoodCheckpointError
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout, step_name
from pico_fast.checkpoint.legacy import load_legacy
from pico_fast.checkpoint.manifest import Manifest
from pico_fast.checkpoint.ranks import Outcome, Ranks, attempt, first_failure
from pico_fast.checkpoint.state import LoadedState
from pico_fast.checkpoint.stored import SlicedTensors
from pico_fast.parallel.mesh import SINGLE, Parallel


@dataclass(frozen=True)
class _Found:
    """What rank 0 chose: enough for the other ranks to open it without verifying it again."""

    step: int
    manifest: Manifest | None  # None: pico-train's own state
    warnings: list[str]
    rejected: list[tuple[int, str]]


def latest_good(
    layout: RunLayout, parallel: Parallel = SINGLE, *, ranks: Ranks | None = None
) -> tuple[int, LoadedState, list[tuple[int, str]]] | None:
    """The newest step whose state verifies, and the newer ones that were rejected, with reasons, newest first.

    Steps with only pico-train's own state count too. None if the run has no checkpoint at all; NoGoodCheckpointError
    if it has some and all are damaged: starting anew would then throw a run away without a word.

    Of several ranks every one must call it: rank 0 verifies and chooses, the others open what it chose. All raise the
    same CheckpointError if one of them cannot.
    """
    ranks = ranks or Ranks(parallel)
    if ranks.size == 1:
        alone = _choose(layout)
        return None if alone is None else (alone[0].step, alone[1], alone[0].rejected)
    own: LoadedState | None = None
    chosen: Outcome[_Found | None] = Outcome()
    if ranks.is_main:
        outcome = attempt(lambda: _choose(layout))
        found, own = outcome.result or (None, None)
        chosen = Outcome(found, outcome.error)
    found = ranks.broadcast(chosen).get()
    if found is None:
        return None
    opened = attempt(lambda: own or _open(layout, found))
    failure = ranks.broadcast(first_failure(ranks.gather(Outcome(error=opened.error))))
    if failure is not None:
        who, error = failure
        raise CheckpointError(
            f"{who}{step_name(found.step)}, which rank 0 verified, cannot be read: {error}; all ranks must see the run "
            "directory (checkpointing.runs_dir) on one shared file system",
            path=error.path,
            errno=error.errno,
        )
    return found.step, opened.get(), found.rejected


def load_step(layout: RunLayout, step: int) -> LoadedState:
    """The state of a committed step, whichever layout saved it.

    Raises CheckpointError that names the damage if it is not bit for bit what was saved.
    """
    return _load_ours(layout, step)[1]


def _choose(layout: RunLayout) -> tuple[_Found, LoadedState] | None:
    rejected: list[tuple[int, str]] = []
    ours = set(layout.steps())
    for step in sorted(ours.union(layout.legacy_steps()), reverse=True):
        try:
            manifest, state = _load_ours(layout, step) if step in ours else (None, load_legacy(layout, step))
        except CheckpointError as error:  # noqa: PERF203 (a handful of reads of gigabytes)
            rejected.append((step, str(error)))
        else:
            return _Found(step, manifest, state.warnings, rejected), state
    if rejected:
        raise _none_good(layout, rejected)
    return None


def _load_ours(layout: RunLayout, step: int) -> tuple[Manifest, LoadedState]:
    verdict = verify_step(layout, step)
    if verdict.state or verdict.manifest is None:
        raise CheckpointError("; ".join(verdict.state), path=layout.state_dir(step))
    tensors = SlicedTensors(layout.state_dir(step), verdict.manifest.tensors, check=True)
    state = LoadedState(step, tensors, verdict.manifest.meta, layout.step_dir(step), warnings=verdict.exports)
    return verdict.manifest, state


def _open(layout: RunLayout, found: _Found) -> LoadedState:
    """The state that rank 0 verified, as another rank finds it: present, with the tensors of the manifest."""
    if found.manifest is None:
        return load_legacy(layout, found.step, verify=False)
    tensors = SlicedTensors(layout.state_dir(found.step), found.manifest.tensors, check=False)
    path = layout.step_dir(found.step)
    return LoadedState(found.step, tensors, found.manifest.meta, path, warnings=found.warnings)


def _none_good(layout: RunLayout, rejected: Sequence[tuple[int, str]]) -> NoGoodCheckpointError:
    reasons = "".join(f"\n  - {step_name(step)}: {reason}" for step, reason in rejected)
    return NoGoodCheckpointError(
        f"{layout.checkpoints}: none of {len(rejected)} checkpoint(s) can be resumed from:{reasons}\n"
        "restore one, or give another checkpointing.run_name to start anew",
        rejected=list(rejected),
    )
