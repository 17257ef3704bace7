"""Train a Pico decoder.

``torchrun --standalone --nproc-per-node N -m pico_fast.train --config FILE [section.key=value ...]``

:func:`train` sets a run up and :func:`run_steps` is the loop; one optimizer step is
:func:`pico_fast.step.training_step`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.lock import RunLockedError
from pico_fast.config import Config
from pico_fast.config_io import ConfigError, load_config, to_yaml
from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.dry_run import print_dry_run
from pico_fast.env import EnvFileError, load_env, redact, refuse_secrets
from pico_fast.monitor import MonitorError
from pico_fast.optim import learning_rate
from pico_fast.parallel.agreement import PeerLostError, naming_lost_peers, origin
from pico_fast.parallel.mesh import start_parallel, stop_parallel
from pico_fast.run import DeviceAssertionError, Run, TrainingError
from pico_fast.runtime import GracefulStop, UsageError, frozen_gc, rank, start_runtime, world_size
from pico_fast.setup_run import prepare_run
from pico_fast.step import LateReader, training_step

# Launchers end all processes when the first one ends, and name that one as the cause. So nobody ends before the rank
# that has something to say; torchrun then takes a tenth of a second to end those who wait, others may not do it
SPEAKER_S = 30.0  # for a rank that leaves the message to another, which may still be importing
CULPRIT_S = 5.0  # for a rank that has lost a peer, which may still be writing its traceback

USER_ERRORS = (ConfigError, UsageError, DataError, TokenizerError, RunLockedError, MonitorError, EnvFileError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done or stopped by a signal, 1 failed, 2 wrong input.

    Under torchrun every process returns the same code, and rank 0 prints the message.
    """
    parser = argparse.ArgumentParser(prog="pico_fast.train", description="Train a Pico decoder.")
    parser.add_argument(
        "--config", "--config_path", type=Path, help="a YAML file, pico-train's too; none: the defaults"
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes and costs, train nothing")
    parser.add_argument("--print-config", action="store_true", help="print every key and its value, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    parsed = parser.parse_intermixed_args(arguments)
    stop = GracefulStop()
    try:
        load_env(Path.cwd())
        config = load_config(parsed.config, parsed.overrides, world_size=world_size())
        refuse_secrets(config)
        if parsed.print_config or parsed.dry_run:
            if rank() == 0:
                print(to_yaml(config), end="") if parsed.print_config else print_dry_run(config)
        else:
            train(config, stop)
            stop_parallel()
    except USER_ERRORS as error:
        _complain(error)
        return 2
    except (CheckpointError, TrainingError) as error:
        _complain(error)
        return 1
    except PeerLostError as error:
        _complain(error)
        sys.stdout.flush()
        if not stop():  # else the launcher knows who ended first
            _wait_to_be_ended(CULPRIT_S)
        os._exit(1)  # an orderly exit would wait for the work queued with the process that is gone
    return 0


def _complain(error: Exception) -> None:
    """Print ``error`` on rank 0, which knows of every rank's once they have met.

    Before that a node speaks for itself, since its files may be others, and the node's other ranks wait for its first
    one to do so. What is one rank's alone (its peer is lost, its device has failed) it says itself.
    """
    met = dist.is_initialized()
    if rank() == 0:
        speaker = origin(error)
    elif isinstance(error, (PeerLostError, DeviceAssertionError)) or (not met and os.environ.get("LOCAL_RANK") == "0"):
        speaker = f"rank {rank()}: "
    else:
        if not met:
            _wait_to_be_ended(SPEAKER_S)
        return
    print(f"pico_fast.train: {speaker}{redact(str(error))}", file=sys.stderr, flush=True)


def _wait_to_be_ended(seconds: float) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(seconds)


def train(config: Config, stop: GracefulStop | None = None) -> None:
    """Train as ``config`` says, from its newest checkpoint if there is one, until ``max_steps`` or a signal.

    ``stop`` tells afterwards whether there was a signal. Raises the errors of :data:`USER_ERRORS` before the first step
    for wrong input; CheckpointError when ``checkpointing.max_failed_saves`` saves have failed in a row, or the last one
    has; TrainingError for a loss that stays non-finite; each on all ranks. TrainingError for an assertion that failed
    on this rank's device, PeerLostError if another process has died.
    """
    stop = stop or GracefulStop()
    runtime = start_runtime(config)
    parallel = start_parallel(config, runtime.device)
    with naming_lost_peers(parallel), stop, prepare_run(config, runtime, stop, parallel) as run:
        try:
            with naming_lost_peers(parallel):
                run_steps(run)
        except PeerLostError as error:
            raise PeerLostError(f"{error}; {run.last_good()}") from error
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
        while run.step < config.training.max_steps:
            try:
                micro_batches = run.next_batch(batches)
            except DataError as error:
                run.observe(late.flush())
                run.save(last=True)
                message = f"{origin(error)}{error}; step {run.step} is saved, mend the data and start again"
                raise DataError(message) from None
            if micro_batches is None:  # asked to stop
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
                give_up=run.overdue,
                loss_function=run.loss_function,
                parallel=run.parallel,
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
    from torch.distributed.elastic.multiprocessing.errors import record  # tells torchrun which rank failed, and how

    sys.exit(record(main)())
