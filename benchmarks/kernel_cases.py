"""Shapes of the GPU benchmarks, the bytes each op must move there, and what that predicts.

``python -m benchmarks.kernel_cases`` prints the tables of docs/performance-kernels-gpu.md. The benchmark divides by
the same :func:`byte_floor`, so a percentage in a report and a row of those tables cannot disagree.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from pico_kernels._triton import PICO_SHAPES, PicoShape

SEQ_LEN = 2048  # of every published size; a batch is tokens / SEQ_LEN sequences
EPS = 1e-6
OPS = ("rms_norm", "add_rms_norm", "rope", "swiglu")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One op at one shape: activations in bfloat16, norm weights and angles in float32, as in bf16-mixed training."""

    op: str
    shape: PicoShape
    tokens: int
    seq_len: int = SEQ_LEN

    @property
    def name(self) -> str:
        """For example ``rms_norm-d768-64k``."""
        return f"{self.op}-d{self.shape.d_model}-{tokens_text(self.tokens)}"


def tokens_text(tokens: int) -> str:
    """``65536`` as ``64k``."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def cases() -> list[Case]:
    """Every case, the most telling first: a run that ends early has measured the 64k tokens that the targets name."""
    by_width = {shape.d_model: shape for shape in PICO_SHAPES}
    first = [by_width[width] for width in (768, 96, 1536, 384) if width in by_width]
    ordered = first + [shape for shape in PICO_SHAPES if shape not in first]
    return [Case(op, shape, tokens) for tokens in (65536, 16384) for shape in ordered for op in OPS]


def byte_floor(case: Case, direction: str, element_size: int = 2) -> int:
    """Fewest bytes of device memory the op can move: each tensor it needs read once, each result written once.

    Backwards need (and no statistic need be kept, it can be computed again from what is read anyway):
    ``rms_norm`` x, dy, weight, for dx and dweight; ``add_rms_norm`` the sum, both outputs' gradients and weight, for
    dweight and one tensor that is the gradient of x and of the residual; ``rope`` as forward; ``swiglu`` gate, up and
    dy, for dgate and dup.
    """
    shape, backward = case.shape, direction == "backward"
    rows = case.tokens * shape.d_model * element_size
    weight = shape.d_model * 4
    if case.op == "rms_norm":
        return 3 * rows + 2 * weight if backward else 2 * rows + weight
    if case.op == "add_rms_norm":
        return 4 * rows + (2 * weight if backward else weight)
    if case.op == "rope":
        heads = shape.n_heads + shape.n_kv_heads
        angles = 2 * min(case.seq_len, case.tokens) * (shape.head_dim // 2) * 4
        return 2 * case.tokens * heads * shape.head_dim * element_size + angles
    if case.op == "swiglu":
        return (5 if backward else 3) * case.tokens * shape.hidden * element_size
    raise ValueError(f"byte_floor: op: expected one of {', '.join(OPS)}, got {case.op!r}")


@dataclass(frozen=True)
class Card:
    """Bytes per second: the data sheet's, and what a large device-to-device copy reaches (read + written)."""

    name: str
    nominal: float
    copy: float
    copy_source: str


CARDS = (
    Card("H200", 4.8e12, 4.3e12, "measured on one card, 2026-10-28"),
    Card("H100 SXM", 3.35e12, 3.0e12, "assumed: the H200's 90 % of nominal"),
)
FIXED_SECONDS = 1.5e-6  # assumed: the first loads' latency, the last stores, uneven ends of a launch


def predicted_seconds(case: Case, direction: str, card: Card) -> float:
    """Predicted device time of a good kernel: its byte floor at the card's copy rate, and a fixed part."""
    return FIXED_SECONDS + byte_floor(case, direction) / card.copy


def prediction_tables() -> str:
    """Markdown: per op, byte floors and predicted microseconds of every case."""
    lines: list[str] = []
    for op in OPS:
        heads = [f"{card.name} {direction}, µs" for card in CARDS for direction in DIRECTIONS]
        columns = ["size", "tokens", *(f"{direction}, MB" for direction in DIRECTIONS), *heads]
        lines += [f"### {op}", "", f"| {' | '.join(columns)} |", "|---" * 2 + "|---:" * (len(columns) - 2) + "|"]
        for shape in PICO_SHAPES:
            for tokens in (16384, 65536):
                case = Case(op, shape, tokens)
                width = f"hidden {shape.hidden}" if op == "swiglu" else f"d {shape.d_model}"
                floors = [f"{byte_floor(case, direction) / 1e6:.1f}" for direction in DIRECTIONS]
                times = [
                    f"{predicted_seconds(case, direction, card) * 1e6:.1f}"
                    for card in CARDS
                    for direction in DIRECTIONS
                ]
                lines.append(f"| {' | '.join([f'{shape.name}, {width}', tokens_text(tokens), *floors, *times])} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(prediction_tables())
