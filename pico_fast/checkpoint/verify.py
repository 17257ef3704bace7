"""``python -m pico_fast.checkpoint.verify RUN_DIR``: read every checkpoint of a run back and say which are good.

Prints one line per checkpoint. Exit code 0: all good; 1: at least one is damaged; 2: no run or no checkpoint there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout, step_name
from pico_fast.checkpoint.legacy import load_legacy
from pico_fast.checkpoint.load import load_step
from pico_fast.config_io import ConfigError, load_config


def layout_of(root: Path) -> RunLayout:
    """The layout of an existing run: folder names from its training_config.yaml if it has one, else the defaults."""
    layout = RunLayout(root)
    if not layout.training_config.is_file():
        return layout
    config = load_config(layout.training_config).checkpointing
    config.runs_dir, config.run_name = str(root.parent), root.name
    return RunLayout.from_config(config)


def check(layout: RunLayout, step: int) -> tuple[bool, str]:
    """Whether ``step`` is good, and a line about it."""
    if step in layout.legacy_steps():
        try:
            load_legacy(layout, step)
        except CheckpointError as error:
            return False, f"{step_name(step)}  BAD  {error}"
        return True, f"{step_name(step)}  good  pico-train state, CRC-32 only"
    verdict = verify_step(layout, step)
    damage = [*verdict.state, *verdict.exports]
    if not damage:
        try:
            load_step(layout, step)  # what the block checksums cannot tell: whether the tensors are the manifest's
        except CheckpointError as error:
            damage = [str(error)]
    if damage:
        return False, f"{step_name(step)}  BAD  {'; '.join(damage)}"
    files = len(verdict.manifest.files) if verdict.manifest else 0
    return True, f"{step_name(step)}  good  {files} files, {verdict.bytes / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pico_fast.checkpoint.verify", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run directory, for instance runs/my-run")
    root = parser.parse_args(arguments).run_dir.absolute()
    try:
        layout = layout_of(root)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    steps = sorted({*layout.steps(), *layout.legacy_steps()})
    if not steps:
        print(f"{layout.checkpoints}: no checkpoint here; give the run directory", file=sys.stderr)
        return 2
    all_good = True
    for step in steps:
        good, line = check(layout, step)
        all_good &= good
        print(line, flush=True)
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
