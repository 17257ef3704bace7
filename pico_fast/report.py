"""What a run reached, and its loss curve: ``python -m pico_fast.report RUN_DIR``.

Works on a run that is still going on, on a finished one, and on pico-train's own run directories, which have log files
only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pico_fast.checkpoint.layout import RunLayout, step_of
from pico_fast.config_io import ConfigError, load_config
from pico_fast.monitor.console import count, duration, number
from pico_fast.monitor.logs import read_logs
from pico_fast.monitor.metrics import MetricsError, read_metrics

DOCUMENT_MEAN, TOKEN_WEIGHTED = "paloma", "paloma_token_weighted"


class ReportError(Exception):
    """There is nothing to report; the message says where it was looked for."""


@dataclass(frozen=True)
class Summary:
    """What is known of a run; None where nothing is.

    ``losses``: (step, mean training loss in nats per token), by the index of the update before it is applied.
    ``evaluations``: step, that is updates applied, to metric to value.
    """

    layout: RunLayout
    losses: list[tuple[int, float]]
    evaluations: dict[int, dict[str, float]]
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    nonfinite: int = 0
    latest_checkpoint: Path | None = None
    logs: list[Path] = field(default_factory=list)
    metrics: Path | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.layout.root.name

    def perplexity(self, metric: str) -> tuple[float | None, float | None]:
        """(first, last) value of ``metric`` over the evaluations; (value, None) if there is only one."""
        values = [results[metric] for _, results in sorted(self.evaluations.items()) if metric in results]
        return (values[0] if values else None), (values[-1] if len(values) > 1 else None)


def _layout(run_dir: Path) -> RunLayout:
    """The layout of ``run_dir``, with the folder names of its own training_config.yaml if that can be read."""
    run_dir = run_dir.resolve()
    layout = RunLayout(run_dir)
    if not layout.training_config.is_file():
        return layout
    try:
        config = load_config(layout.training_config).checkpointing
    except ConfigError:  # of another version: the default names are then the best guess
        return layout
    config.runs_dir, config.run_name = str(run_dir.parent), run_dir.name
    return RunLayout.from_config(config)


def _evaluation_files(folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for path in folder.glob("step_*.json"):
        step = step_of(path.stem)
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # being written just now
        if step is not None and isinstance(results, dict):
            found[step] = _numbers(results)
    return found


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation: numbers, except the fields that every event has."""
    return {
        name: float(value)
        for name, value in entry.items()
        if name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _seconds(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Time in which the run's processes worked: between events, except while no process was running."""
    moments = sorted((event["time"], event["event"] in ("start", "resume")) for event in events if "time" in event)
    gaps = [later - earlier for (earlier, _), (later, starts) in itertools.pairwise(moments) if not starts]
    return sum(gaps) if gaps else None


def summarise(run_dir: str | Path) -> Summary:
    """Read a run directory. Raises ReportError if it holds no logged step and no evaluation."""
    layout = _layout(Path(run_dir))
    if not layout.root.is_dir():
        raise ReportError(f"{run_dir}: no such run directory")
    metrics = layout.metrics if layout.metrics.is_file() else None
    try:
        events = read_metrics(metrics) if metrics else read_logs(layout.logs)
    except MetricsError as error:
        raise ReportError(str(error)) from None
    train = [event for event in events if event["event"] == "train"]
    evaluations = _evaluation_files(layout.eval_results(0).parent)
    if metrics and train:  # an evaluation beyond the last step is of a future that a resume has undone
        evaluations = {step: results for step, results in evaluations.items() if step <= train[-1]["step"] + 1}
    for event in events:
        if event["event"] == "eval":
            evaluations[event["step"]] = _numbers(event)
    if not train and not evaluations:
        raise ReportError(
            f"{layout.root}: nothing to report yet; looked for logged steps in {layout.metrics} and {layout.logs}, "
            f"and for evaluations in {layout.eval_results(0).parent}"
        )
    rates = [event["tokens_per_second"] for event in train if event.get("tokens_per_second")]
    losses = [(event["step"], event["loss"]) for event in train if event.get("loss") is not None]
    latest = layout.latest_step()
    return Summary(
        layout=layout,
        losses=[(step, loss) for step, loss in losses if math.isfinite(loss)],
        evaluations=evaluations,
        tokens=train[-1].get("tokens") if train else None,
        seconds=_seconds(events),
        tokens_per_second=statistics.median(rates) if rates else None,
        nonfinite=sum(int(event.get("nonfinite") or 0) for event in train),
        latest_checkpoint=None if latest is None else layout.step_dir(latest),
        logs=sorted(layout.logs.glob("*.log")),
        metrics=metrics,
    )


def _perplexity_line(label: str, values: tuple[float | None, float | None]) -> str | None:
    before, after = values
    if before is None:
        return None
    if after is None:
        return f"{label}: {number(before)} (one evaluation so far)"
    factor = f"{number(before / after)} times lower" if after <= before else f"{number(after / before)} times higher"
    return f"{label}: {number(before)} before, {number(after)} after ({factor})"


def summary_lines(summary: Summary, *, png: Path | None = None, sample: str | None = None) -> list[str]:
    """The report as lines of text. ``sample``: text that the model wrote."""
    lines: list[str | None] = [
        f"Run {summary.name}",
        _perplexity_line("  validation perplexity, mean of documents", summary.perplexity(DOCUMENT_MEAN)),
        _perplexity_line("  validation perplexity, over all tokens", summary.perplexity(TOKEN_WEIGHTED)),
    ]
    if summary.losses:
        step, loss = summary.losses[-1]
        lines.append(f"  training loss: {loss:.4f} at step {step}")
    if summary.nonfinite:
        lines.append(f"  losses that were NaN or infinite: {summary.nonfinite}")
    if summary.tokens is not None:
        lines.append(f"  tokens seen: {summary.tokens:,}")
    if summary.seconds is not None:
        rate = f", {count(summary.tokens_per_second)} tokens/s" if summary.tokens_per_second else ""
        lines.append(f"  time: {duration(summary.seconds)}{rate}")
    places = {
        "checkpoint": summary.latest_checkpoint,
        "metrics": summary.metrics,
        "logs": summary.logs[-1].parent if summary.logs else None,
        "loss curve": png,
    }
    lines += [f"  {name}: {_shown(path)}" for name, path in places.items() if path is not None]
    if sample is not None:
        lines += ["  sample, written by the model:", *(f"    | {line}" for line in sample.splitlines())]
    return [line for line in lines if line is not None]


def _shown(path: Path) -> str:
    """``path`` from the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def plot_loss(summary: Summary, path: str | Path) -> Path:
    """Write training loss and validation points as a PNG; returns its path. Raises OSError if it cannot be written.

    Validation is the logarithm of the token-weighted perplexity, the same quantity as the loss; a run that has only
    pico-train's mean of document perplexities shows the logarithm of that, and says so. The right axis is the
    perplexity.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if summary.losses:
        steps, losses = zip(*summary.losses, strict=True)
        axes.plot(
            steps, losses, color="#1f5fa8", linewidth=1.6, label="training loss", marker="." if len(steps) < 40 else ""
        )
    for metric, label in (
        (TOKEN_WEIGHTED, "validation loss"),
        (DOCUMENT_MEAN, "ln of validation perplexity (document mean)"),
    ):
        points = [
            (s, math.log(r[metric])) for s, r in sorted(summary.evaluations.items()) if 0 < r.get(metric, 0) < math.inf
        ]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color="#c8501e", linewidth=1, linestyle="--", marker="o", markersize=5, label=label)
            break
    axes.set_title(summary.name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    right = axes.secondary_yaxis("right", functions=(_exp, _log))
    right.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high - low > math.log(8)  # several round numbers fit in
    right.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)) if wide else MaxNLocator(6))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
    )
    right.set_ylabel("perplexity")
    path = Path(path)
    figure.savefig(path)
    return path


def _exp(loss: Any) -> Any:
    import numpy as np

    return np.exp(np.clip(loss, -50, 700))


def _log(perplexity: Any) -> Any:
    import numpy as np

    return np.log(np.maximum(perplexity, 1e-22))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 if there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m pico_fast.report", description="Summary and loss curve of a run.")
    parser.add_argument("run_dir", type=Path, help="the run directory, runs/<run_name>")
    parser.add_argument("--out", type=Path, help="where to write the loss curve (default: RUN_DIR/loss.png)")
    parser.add_argument("--prompt", help="also let the newest checkpoint continue this text")
    options = parser.parse_args(arguments)
    try:
        summary = summarise(options.run_dir)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    try:
        png = plot_loss(summary, options.out or summary.layout.root / "loss.png")
    except OSError as error:
        print(f"report: the loss curve cannot be written: {error}; choose another file with --out", file=sys.stderr)
        return 2
    text = None
    if options.prompt is not None and summary.latest_checkpoint is not None:
        from pico_fast.sample import SampleError, sample  # torch takes seconds to import, and most reports need none

        try:
            text = sample(summary.latest_checkpoint, options.prompt)
        except SampleError as error:
            print(f"report: no sample: {error}", file=sys.stderr)
    print("\n".join(summary_lines(summary, png=png, sample=text)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
