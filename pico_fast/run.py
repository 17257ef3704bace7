"""A run between its loop's steps: what it resumes from, what it saves, evaluates and shows. The loop is in train.py."""

from __future__ import annotations

import dataclasses
import gc
import math
import signal
from dataclasses import dataclass, field

import torch

from pico_fast import evaluate
from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.retention import due, prune
from pico_fast.checkpoint.rng import rng_state
from pico_fast.checkpoint.save import save_checkpoint
from pico_fast.checkpoint.state import state_slices, state_tensors
from pico_fast.config import Config
from pico_fast.data.errors import DataError
from pico_fast.data.evaluation_documents import Documents
from pico_fast.data.source import TokenRows
from pico_fast.data.stream import BatchStream
from pico_fast.data.tokenizer import Tokenizer
from pico_fast.interop.huggingface import export_model
from pico_fast.model.decoder import PicoDecoder
from pico_fast.model.sharding import tensor_parallel_dim
from pico_fast.monitor import Monitor, SilentMonitor
from pico_fast.parallel.agreement import Poll, from_main, highest, raise_first
from pico_fast.parallel.data_parallel import LossFunction
from pico_fast.parallel.layout import layout_of
from pico_fast.parallel.mesh import SINGLE, Parallel
from pico_fast.parallel.slices import gather_full
from pico_fast.runtime import GracefulStop, Runtime
from pico_fast.step import StepValues


class TrainingError(Exception):
    """Training cannot go on; the message says why and what the last good checkpoint is. Exit code 1."""


class DeviceAssertionError(TrainingError):
    """The device of this rank has failed; the other ranks learn of it only by losing a peer."""


def machine(config: Config, runtime: Runtime, parallel: Parallel) -> dict[str, str | int]:
    """What the bits of a result depend on beside the model and its data."""
    return {**runtime.describe(), "layout": str(layout_of(config.parallel, parallel.world_size))}


@dataclass
class Run:
    """A prepared run. ``step`` counts the updates applied to ``model``.

    Every rank of a parallel run has one, with the same counters, and calls the same methods in the same order.
    """

    config: Config
    runtime: Runtime
    layout: RunLayout
    stop: GracefulStop
    monitor: Monitor | SilentMonitor
    model: PicoDecoder
    loss_function: LossFunction
    optimizer: torch.optim.AdamW
    rows: TokenRows
    data_fingerprint: str
    tokenizer: Tokenizer | None
    documents: Documents | None
    parallel: Parallel = SINGLE
    step: int = 0
    saved_step: int | None = None  # the step that is durable on disk, as far as this process knows
    resumed_step: int | None = None
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    failed_saves: int = 0
    _overdue: Poll = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._overdue = Poll(self.parallel)

    def open_batches(self) -> BatchStream:
        """This rank's share of the batches from this step on."""
        return BatchStream(
            self.rows,
            batch_size=self.config.data.dataloader.batch_size,
            micro_batches=self.config.training.optimization.gradient_accumulation_steps,
            rank=self.parallel.dp_rank,
            world_size=self.parallel.dp_size,
            start_step=self.step,
            prefetch=self.config.data.dataloader.prefetch,
            should_stop=self.stop,
            pin_memory=self.runtime.device.type == "cuda",
        )

    def next_batch(self, batches: BatchStream) -> torch.Tensor | None:
        """The rows of the next step; None once the run is asked to stop, by a signal to any of its ranks.

        Raises DataError, on all ranks the one of the first that has one.
        """
        rows, failure = None, None
        if not self.stop():
            try:
                rows = next(batches, None)  # None: asked to stop while waiting for data
            except DataError as error:
                failure = error
        failed, stopped = highest(self.parallel, int(failure is not None), int(failure is None and rows is None))
        if failed:
            raise_first(self.parallel, failure)
        return None if stopped else rows

    def overdue(self) -> bool:
        """Whether the step under way is to be given up for the save, on all ranks alike."""
        return self._overdue.ask(self.stop.overdue())

    def observe(self, values: StepValues | None) -> None:
        """Count and show the numbers of a finished step. Raises TrainingError after too many non-finite losses."""
        if values is None:
            return
        finite = math.isfinite(values.loss) and (values.grad_norm is None or math.isfinite(values.grad_norm))
        self.nonfinite += not finite
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        self.monitor.train_step(values.step, values.loss, values.lr, values.grad_norm, self.nonfinite)
        limit = self.config.training.optimization.max_nonfinite_in_a_row
        if limit is not None and self.nonfinite_in_a_row >= limit:
            raise TrainingError(
                f"loss ({values.loss}) or gradient were not finite for {self.nonfinite_in_a_row} steps in a row, "
                f"up to step {values.step} "
                f"(training.optimization.max_nonfinite_in_a_row = {limit}); {self.last_good()}"
            )

    def device_assertion(self, error: RuntimeError) -> DeviceAssertionError:
        """What to say of an assertion that failed on the device, where the host reads of it a step late or more.

        Nothing can be saved: every later operation on that device fails too.
        """
        return DeviceAssertionError(
            f"an assertion failed on {self.runtime.device}, in step {self.step} or shortly before it "
            f"({str(error).splitlines()[0]}); a line `Assertion ... failed` above says which one. Most often a token "
            f"id or label is not in [0, model.vocab_size = {self.config.model.vocab_size}): the rows that are read "
            "were checked, so look at kernels and code of your own first. The same command with "
            "training.fabric.accelerator=cpu names the label, with CUDA_LAUNCH_BLOCKING=1 in the environment it stops "
            f"at the operation. The steps since the last save are lost; {self.last_good()}"
        )

    def _saves_at(self, step: int) -> bool:
        return due(step, self.config.checkpointing) or step == self.config.training.max_steps

    def _evaluates_at(self, step: int) -> bool:
        if self.documents is None:
            return False
        return step % self.config.eval_every_n_steps == 0 or step == self.config.training.max_steps

    def at_milestone(self) -> bool:
        """Whether this step is to be saved or evaluated."""
        return self._saves_at(self.step) or self._evaluates_at(self.step)

    def begin(self) -> None:
        """Save and evaluate the initial model; after a resume, only what the stopped run still owed."""
        if self.resumed_step is not None and self.saved_step is None:  # pico-train's state, or `latest` never moved
            self.save()
        if self.at_milestone():
            self.save_and_evaluate()

    def save_and_evaluate(self) -> None:
        """What is due at this step and not there yet."""
        with self.monitor.paused():
            if self._saves_at(self.step):
                self.save()
            if self._evaluates_at(self.step) and not self._evaluated_before():
                self.evaluate()
            gc.collect()  # the loop runs with collection off; here a pause costs nothing

    def _evaluated_before(self) -> bool:
        """Whether the run that this one resumes has left results; rank 0 looks, a shared disk may lag on others."""
        return self.step == self.resumed_step and from_main(
            self.parallel, lambda: self.layout.eval_results(self.step).exists()
        )

    def finish(self) -> None:
        """Save the last step, whether all are done or a signal has come. Raises CheckpointError if that fails."""
        with self.monitor.paused():
            self.save(last=True)
        self.monitor.flush()
        (received,) = highest(self.parallel, self.stop.received or 0)
        if received:
            name = signal.Signals(received).name
            self.monitor.info(f"{name}: stopped after {self.step} steps; the same command goes on from there")
        elif self.step >= self.config.training.max_steps:
            self.monitor.info(f"Done: {self.step} steps, in {self.layout.root}")

    def save(self, *, last: bool = False) -> None:
        """Commit a checkpoint of this step. A failure is shown and training goes on, ``max_failed_saves`` times.

        A failure is a CheckpointError: whatever goes wrong on any rank while files are written, which all ranks are
        told of. What goes wrong before (no memory to gather the weights, a collective that fails) is not the disk's
        fault and ends the run, with a traceback where it happened: a rank that fails alone cannot call the others out
        of a collective, they learn of it as PeerLostError when its process is gone.
        """
        if self.step == self.saved_step:
            return
        weights = gather_full(self.model, self.parallel) or {}  # the export's, on rank 0
        try:
            report = save_checkpoint(
                self.layout,
                self.step,
                tensors=state_tensors(self.model, self.optimizer),
                slices=state_slices(self.model, self.optimizer, self.parallel),
                meta=self._meta(),
                write_extra=lambda folder: export_model(folder, weights, self.config.model, self.tokenizer),
                parallel=self.parallel,
            )
        except CheckpointError as error:
            self.failed_saves += 1
            limit = self.config.checkpointing.max_failed_saves
            if last or self.failed_saves >= limit:
                raise
            self.monitor.warning(f"{error}; training goes on (failed save {self.failed_saves} of at most {limit})")
            return
        self.failed_saves, self.saved_step = 0, self.step
        self.monitor.checkpoint(self.step, report.seconds, report.bytes)
        if not self.parallel.is_main:
            return
        try:
            prune(self.layout, self.config.checkpointing)
        except (OSError, CheckpointError) as error:
            self.monitor.warning(f"old checkpoints stay: {error}")

    def _meta(self) -> dict[str, object]:
        return {
            "rng": rng_state(),
            "machine": machine(self.config, self.runtime, self.parallel),
            "nonfinite": self.nonfinite,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "data_fingerprint": self.data_fingerprint,
            "tensor_parallel_dim": {name: tensor_parallel_dim(name) for name, _ in self.model.named_parameters()},
            "config": dataclasses.asdict(self.config),
        }

    def last_good(self) -> str:
        """Where training can go on from, in words."""
        step = self.layout.latest_step()
        return "there is no checkpoint" if step is None else f"the last checkpoint is {self.layout.step_dir(step)}"

    def evaluate(self) -> None:
        """Perplexity of the live weights, into ``eval_results/step_N.json``; given up if the run is asked to stop."""
        assert self.documents is not None
        result = evaluate.evaluate_perplexity(
            self.model,
            self.documents,
            batch_size=self.config.evaluation.paloma.batch_size,
            device=self.runtime.device,
            should_stop=self.stop,
            parallel=self.parallel,
        )
        if result is not None and self.parallel.is_main:
            self.monitor.evaluation(self.step, result.metrics())
            path = self.layout.eval_results(self.step)
            try:
                evaluate.write_eval_results(path, result)
            except OSError as error:  # the figures are in the log and metrics; no reason to lose the run
                self.monitor.warning(f"{path} was not written: {error.strerror or error}; training goes on")
