"""What the trainer tells of its progress, to the log, ``metrics.jsonl``, the terminal and Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pico_fast.config import Config
from pico_fast.config_io import to_yaml
from pico_fast.flops import FLOPS_CONVENTION, parameter_counts
from pico_fast.monitor import console as text
from pico_fast.monitor.console import Console
from pico_fast.monitor.errors import WriteFailures
from pico_fast.monitor.interval import Interval
from pico_fast.monitor.logs import RunLog, evaluation_lines, train_lines
from pico_fast.monitor.memory import MemoryMeter
from pico_fast.monitor.metrics import MetricsFile
from pico_fast.monitor.provenance import provenance
from pico_fast.monitor.throughput import Throughput
from pico_fast.monitor.wandb_run import WandbRun


class Monitor:
    """Reports of one process's training, from ``start_step`` updates applied to ``config.training.max_steps``.

    ``metrics_file``, ``logs_dir`` and ``wandb_id_file`` are the run layout's; directories are made. ``tokens_per_step``
    counts all processes; ``flops_per_token`` is PaLM's count (:func:`pico_fast.flops.flops_per_token`); ``peak`` is
    FLOP/s of **all** devices together and the text of :func:`pico_fast.flops.peak_flops`. ``resumed``: the state came
    from a checkpoint. ``nonfinite_before`` is the count of non-finite losses at ``start_step``. Only one process of a
    run has a Monitor.

    Raises OSError if a file cannot be opened and MonitorError if Weights & Biases cannot start as configured. Once it
    is made, no failure to write stops the training: such failures are said once and counted.
    """

    def __init__(
        self,
        config: Config,
        *,
        run_dir: Path,
        metrics_file: Path,
        logs_dir: Path,
        wandb_id_file: Path,
        start_step: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak: tuple[float, str],
        device: torch.device,
        resumed: bool,
        nonfinite_before: int = 0,
    ):
        self._max_steps = config.training.max_steps
        self._log_every = config.monitoring.logging.log_every_n_steps
        self._pico_metrics = config.evaluation.metrics or []
        self._tokens_per_step, self._flops_per_step = tokens_per_step, flops_per_token * tokens_per_step
        self._peak = peak[0]
        self._memory = MemoryMeter(device)
        self._throughput = Throughput()
        self._interval = Interval()
        self._nonfinite_logged = nonfinite_before
        self._shown_seconds_per_step: float | None = None
        self._steps_are_announced = False
        self._closed = False

        run_dir.mkdir(parents=True, exist_ok=True)
        metrics_file.parent.mkdir(parents=True, exist_ok=True)
        self._console = Console(config.monitoring.progress, total_steps=self._max_steps, start_step=start_step)
        self._failures = WriteFailures(self._console.line)
        self._log = RunLog(
            logs_dir,
            config.monitoring.logging.log_level,
            self._console,
            lambda error: self._failures.add(f"log file in {logs_dir}", error),
        )
        try:
            self._wandb = self._start_wandb(config, run_dir, wandb_id_file)
            self._metrics = MetricsFile(metrics_file, lambda error: self._failures.add(str(metrics_file), error))
        except BaseException:
            self._log.close()
            self._console.close()
            raise
        self._start(config, device, start_step, resumed, peak[1])

    def _start_wandb(self, config: Config, run_dir: Path, id_file: Path) -> WandbRun | None:
        if not config.monitoring.save_to_wandb or config.monitoring.wandb.mode == "disabled":
            return None
        return WandbRun(
            config,
            run_dir=run_dir,
            id_file=id_file,
            on_error=lambda error: self._failures.add("Weights & Biases", error),
            say=self.warning,
        )

    def _start(self, config: Config, device: torch.device, start_step: int, resumed: bool, peak_text: str) -> None:
        if resumed or not self._metrics.was_empty:
            self.event("resume", step=start_step)
        facts = provenance(config, device)
        self.event("start", step=start_step, **facts)
        total = parameter_counts(config.model).total
        self._log.file_lines(["✨ Training Configuration", *to_yaml(config).splitlines(), "⛭ Runtime Summary:"])
        self._log.file_lines([f"Starting from step: {start_step}", f"└─ Total Parameters: {total:,}"])
        self._log.file_lines(f"└─ {name}: {value}" for name, value in facts.items())
        if self._console.mode != "off":
            self._console.line(f"MFU: percent {peak_text}; {FLOPS_CONVENTION}")

    def info(self, message: str) -> None:
        """A line in the log and on the console."""
        self._log.logger.info(message)

    def warning(self, message: str) -> None:
        """A warning in the log and on the console."""
        self._log.logger.warning(message)

    def event(self, kind: str, **fields: Any) -> None:
        """A line of our own in ``metrics.jsonl``; ``time`` (seconds since the epoch) is added."""
        self._metrics.write(kind, {**fields, "time": round(time.time(), 3)})

    def logs(self, step: int) -> bool:
        """Whether the report of ``step`` ends an interval, so that its gradient norm will be shown."""
        return step % self._log_every == 0

    def step_done(self) -> None:
        """A step's work is done, or on a GPU queued: the clock of tokens/s. Call it right after each step.

        Without these calls the reports of :meth:`train_step` are the clock, which is wrong for single steps around a
        pause: a trainer that reads its losses late reports two steps together there.
        """
        self._steps_are_announced = True
        self._throughput.step()

    def train_step(self, step: int, loss: float, lr: float, grad_norm: float | None, nonfinite_total: int) -> None:
        """Update ``step`` (counted from 0, before it is applied) had this mean loss, learning rate and gradient norm.

        Call it once for every step, in order; a constant delay changes nothing. ``nonfinite_total`` is the run's count
        of non-finite losses, this step's included. Every ``log_every_n_steps`` the mean of the finite losses since the
        last report is logged, as pico-train does.
        """
        if not self._steps_are_announced:
            self._throughput.step()
        self._interval.add(step, loss, lr, grad_norm, nonfinite_total)
        if self.logs(step):
            self._report()
        if self._console.mode == "bar":
            live = self._throughput.seconds_per_step() or self._shown_seconds_per_step
            self._console.advance(step + 1, " ".join(self._numbers(step, loss, lr, live)))

    def _rates(self, seconds_per_step: float | None) -> tuple[float | None, float | None]:
        """(tokens per second, MFU as a fraction)."""
        if seconds_per_step is None:
            return None, None
        return self._tokens_per_step / seconds_per_step, self._flops_per_step / seconds_per_step / self._peak

    def _numbers(self, step: int, loss: float, lr: float, seconds_per_step: float | None) -> list[str]:
        tokens_per_second, mfu = self._rates(seconds_per_step)
        parts = [f"loss {loss:.4f}", f"lr {lr:.2e}"]
        if seconds_per_step is not None and tokens_per_second is not None and mfu is not None:
            parts += [f"{text.count(tokens_per_second)} tok/s", f"MFU {mfu:.1%}"]
            parts += [f"eta {text.duration((self._max_steps - step - 1) * seconds_per_step)}"]
        return [*parts, text.size(self._memory.read())]

    def _report(self) -> None:
        """Log the interval and begin the next one."""
        done = self._interval
        seconds_per_step = self._throughput.seconds_per_step()
        tokens_per_second, mfu = self._rates(seconds_per_step)
        loss, nonfinite = done.mean_loss(), done.nonfinite_total - self._nonfinite_logged
        memory = self._memory.read(fresh=True)
        self._log.file_lines(train_lines(done.step, loss, done.lr, nonfinite))
        numbers = ", ".join(self._numbers(done.step, loss, done.lr, seconds_per_step or self._shown_seconds_per_step))
        norm = "" if done.grad_norm is None else f", gradient norm {done.grad_norm:.4g}"
        self._log.file_lines([f"Step {done.step} -- {numbers}{norm}"])
        if self._console.mode == "plain":
            self._console.line(f"step {done.step}: {numbers}")
        self.event(
            "train",
            step=done.step,
            loss=loss,
            lr=done.lr,
            grad_norm=done.grad_norm,
            tokens_per_second=tokens_per_second,
            mfu=mfu,
            memory_bytes=memory,
            tokens=(done.step + 1) * self._tokens_per_step,
            nonfinite=nonfinite,
            nonfinite_total=done.nonfinite_total,
        )
        if self._wandb is not None:
            self._wandb.log(
                done.step,
                {
                    "train/loss": loss,
                    "trainer/inf_or_nan_count": nonfinite,
                    "trainer/learning_rate": done.lr,
                    "perf/grad_norm": done.grad_norm,
                    "perf/tokens_per_second": tokens_per_second,
                    "perf/mfu": mfu,
                    "perf/memory_bytes": memory,
                },
            )
        self._nonfinite_logged = done.nonfinite_total
        self._shown_seconds_per_step = seconds_per_step or self._shown_seconds_per_step
        self._throughput.restart()
        self._interval = Interval()

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """The model with ``step`` updates applied was evaluated; what pico-train does not know goes below its lines."""
        pico = {name: value for name, value in results.items() if name in self._pico_metrics}
        ours = {name: value for name, value in results.items() if name not in self._pico_metrics}
        if pico:
            self._log.file_lines(evaluation_lines(step, pico))
        shown = ", ".join(f"{name} {text.number(value)}" for name, value in results.items())
        if ours:
            self._log.file_lines([f"Step {step} -- evaluation: {shown}"])
        self._console.line(f"step {step}: evaluation: {shown}")
        self.event("eval", step=step, **results)
        if self._wandb is not None:
            self._wandb.log(step, {f"eval/{name}": value for name, value in results.items()})

    def checkpoint(self, step: int, seconds: float, nbytes: int) -> None:
        """The state with ``step`` updates applied is on disk: ``nbytes`` in ``seconds``."""
        shown = f"{text.size(nbytes)} in {seconds:.2f} s"
        self._log.file_lines([f"Step {step} -- 💾 Saved Checkpoint: {shown}"])
        self._console.line(f"step {step}: checkpoint: {shown}")
        self.event("checkpoint", step=step, seconds=seconds, bytes=nbytes)
        if self._wandb is not None:
            self._wandb.log(step, {"perf/checkpoint_seconds": seconds, "perf/checkpoint_bytes": nbytes})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within counts neither for tokens/s nor for MFU."""
        with self._throughput.paused():
            yield

    def flush(self) -> None:
        """Report the last, partial interval, if there is one."""
        if self._interval.steps:
            self._report()

    def close(self) -> None:
        """Report the last, partial interval and release everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        if self._wandb is not None:
            self._wandb.finish()
        self._console.close()
        self._metrics.close()
        self._log.close()
        if summary := self._failures.summary():
            self._console.line(summary)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
