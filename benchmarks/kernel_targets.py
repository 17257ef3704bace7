"""The goals of the GPU kernels, checked against the figures of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SUBJECT = "triton"
RIVALS = ("reference", "torch", "torch.compile", "aten", "liger", "apex")
WIDE_PERCENT = {"forward": 90.0, "backward": 85.0}  # of the measured copy bandwidth, d >= 384, 64k tokens
NARROW_PERCENT = 80.0  # d = 96
NORM_FLOORS = 1.3  # RMSNorm forward + backward, in byte floors at the copy bandwidth
NOISE = 1.02  # two runs of one kernel differ by so much: less is not slower


def target_lines(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown that says which targets were met, empty where no Triton kernel was measured on a GPU.

    ``measured``: objects with op, size, d_model, tokens, direction, opponent, bytes, copy_bytes_per_second and seconds
    (the median), others are left aside.
    """
    found = [line for line in measured if "copy_bytes_per_second" in line]
    ours = [line for line in found if line["opponent"] == SUBJECT]
    if not ours:
        return []
    checks = [*_bandwidth(ours), *_rivals(ours, found), *_norm(ours)]
    missed = [text for met, text in checks if not met]
    lines = ["## Targets", "", f"{len(checks) - len(missed)} of {len(checks)} met.", ""]
    return lines + [f"- missed: {text}" for text in missed] + ([""] if missed else [])


def _where(line: Mapping[str, Any]) -> str:
    return f"{line['op']} {line['direction']}, d {line['d_model']}, {line['tokens'] / 1024:g}k tokens"


def _percent(line: Mapping[str, Any]) -> float:
    return 100 * line["bytes"] / line["seconds"] / line["copy_bytes_per_second"]


def _bandwidth(ours: Iterable[Mapping[str, Any]]) -> Iterable[tuple[bool, str]]:
    for line in ours:
        if line["tokens"] < 65536:
            continue
        goal = WIDE_PERCENT[line["direction"]] if line["d_model"] >= 384 else NARROW_PERCENT
        reached = _percent(line)
        yield reached >= goal, f"{_where(line)}: {reached:.0f} % of the copy bandwidth, goal {goal:.0f} %"


def _rivals(ours: Iterable[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> Iterable[tuple[bool, str]]:
    def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        return line["op"], line["d_model"], line["tokens"], line["direction"]

    for line in ours:
        for rival in found:
            if rival["opponent"] in RIVALS and key(rival) == key(line):
                ratio = line["seconds"] / rival["seconds"]
                yield ratio <= NOISE, f"{_where(line)}: takes {ratio:.2f} of the time of {rival['opponent']}"


def _norm(ours: Iterable[Mapping[str, Any]]) -> Iterable[tuple[bool, str]]:
    by_shape: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for line in ours:
        if line["op"] == "rms_norm":
            by_shape.setdefault((line["d_model"], line["tokens"]), []).append(line)
    for (width, tokens), pair in by_shape.items():
        if len(pair) == 2:
            floor = sum(line["bytes"] / line["copy_bytes_per_second"] for line in pair)
            ratio = sum(line["seconds"] for line in pair) / floor
            where = f"rms_norm forward + backward, d {width}, {tokens / 1024:g}k tokens"
            yield ratio < NORM_FLOORS, f"{where}: {ratio:.2f} byte floors, goal below {NORM_FLOORS}"
