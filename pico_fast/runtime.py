"""The process: its device, precision, threads, place among other processes, and the signals that end it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch

from pico_fast.config import Config
from pico_fast.cores import usable_cores


class UsageError(Exception):
    """Something the user must change; shown as one message, exit code 2."""


# training.fabric.precision -> (dtype of parameters and optimizer state, dtype of activations)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "32-true": (torch.float32, torch.float32),
}


def world_size() -> int:
    """Processes that torchrun started (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among those that torchrun started (0 without it)."""
    return int(os.environ.get("RANK", "0"))


def local_world_size() -> int:
    """Processes that torchrun started on this node (1 without it)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Runtime:
    """What the rest of a run needs to know of its process. ``warnings`` are for the user, one line each."""

    device: torch.device
    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    threads: int
    warnings: tuple[str, ...] = ()

    def describe(self) -> dict[str, str | int]:
        """What the bits of a result depend on beside the configuration."""
        return {"device": self.device.type, "threads": self.threads, "torch": torch.__version__}


def _device(accelerator: str) -> tuple[torch.device, str | None]:
    """This process's device, and what to tell the user about it. Raises UsageError where devices do not suffice."""
    index, processes = int(os.environ.get("LOCAL_RANK", "0")), local_world_size()
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and world_size() == 1,  # it has no collectives
        "cpu": True,
    }
    wanted = {"gpu": "cuda"}.get(accelerator, accelerator)
    kind = next(kind for kind, there in available.items() if there) if wanted == "auto" else wanted
    if kind == "mps" and world_size() > 1:
        raise UsageError(
            f"training.fabric.accelerator: mps trains in one process, {world_size()} were started; "
            "start one, or give training.fabric.accelerator=cpu"
        )
    if kind == "cuda" and available[kind] and torch.cuda.device_count() < processes:
        count = torch.cuda.device_count()
        raise UsageError(
            f"{processes} processes were started on a node with {count} GPU(s), one is needed for each: "
            f"give --nproc-per-node {count}, or training.fabric.accelerator=cpu"
        )
    if available[kind]:
        return torch.device(kind, index) if kind == "cuda" else torch.device(kind), None
    return torch.device("cpu"), (
        f"training.fabric.accelerator is {accelerator!r} and this machine has none: training on the CPU "
        "(training.fabric.accelerator=cpu says so without this line)"
    )


def start_runtime(config: Config) -> Runtime:
    """Choose device and precision and set torch's thread count.

    torchrun sets OMP_NUM_THREADS=1, which would leave a CPU run on one core: ``runtime.threads`` (default: the cores
    that this process may use, shared by the processes of this node) is set here instead. Raises UsageError where the
    node has too few devices for its processes.
    """
    fabric, processes = config.training.fabric, world_size()
    warnings = []
    if fabric.num_nodes * fabric.num_devices != processes and (fabric.num_nodes, fabric.num_devices) != (1, 1):
        started = "the 1 process started here decides" if processes == 1 else f"the {processes} started here decide"
        warnings.append(
            f"training.fabric asks for {fabric.num_nodes} node(s) x {fabric.num_devices} device(s); {started}"
        )
    device, warning = _device(fabric.accelerator)
    if warning:
        warnings.append(warning)
    threads = config.runtime.threads or max(1, usable_cores() // local_world_size())
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Runtime(device, *PRECISIONS[fabric.precision], threads, tuple(warnings))


class GracefulStop:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request that the loop reads between steps; a second one exits at once.

    torchrun forwards the signal that it and its worker have both received from the terminal, so signals within
    ``same_request_s`` seconds of the first count as the same request.
    """

    same_request_s = 2.0
    grace_s = 10.0  # torchrun kills its workers 30 s after it was asked to stop, and the save takes its time too
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first = 0.0

    def __call__(self) -> bool:
        """Whether the run has been asked to stop."""
        return self.received is not None

    def overdue(self) -> bool:
        """Whether the step under way should be given up for the save: ``grace_s`` after the request."""
        return self.received is not None and time.monotonic() - self._first > self.grace_s

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = signal.Signals(number), now
            text = f"\n{self.received.name}: finishing the step, then saving; again: exit at once, unsaved\n"
            if rank() == 0:  # torchrun signals every process; the run's last line names a signal to any of them
                with contextlib.suppress(OSError):  # os.write: print may be interrupted by this very signal
                    os.write(2, text.encode())
        elif now - self._first > self.same_request_s:
            os._exit(128 + number)  # the last committed checkpoint stands; nothing is half-renamed by this

    def __enter__(self) -> GracefulStop:
        self._before = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """No garbage collection inside: a full collection of a training process has been seen to pause it for half a
    second (nanochat). Objects alive at the start are not looked at again; reference counting goes on as always."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
