"""State of one run of the GPU benchmarks: its budget, its device, and the results so far, on disk as they come."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from pico_kernels._triton import PICO_SHAPES

from benchmarks.kernel_cases import COPY, OPS, OURS, ROPE, THEIRS, Case, cases
from benchmarks.kernel_clocks import Ceilings, Clock, ceilings, clock_for
from benchmarks.kernel_timing import NotEnoughMemoryError, lines_of, measure

VARIABLE = "PICO_GPU_BENCHMARK"
_ALSO_TIMED = {"attention": (ROPE,), "linear_cross_entropy": ()}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``benchmarks.gpu`` tells the pytest it starts, as JSON in one environment variable.

    ``deadline``: time.time() after which no further case is begun; ``lines``: file that gets a JSON line per result;
    ``rehearse``: a CPU and tiny shapes, to try the machinery; ``only``: the ops to measure.
    """

    deadline: float | None = None
    lines: str | None = None
    seconds_per_case: float = 2.0
    rehearse: bool = False
    only: tuple[str, ...] = OPS

    def to_environment(self) -> dict[str, str]:
        """The variable to set."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}


class Session:
    """Measures a case when it is first asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.unavailable = None if settings.rehearse or torch.cuda.is_available() else "no CUDA device"
        tiny = dataclasses.replace(PICO_SHAPES[0], vocab=131)  # the interpreter is slow
        rehearsed = [Case(op, tiny, 16, seq_len=8) for op in OPS if op in settings.only]
        chosen = rehearsed if settings.rehearse else cases(settings.only)
        self._cases = {case.name: case for case in chosen}
        self._lines: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        self._device = torch.device("cpu" if settings.rehearse else "cuda")
        self._clock: Clock | None = None
        self._ceilings = Ceilings(0.0, 0.0)

    @classmethod
    def from_environment(cls) -> Session:
        """With the settings of the environment variable, or the defaults."""
        return cls(Settings(**json.loads(os.environ.get(VARIABLE, "{}"))))

    @property
    def case_names(self) -> list[str]:
        """All cases, in the order in which they are worth measuring."""
        return list(self._cases)

    @property
    def points(self) -> list[tuple[str, str, str]]:
        """All there is to ask :meth:`line` for: case, direction, opponent; a case's own follow one another."""
        return [
            (case.name, direction, name)
            for case in self._cases.values()
            for direction in case.directions
            for name in (*OURS[case.op], *THEIRS[case.op], *_ALSO_TIMED.get(case.op, (COPY,)))
        ]

    def line(self, case: str, direction: str, opponent: str) -> dict[str, Any]:
        """The result, or ``{"reason": why there is none, "is_error": ours is wrong}``."""
        if case not in self._lines:
            self._lines[case] = self._measure(self._cases[case])
        absent = {"reason": "not measured", "is_error": False}
        lines = self._lines[case]
        return lines.get((opponent, direction)) or lines.get((opponent, "")) or lines.get(("", "")) or absent

    def _measure(self, case: Case) -> dict[tuple[str, str], dict[str, Any]]:
        settings = self.settings
        if settings.deadline is not None and time.time() > settings.deadline:
            return self._keep(case, {"": "the time is used up"}, [])
        if self._clock is None:
            self._clock = clock_for(self._device)
            self._ceilings = ceilings(self._device, self._clock)
        try:
            result = measure(case, self._device, self._clock, settings.seconds_per_case)
        except (NotEnoughMemoryError, torch.cuda.OutOfMemoryError) as error:
            return self._keep(case, {"": f"not enough memory: {error}"}, [])
        except Exception as error:  # a device error stays for the rest of the process: keep what there is
            return self._keep(case, {"": f"measuring failed: {type(error).__name__}: {error}"}, [])
        return self._keep(case, result.refused, lines_of(result, self._ceilings))

    def _keep(
        self, case: Case, refused: dict[str, str], lines: list[dict[str, Any]]
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """Index the results, and append them to the file."""
        kept = {(line["opponent"], line["direction"]): line for line in lines}
        for name, reason in refused.items():
            refused_ours = name in OURS[case.op] and reason.startswith("not timed")
            is_error = refused_ours or reason.startswith("measuring failed")
            kept[name, ""] = {"case": case.name, "opponent": name, "reason": reason, "is_error": is_error}
        if self.settings.lines:
            with Path(self.settings.lines).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept.values())
        return kept


def benchmark_json(lines: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    """Result lines in the form of pytest-benchmark's JSON, for a run without pytest-benchmark or cut short."""
    benchmarks = []
    for line in lines:
        if "reason" in line:
            continue
        seconds = sorted(line["seconds"])
        middle = len(seconds) // 2
        median = seconds[middle] if len(seconds) % 2 else (seconds[middle - 1] + seconds[middle]) / 2
        benchmarks.append(
            {
                "group": f"{line['op']} {line['direction']}",
                "name": f"test_kernel[{line['case']}-{line['direction']}-{line['opponent']}]",
                "params": {key: line[key] for key in ("case", "direction", "opponent")},
                "extra_info": {key: value for key, value in line.items() if key != "seconds"},
                "stats": {
                    "min": seconds[0],
                    "max": seconds[-1],
                    "median": median,
                    "rounds": len(seconds),
                    "data": line["seconds"],
                },
            }
        )
    return {"machine_info": machine, "benchmarks": benchmarks}
