"""Train a Pico decoder.

``torchrun --standalone --nproc-per-node 1 -m pico_fast.train --config FILE [section.key=value ...]``

:func:`train` sets a run up and :func:`run_steps` is the loop; one optimizer step is
:func:`pico_fast.step.training_step`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.lock import RunLockedError
from pico_fast.config import Config
from pico_fast.config_io import ConfigError, load_config, to_yaml
from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.dry_run import print_dry_run
from pico_fast.env import EnvFileError, load_env, redact, refuse_secrets
from pico_fast.monitor import MonitorError
from pico_fast.optim import learning_rate
from pico_fast.run import Run, TrainingError
from pico_fast.runtime import GracefulStop, UsageError, frozen_gc, start_runtime, world_size
from pico_fast.setup_run import prepare_run
from pico_fast.step import LateReader, training_step

USER_ERRORS = (ConfigError, UsageError, DataError, TokenizerError, RunLockedError, MonitorError, EnvFileError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done or stopped by a signal, 1 failed, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="pico_fast.train", description="Train a Pico decoder.")
    parser.add_argument(
        "--config", "--config_path", type=Path, help="a YAML file, pico-train's too; none: the defaults"
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes and costs, train nothing")
    parser.add_argument("--print-config", action="store_true", help="print every key and its value, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        load_env(Path.cwd())
        config = load_config(parsed.config, parsed.overrides, world_size=world_size())
        refuse_secrets(config)
        if parsed.print_config:
            print(to_yaml(config), end="")
        elif parsed.dry_run:
            print_dry_run(config)
        else:
            train(config)
    except USER_ERRORS as error:
        print(f"pico_fast.train: {redact(str(error))}", file=sys.stderr)
        return 2
    except (CheckpointError, TrainingError) as error:
        print(f"pico_fast.train: {redact(str(error))}", file=sys.stderr)
        return 1
    return 0


def train(config: Config) -> None:
    """Train as ``config`` says, from its newest checkpoint if there is one, until ``max_steps`` or a signal.

    Raises the errors of :data:`USER_ERRORS` before the first step for wrong input; CheckpointError when
    ``checkpointing.max_failed_saves`` saves have failed in a row, or the last one has; TrainingError for a loss that
    stays non-finite and for an assertion that failed on the device.
    """
    runtime = start_runtime(config)
    with GracefulStop() as stop, prepare_run(config, runtime, stop) as run:
        try:
            run_steps(run)
        except RuntimeError as error:  # torch.AcceleratorError, or Triton's own
            if "device-side assert" not in str(error):
                raise
            raise run.device_assertion(error) from error


def run_steps(run: Run) -> None:
    """The loop. ``run.step`` counts the updates applied; every number is read one step after it was computed."""
    config, optimization = run.config, run.config.training.optimization
    late = LateReader()
    run.begin()
    with frozen_gc(), run.open_batches() as batches:
        while run.step < config.training.max_steps and not run.stop():
            try:
                micro_batches = next(batches, None)
            except DataError as error:
                run.observe(late.flush())
                run.save(last=True)
                raise DataError(f"{error}; step {run.step} is saved, mend the data and start again") from None
            if micro_batches is None:  # asked to stop while waiting for data
                break
            numbers = training_step(
                run.model,
                run.optimizer,
                micro_batches,
                step=run.step,
                lr=learning_rate(config.training, run.step),
                max_grad_norm=optimization.max_grad_norm,
                skip_nonfinite=optimization.skip_nonfinite,
                measure_norm=run.monitor.logs(run.step),
                give_up=run.stop.overdue,
            )
            if numbers is None:
                break
            run.step += 1
            run.monitor.step_done()
            run.observe(late.push(numbers))
            if run.at_milestone():
                run.observe(late.flush())
                run.save_and_evaluate()
    run.observe(late.flush())
    run.finish()


if __name__ == "__main__":
    sys.exit(main())
