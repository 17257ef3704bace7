"""Markdown tables and plots from pytest-benchmark's JSON: ``python -m benchmarks.report FILE.json [--out DIR]``.

Benchmarks of one group are one table: a row per parameters, a column per opponent (the parameter ``opponent`` or
``impl``), median times. Our fastest kind, ``triton`` where there is one and else ``torch``, is the subject: every
other time is also given as a multiple of it. Where the JSON knows them, the bytes an op must move, the percent of the
measured copy bandwidth, the host time per call and the targets met are there too. DIR (default: beside FILE) gets
FILE's name with ``.md``, and a PNG per group if matplotlib is installed.
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

from benchmarks.kernel_targets import target_lines

SUBJECTS = ("triton", "torch")


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
        """Percent of the copy bandwidth measured in the same run."""
        return self.extra.get("percent_of_copy")

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
    def variants(self) -> list[str]:
        """Row labels: by tokens and width where those are known."""
        rows = list(self.rows.values())
        if all("d_model" in row.extra for row in rows):
            rows.sort(key=lambda row: (row.extra["tokens"], row.extra["d_model"]))
        return list(dict.fromkeys(row.variant for row in rows))

    @property
    def opponents(self) -> list[str]:
        """Column labels, the subject first."""
        names = list(dict.fromkeys(opponent for _, opponent in self.rows))
        return sorted(names, key=lambda name: name != self.subject)

    @property
    def subject(self) -> str | None:
        """The opponent that the others are compared with."""
        names = {opponent for _, opponent in self.rows}
        return next((name for name in SUBJECTS if name in names), None)

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
    rates = {row.extra["copy_bytes_per_second"] for g in groups for row in g.rows.values() if row.percent is not None}
    lines += [f"Copy bandwidth measured in this run: {rate / 1e12:.2f} TB/s (100 %).\n" for rate in sorted(rates)]
    lines += target_lines([row.extra | {"seconds": row.seconds} for g in groups for row in g.rows.values()])
    for group in groups:
        lines += [f"## {group.name}", "", *_time_table(group), *_wall_table(group)]
        if group.name in plots:
            lines += [f"![{group.name}]({plots[group.name]})", ""]
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
    notes += [] if row.percent is None else [f"{row.percent:.0f} %"]
    return time_text(row.seconds) + (f" ({', '.join(notes)})" if notes else "")


def _time_table(group: Group) -> list[str]:
    sized = any("bytes" in row.extra for row in group.rows.values())
    rows = []
    for variant in group.variants:
        cells = [group.rows.get((variant, opponent)) for opponent in group.opponents]
        size = next((f"{cell.extra['bytes'] / 1e6:.1f}" for cell in cells if cell and "bytes" in cell.extra), "")
        rows.append([variant, *([size] if sized else []), *(_cell(group, cell) for cell in cells)])
    return _table(["", *(["floor, MB"] if sized else []), *group.opponents], rows)


def _wall_table(group: Group) -> list[str]:
    """Host time per call: what a model that is not captured in a graph pays for small shapes."""
    if all(row.wall_seconds is None for row in group.rows.values()):
        return []
    rows = []
    for variant in group.variants:
        walls = [row.wall_seconds if (row := group.rows.get((variant, name))) else None for name in group.opponents]
        rows.append([variant, *("" if wall is None else time_text(wall) for wall in walls)])
    return ["Eager wall time per call:", "", *_table(["", *group.opponents], rows)]


def plot(group: Group, path: Path) -> None:
    """Bars: percent of the copy bandwidth, or, where there is no ceiling, time as a multiple of the subject's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ceiling = any(row.percent is not None for row in group.rows.values())
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
    axes.set_ylabel("percent of the copy bandwidth" if ceiling else f"time, multiple of {group.subject or 'itself'}")
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
