"""The goals of the GPU kernels, checked against the figures of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.kernel_cases import POINTWISE, THEIRS

SUBJECT = "triton"
RIVALS = ("reference", "torch", "torch.compile", "aten", "liger", "apex")
WIDE_PERCENT = {"forward": 90.0, "backward": 85.0}  # of the measured copy bandwidth, d >= 384, 64k tokens
NARROW_PERCENT = 80.0  # d = 96
NORM_FLOORS = 1.3  # RMSNorm forward + backward, in byte floors at the copy bandwidth
NOISE = 1.02  # two runs of one kernel differ by so much: less is not slower
NARROW_HEAD = 32  # at head_dim 8, 16 and 32 our kernel is to be the fastest; beyond, `auto` within so much of it:
WIDE_HEAD_RATIO = 1.1
LOSS_GAIN = 1.3  # over the fastest opponent, up to a d_model of
LOSS_GAIN_WIDTH = 384
LOSS_MEMORY = 0.1  # of what the plain loss takes


def target_lines(measured: Sequence[Mapping[str, Any]], planned: Sequence[str] = ()) -> list[str]:
    """Markdown that says which targets were met, empty where the figures are not those of the GPU benchmarks.

    ``measured``: the objects of :func:`benchmarks.kernel_timing.lines_of`, ``seconds`` being the median; others are
    left aside. ``planned``: names of the cases that were to be measured. A case without a figure of ours is a miss.
    """
    found = {line.get("case") for line in measured}
    absent = [(False, f"{name}: nothing was measured") for name in planned if name not in found]
    pointwise = [line for line in measured if line.get("op") in POINTWISE and "copy_bytes_per_second" in line]
    ours = [line for line in pointwise if line["opponent"] == SUBJECT]
    products = [line for line in measured if "matmul_flops_per_second" in line]
    checks = [
        *absent,
        *_unmeasured(ours, pointwise),
        *_bandwidth(ours),
        *_rivals(ours, pointwise),
        *_norm(ours),
        *_attention(products),
        *_loss(products),
    ]
    if not checks:
        return []
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


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["op"], line["d_model"], line["tokens"], line["direction"]


def _unmeasured(ours: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]]) -> Iterable[tuple[bool, str]]:
    known = {_key(line) for line in ours}
    for line in {_key(line): line for line in found if _key(line) not in known}.values():
        yield False, f"{_where(line)}: `{SUBJECT}` was not measured"


def _rivals(ours: Iterable[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> Iterable[tuple[bool, str]]:
    for line in ours:
        for rival in found:
            if rival["opponent"] in RIVALS and _key(rival) == _key(line):
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


def _by_case(products: Sequence[Mapping[str, Any]], op: str) -> Iterable[dict[str, Mapping[str, Any]]]:
    """Results of one case and direction, by opponent."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for line in products:
        if line["op"] == op:
            found.setdefault((line["case"], line["direction"]), {})[line["opponent"]] = line
    return found.values()


def _fastest(group: Mapping[str, Mapping[str, Any]], rivals: Sequence[str]) -> Mapping[str, Any] | None:
    return min((group[name] for name in rivals if name in group), key=lambda line: line["seconds"], default=None)


def _attention(products: Sequence[Mapping[str, Any]]) -> Iterable[tuple[bool, str]]:
    for group in _by_case(products, "attention"):
        best, any_line = _fastest(group, THEIRS["attention"]), next(iter(group.values()))
        name, goal = (SUBJECT, NOISE) if any_line["head_dim"] <= NARROW_HEAD else ("auto", WIDE_HEAD_RATIO)
        where = f"{_where(any_line)}, sequences of {any_line['seq_len']}: `{name}`"
        if name not in group:
            yield False, f"{where} was not measured"
        elif best is not None:
            ratio = group[name]["seconds"] / best["seconds"]
            yield ratio <= goal, f"{where} takes {ratio:.2f} of the time of {best['opponent']}, goal {goal:.2f}"


def _loss(products: Sequence[Mapping[str, Any]]) -> Iterable[tuple[bool, str]]:
    for group in _by_case(products, "linear_cross_entropy"):
        ours, best, plain = group.get(SUBJECT), _fastest(group, THEIRS["linear_cross_entropy"]), group.get("plain")
        if ours is None:
            yield False, f"{_where(next(iter(group.values())))}: `{SUBJECT}` was not measured"
            continue
        if best:
            goal = LOSS_GAIN if ours["d_model"] <= LOSS_GAIN_WIDTH else 1 / NOISE
            gain = best["seconds"] / ours["seconds"]
            yield gain >= goal, f"{_where(ours)}: {gain:.2f} times as fast as {best['opponent']}, goal {goal:.2f}"
        if plain and ours["peak_bytes"] is not None and plain["peak_bytes"]:
            share = ours["peak_bytes"] / plain["peak_bytes"]
            yield share <= LOSS_MEMORY, f"{_where(ours)}: {share:.2f} of the memory of plain, goal {LOSS_MEMORY:.2f}"
