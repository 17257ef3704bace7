"""Markdown tables and plots from pytest-benchmark's JSON: ``python -m benchmarks.report FILE.json [--out DIR]``.

Benchmarks of one group are one table: a row per parameters, a column per opponent (the parameter ``opponent`` or
``impl``), median times. Our fastest kind, ``triton`` where there is one and else ``torch``, is the subject: every
other time is also given as a multiple of it. Where the JSON knows them, the bytes an op must move or the products it
must take, the percent of the copy bandwidth or matmul rate of the same run, the host time per call, peak memory and the
targets met are there too. DIR (default: beside FILE) gets FILE's name with ``.md``, and a PNG per group if matplotlib
is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernel_cases import ROPE
from benchmarks.kernel_targets import target_lines

SUBJECTS = ("triton", "torch")
CEILINGS = {"percent_of_copy": "copy bandwidth", "percent_of_matmul": "matmul rate"}


class ReportError(Exception):
    """The file holds nothing to report; the message says why."""


@dataclass(frozen=True)
class Row:
    """One benchmark: ``seconds`` is its median; ``extra`` what the benchmark noted of itself."""

    group: str
    variant: str
    opponent: str
    seconds: float
    extra: dict[str, Any]

    @property
    def percent(self) -> float | None:
        """Percent of the copy bandwidth or the matmul rate measured in the same run."""
        return next((self.extra[key] for key in CEILINGS if key in self.extra), None)

    @property
    def work(self) -> str:
        """What the op must do: ``100.0 MB`` to move or ``2.5 TFLOP`` to compute; empty where that is not known."""
        if "flops" in self.extra:
            return f"{self.extra['flops'] / 1e12:.3g} TFLOP"
        return f"{self.extra['bytes'] / 1e6:.1f} MB" if "bytes" in self.extra else ""

    @property
    def wall_seconds(self) -> float | None:
        """Host time per call until the result is there."""
        return self.extra.get("wall_seconds")


@dataclass(frozen=True)
class Group:
    """One table: rows by (variant, opponent), both in the order of the file."""

    name: str
    rows: dict[tuple[str, str], Row]

    @property
    def shown(self) -> list[Row]:
        """All but the rotation timed beside attention, which has a table of its own."""
        return [row for row in self.rows.values() if row.opponent != ROPE]

    @property
    def variants(self) -> list[str]:
        """Row labels: by tokens and width where those are known."""
        rows = list(self.rows.values())
        if all("d_model" in row.extra for row in rows):
            rows.sort(key=lambda row: (row.extra["tokens"], row.extra.get("seq_len", 0), row.extra["d_model"]))
        return list(dict.fromkeys(row.variant for row in rows))

    @property
    def opponents(self) -> list[str]:
        """Column labels, the subject first."""
        names = dict.fromkeys(row.opponent for row in self.shown)
        return sorted(names, key=lambda name: name != self.subject)

    @property
    def subject(self) -> str | None:
        """The opponent that the others are compared with."""
        names = {opponent for _, opponent in self.rows}
        return next((name for name in SUBJECTS if name in names), None)

    @property
    def ceiling(self) -> str | None:
        """What percentages are of."""
        return next((text for key, text in CEILINGS.items() if any(key in row.extra for row in self.shown)), None)

    def ratio(self, row: Row) -> float | None:
        """Its time over the subject's; None for the subject and where that was not measured."""
        subject = self.rows.get((row.variant, self.subject or ""))
        return None if subject is None or subject is row else row.seconds / subject.seconds


def load(path: Path) -> tuple[dict[str, Any], list[Group]]:
    """The JSON as a whole, and its groups. Raises ReportError."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: not JSON: {error}") from error
    benchmarks = found.get("benchmarks") if isinstance(found, dict) else None
    if not isinstance(benchmarks, list):
        raise ReportError(f"{path}: not pytest-benchmark's JSON: no list 'benchmarks'")
    if not benchmarks:
        raise ReportError(f"{path}: no benchmark was measured")
    groups: dict[str, Group] = {}
    for benchmark in benchmarks:
        try:
            row = _row(benchmark)
        except (KeyError, TypeError) as error:
            raise ReportError(f"{path}: a benchmark lacks {error}") from error
        groups.setdefault(row.group, Group(row.group, {})).rows[row.variant, row.opponent] = row
    return found, list(groups.values())


def _row(benchmark: dict[str, Any]) -> Row:
    params = {key: _plain(value) for key, value in (benchmark.get("params") or {}).items()}
    extra = benchmark.get("extra_info") or {}
    opponent = extra.get("opponent") or params.get("opponent") or params.get("impl") or benchmark["name"]
    if "d_model" in extra:
        variant = f"{extra['size']}, d {extra['d_model']}, {extra['tokens'] / 1024:g}k tokens"
        variant += f", sequences of {extra['seq_len']}" if extra["op"] == "attention" else ""
    else:
        variant = ", ".join(value for key, value in params.items() if key not in ("impl", "opponent"))
    group = benchmark.get("group") or benchmark["name"].partition("[")[0]
    return Row(group, variant or "all", opponent, float(benchmark["stats"]["median"]), extra)


def _plain(value: Any) -> str:
    """A parameter as text; pytest-benchmark writes dtypes as ``UNSERIALIZABLE[torch.bfloat16]``."""
    text = re.sub(r"^UNSERIALIZABLE\[(.*)\]$", r"\1", str(value))
    return text.removeprefix("torch.") if text != "torch" else text


def time_text(seconds: float) -> str:
    """Three digits with a unit: ``12.3 µs``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def markdown(found: dict[str, Any], groups: list[Group], plots: dict[str, str]) -> str:
    """The report; ``plots`` is group name to file name."""
    machine = found.get("machine_info") or {}
    cpu = machine.get("cpu") or {}
    device = machine.get("device") or cpu.get("brand_raw") or machine.get("machine") or "unknown machine"
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "cuda") if machine.get(name)]
    date = machine.get("date") or str(found.get("datetime") or "")[:10]
    lines = ["# Benchmarks", "", ", ".join(filter(None, [device, *versions, date])) + ".", ""]
    measured = [row.extra | {"seconds": row.seconds} for g in groups for row in g.rows.values()]
    for key, what, unit in (
        ("copy_bytes_per_second", "Copy bandwidth", "TB/s"),
        ("matmul_flops_per_second", "Matmul rate in bfloat16", "TFLOP/s"),
    ):
        for rate in sorted({extra[key] for extra in measured if key in extra}):
            lines += [f"{what} measured in this run: {rate / 1e12:.2f} {unit} (100 %).", ""]
    lines += target_lines(measured, found.get("planned") or ())
    for group in groups:
        lines += [f"## {group.name}", "", *_time_table(group), *_wall_table(group), *_memory_table(group)]
        if group.name in plots:
            lines += [f"![{group.name}]({plots[group.name]})", ""]
    lines += _rope_table(measured)
    if found.get("not_measured"):
        lines += ["## Not measured", "", *(f"- {reason}" for reason in found["not_measured"]), ""]
    return "\n".join(lines)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _cell(group: Group, row: Row | None) -> str:
    if row is None:
        return ""
    ratio = group.ratio(row)
    notes = [] if ratio is None else [f"{ratio:.2f}x"]
    notes += [f"{row.extra['flops'] / row.seconds / 1e12:.3g} TFLOP/s"] if "flops" in row.extra else []
    notes += [] if row.percent is None else [f"{row.percent:.0f} %"]
    return time_text(row.seconds) + (f" ({', '.join(notes)})" if notes else "")


def _time_table(group: Group) -> list[str]:
    sized = any(row.work for row in group.rows.values())
    rows = []
    for variant in group.variants:
        cells = [group.rows.get((variant, opponent)) for opponent in group.opponents]
        size = next((cell.work for cell in cells if cell and cell.work), "")
        rows.append([variant, *([size] if sized else []), *(_cell(group, cell) for cell in cells)])
    return _table(["", *(["at least"] if sized else []), *group.opponents], rows)


def _wall_table(group: Group) -> list[str]:
    """Host time per call: what a model that is not captured in a graph pays for small shapes."""
    if all(row.wall_seconds is None for row in group.shown):
        return []
    rows = []
    for variant in group.variants:
        walls = [row.wall_seconds if (row := group.rows.get((variant, name))) else None for name in group.opponents]
        rows.append([variant, *("" if wall is None else time_text(wall) for wall in walls)])
    return ["Eager wall time per call:", "", *_table(["", *group.opponents], rows)]


def _memory_table(group: Group) -> list[str]:
    """The most memory that forward and backward held at once, beyond the inputs."""
    if all(row.extra.get("peak_bytes") is None for row in group.shown):
        return []
    rows = []
    for variant in group.variants:
        found = [
            row.extra.get("peak_bytes") if (row := group.rows.get((variant, n))) else None for n in group.opponents
        ]
        rows.append([variant, *("" if peak is None else f"{peak / 1e6:.0f} MB" for peak in found)])
    return ["Peak memory of forward and backward beyond the inputs:", "", *_table(["", *group.opponents], rows)]


def _rope_table(measured: list[dict[str, Any]]) -> list[str]:
    """What rotating q and k beforehand adds to attention: the most that fusing the two could save."""
    steps: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    for line in measured:
        if line.get("op") == "attention":
            key = line["size"], line["head_dim"], line["seq_len"]
            steps.setdefault(key, {}).setdefault(line["opponent"], []).append(line["seconds"])
    rows = []
    for (size, head_dim, seq_len), found in steps.items():
        name = "auto" if "auto" in found else "triton"
        rope, attention = found.get(ROPE, []), found.get(name, [])
        if len(rope) == len(attention) == 2:
            share = f"{100 * sum(rope) / sum(attention):.0f} %"
            times = [time_text(sum(rope)), time_text(sum(attention)), name]
            rows.append([f"{size}, head_dim {head_dim}, sequences of {seq_len}", *times, share])
    heads = ["", "rope", "attention", "by", "share"]
    return ["## RoPE beside attention, forward + backward", "", *_table(heads, rows)] if rows else []


def plot(group: Group, path: Path) -> None:
    """Bars: percent of the ceiling, or, where there is none, time as a multiple of the subject's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ceiling = group.ceiling
    figure = Figure(figsize=(max(6.0, 2.0 + 1.6 * len(group.variants)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.85 / len(group.opponents)
    for index, opponent in enumerate(group.opponents):
        heights = []
        for variant in group.variants:
            row = group.rows.get((variant, opponent))
            value = None if row is None else row.percent if ceiling else group.ratio(row) or 1.0
            heights.append(float("nan") if value is None else value)
        places = [place + (index - (len(group.opponents) - 1) / 2) * width for place in range(len(heights))]
        bars = axes.bar(places, heights, width, label=opponent, color=f"C{index}")
        axes.bar_label(bars, fmt=lambda value: "" if value != value else f"{value:.0f}" if ceiling else f"{value:.1f}",
                       fontsize=7)  # fmt: skip
    axes.axhline(100 if ceiling else 1, color="black", linewidth=0.8)
    labels = [variant.replace(", ", "\n") for variant in group.variants]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel(f"percent of the {ceiling}" if ceiling else f"time, multiple of {group.subject or 'itself'}")
    axes.set_title(f"{group.name} ({'higher' if ceiling else 'lower'} is better)")
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Write the report and print where it is; exit code 1 if there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--out", type=Path, help="folder for the report (default: that of FILE)")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out or arguments.file.parent
    try:
        found, groups = load(arguments.file)
    except ReportError as error:
        sys.stderr.write(f"benchmarks.report: {error}\n")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    plots: dict[str, str] = {}
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is missing: no plots")
    else:
        for group in groups:
            slug = re.sub(r"[^A-Za-z0-9]+", "-", group.name).strip("-")
            plots[group.name] = f"{arguments.file.stem}-{slug}.png"
            plot(group, out / plots[group.name])
    target = out / f"{arguments.file.stem}.md"
    target.write_text(markdown(found, groups, plots) + "\n")
    print(f"{target} and {len(plots)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
