"""Which file holds what in a run directory: the one place where these names are written down.

The layout is pico-train's, so that pico-analyze and ``AutoModelForCausalLM`` read a run as it is::

    runs/<run_name>/
      training_config.yaml, metrics.jsonl, logs/, eval_results/step_N.json
      checkpoints/latest -> step_N
      checkpoints/step_N/            config.json, model.safetensors, tokenizer files (Hugging Face)
      checkpoints/step_N/state/      manifest.json and one safetensors file per rank: what a run resumes from
      checkpoints/step_N/fabric_state/checkpoint.pt     the state of an old pico-train run (read only)

A step is *committed* when it has ``state/``: that folder appears whole, by one rename (see :mod:`.commit`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pico_fast.config import CheckpointingConfig

STATE = "state"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"  # an unfinished save, inside step_N
TRASH = ".trash-"  # a checkpoint being deleted, beside step_N
DAMAGED = ".bad-"  # a damaged checkpoint that was saved again, inside step_N

_STEP = re.compile(r"step_(0|[1-9][0-9]*)")


def step_name(step: int) -> str:
    """``step_N``."""
    return f"step_{step}"


def step_of(name: str) -> int | None:
    """N of ``step_N``; None if ``name`` is something else."""
    found = _STEP.fullmatch(name)
    return int(found.group(1)) if found else None


def rank_file(rank: int) -> str:
    """Name of the file in ``state/`` that holds the tensors of one rank."""
    return f"rank_{rank:05d}.safetensors"


def default_run_name(now: datetime | None = None) -> str:
    """The name pico-train gives to a run without one: the time of its start."""
    return (now or datetime.now()).strftime("%Y-%m-%d_%H-%M-%S")


@dataclass(frozen=True)
class RunLayout:
    """Paths of the run whose directory is ``root``."""

    root: Path
    checkpoints_dir: str = "checkpoints"
    logs_dir: str = "logs"
    eval_results_dir: str = "eval_results"
    learning_dynamics_dir: str = "learning_dynamics"
    fabric_checkpoint_dir: str = "fabric_state"
    fabric_checkpoint_filename: str = "checkpoint.pt"

    @classmethod
    def from_config(cls, config: CheckpointingConfig) -> RunLayout:
        """The layout of the run that ``config`` names. Raises ValueError while ``run_name`` is null."""
        if config.run_name is None:
            raise ValueError("checkpointing.run_name is null: choose one first, for instance default_run_name()")
        return cls(
            root=Path(config.runs_dir) / config.run_name,
            checkpoints_dir=config.checkpoints_dir,
            logs_dir=config.logs_dir,
            eval_results_dir=config.evaluation.eval_results_dir,
            learning_dynamics_dir=config.learning_dynamics_dir,
            fabric_checkpoint_dir=config.fabric_checkpoint_dir,
            fabric_checkpoint_filename=config.fabric_checkpoint_filename,
        )

    @property
    def training_config(self) -> Path:
        """The configuration as run."""
        return self.root / "training_config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """Folder of log files."""
        return self.root / self.logs_dir

    @property
    def lock(self) -> Path:
        """File that the running process holds locked."""
        return self.root / ".lock"

    @property
    def wandb_id(self) -> Path:
        """Id of the Weights & Biases run, so that a resume continues it."""
        return self.root / "wandb_id"

    @property
    def checkpoints(self) -> Path:
        """Folder of the step folders."""
        return self.root / self.checkpoints_dir

    @property
    def latest(self) -> Path:
        """Relative symbolic link to the newest durable step folder."""
        return self.checkpoints / "latest"

    @property
    def next_latest(self) -> Path:
        """The link that becomes ``latest`` by a rename."""
        return self.checkpoints / f"{TEMPORARY}latest"

    def eval_results(self, step: int) -> Path:
        """JSON file of evaluation results of ``step``."""
        return self.root / self.eval_results_dir / f"{step_name(step)}.json"

    def step_dir(self, step: int) -> Path:
        """Folder of ``step``; also the Hugging Face model folder."""
        return self.checkpoints / step_name(step)

    def state_dir(self, step: int) -> Path:
        """Folder of the resumable state of ``step``; its presence makes the step committed."""
        return self.step_dir(step) / STATE

    def manifest(self, step: int) -> Path:
        """The manifest of ``step``."""
        return self.state_dir(step) / MANIFEST

    def learning_dynamics(self, step: int) -> Path:
        """Folder of the recorded activations, weights and gradients of ``step``."""
        return self.step_dir(step) / self.learning_dynamics_dir

    def fabric_state(self, step: int) -> Path:
        """pico-train's own state file of ``step``."""
        return self.step_dir(step) / self.fabric_checkpoint_dir / self.fabric_checkpoint_filename

    @property
    def reserved(self) -> frozenset[str]:
        """Names inside a step folder that an export must not use."""
        return frozenset({STATE, self.learning_dynamics_dir, self.fabric_checkpoint_dir})

    def step_dirs(self) -> list[int]:
        """Every N for which a folder step_N exists, committed or not, ascending."""
        try:
            entries = list(os.scandir(self.checkpoints))
        except FileNotFoundError:
            return []
        numbers = (step_of(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False))
        return sorted(number for number in numbers if number is not None)

    def steps(self) -> list[int]:
        """The committed steps, ascending. Committed says that a save finished, not that the disk kept it well."""
        return [step for step in self.step_dirs() if self.state_dir(step).is_dir()]

    def legacy_steps(self) -> list[int]:
        """The steps that have only pico-train's own state, ascending."""
        return [
            step
            for step in self.step_dirs()
            if self.fabric_state(step).parent.exists() and not self.state_dir(step).is_dir()
        ]

    def latest_step(self) -> int | None:
        """The step ``latest`` points to; None if there is no such link or it leads to no checkpoint."""
        try:
            step = step_of(os.readlink(self.latest))
        except OSError:
            return None
        if step is None:
            return None
        return step if self.state_dir(step).is_dir() or self.fabric_state(step).parent.exists() else None
