"""The trainer's command in several processes, as a cluster's launcher or torchrun starts it."""

import os
import runpy
import sys
import time
from pathlib import Path

import psutil

from pico_fast.checkpoint.layout import RunLayout
from tests.ranks import CONTEXT, environments


def run_command(command: list[str], environment: dict[str, str], log: Path) -> None:
    """``python -m COMMAND``, or ``python SCRIPT.py``, in this process, with all it prints in ``log``."""
    os.environ.update(environment, PYTHONWARNINGS="ignore::FutureWarning")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


class Trainers:
    """Processes that each run a command; one for every rank, or torchrun, which starts them as its own."""

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]], folder: Path):
        self.logs = [folder / f"process{number}.log" for number in range(len(commands))]
        arguments = zip(commands, environments, self.logs, strict=True)
        self.processes = [CONTEXT.Process(target=run_command, args=given) for given in arguments]

    @classmethod
    def ranks(cls, config_file: Path, world_size: int, *overrides: str, script: str = "pico_fast.train") -> "Trainers":
        command = [script, "--config", str(config_file), *overrides]
        return cls([command] * world_size, environments(world_size), config_file.parent)

    @classmethod
    def torchrun(cls, config_file: Path, world_size: int, *overrides: str, script: str = "") -> "Trainers":
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        trainer = [script] if script else ["-m", "pico_fast.train"]
        return cls([[*launcher, *trainer, "--config", str(config_file), *overrides]], [{}], config_file.parent)

    def __enter__(self) -> "Trainers":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            if process.is_alive():
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        """The process of ``rank``: below torchrun, or the one that was started for it."""
        if len(self.processes) > 1:
            return self.processes[rank].pid
        children = psutil.Process(self.processes[0].pid).children(recursive=True)
        return next(child.pid for child in children if child.environ().get("RANK") == str(rank))

    def wait_for_step(self, layout: RunLayout, step: int) -> None:
        deadline = time.monotonic() + 120
        while not (layout.metrics.exists() and f'"step": {step},' in layout.metrics.read_text()):
            ended = [log for process, log in zip(self.processes, self.logs, strict=True) if not process.is_alive()]
            assert not ended, ended[0].read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def outputs(self, timeout: float = 60) -> list[str]:
        """What each process printed, after all have ended."""
        deadline = time.monotonic() + timeout
        for process, log in zip(self.processes, self.logs, strict=True):
            process.join(max(0.0, deadline - time.monotonic()))
            assert not process.is_alive(), f"still running after {timeout:g} s:\n{log.read_text()}"
        return [log.read_text() for log in self.logs]

    @property
    def codes(self) -> list[int]:
        return [process.exitcode for process in self.processes]
