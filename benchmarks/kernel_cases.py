"""Shapes of the GPU benchmarks, the bytes each op must move and the products it must take there, and predictions.

``python -m benchmarks.kernel_cases`` prints the tables of docs/performance-kernels-gpu.md. The benchmark divides by
the same :func:`byte_floor` and :func:`flops`, so a percentage in a report and a row of those tables cannot disagree.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pico_kernels._triton import PICO_SHAPES, PicoShape

SEQ_LEN = 2048  # of every published size; a batch is tokens / SEQ_LEN sequences
EPS = 1e-6
POINTWISE = ("rms_norm", "add_rms_norm", "rope", "swiglu")
OPS = (*POINTWISE, "attention", "linear_cross_entropy")
DIRECTIONS = ("forward", "backward")
STEP = "forward + backward"
OURS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(POINTWISE, ("triton", "torch", "reference")),
    "attention": ("triton", "auto"),
    "linear_cross_entropy": ("triton", "auto", "tiles", "chunks", "torch"),
}
THEIRS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(POINTWISE, ("torch.compile", "aten", "liger", "apex")),
    "attention": ("flash_attn", "sdpa flash", "sdpa cudnn", "sdpa efficient", "torch.compile"),
    "linear_cross_entropy": ("plain", "torch.compile", "F.linear_cross_entropy", "liger", "cut_cross_entropy"),
}
"""Op to everyone who is ever measured on it, and :data:`OURS` likewise."""
HEAD_16 = PicoShape("head_16", 192, 768)
"""Of no published size: for attention alone, whose heads of 16 are the narrowest that the tensor cores do not pad."""
ATTENTION_SHAPES = tuple(sorted((*PICO_SHAPES, HEAD_16), key=lambda shape: shape.d_model))
COPY = "copy of as many bytes"
ROPE = "rope of the same q and k"


@dataclass(frozen=True)
class Case:
    """One op at one shape: activations in bfloat16, norm weights and angles in float32, as in bf16-mixed training."""

    op: str
    shape: PicoShape
    tokens: int
    seq_len: int = SEQ_LEN

    @property
    def name(self) -> str:
        """For example ``rms_norm-d768-64k``, ``attention-d768-32k-s512``."""
        length = f"-s{self.seq_len}" if self.op == "attention" else ""
        return f"{self.op}-d{self.shape.d_model}-{tokens_text(self.tokens)}{length}"

    @property
    def directions(self) -> tuple[str, ...]:
        """What is timed. The losses divide the work between forward and backward differently: only their sum counts."""
        return (STEP,) if self.op == "linear_cross_entropy" else DIRECTIONS


def tokens_text(tokens: int) -> str:
    """``65536`` as ``64k``."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def cases(only: Sequence[str] = OPS) -> list[Case]:
    """Every case of some ops, the most telling first, so that a run that ends early has them.

    Those are 2048 tokens of context, 32k tokens to the loss, and the 64k tokens of the pointwise targets.
    """
    by_width = {shape.d_model: shape for shape in PICO_SHAPES}
    first = [by_width[width] for width in (96, 768, 384, 1536) if width in by_width]
    shapes = first + [shape for shape in PICO_SHAPES if shape not in first]

    def pointwise(tokens: int) -> list[Case]:
        return [Case(op, shape, tokens) for shape in shapes for op in POINTWISE]

    def attention(length: int) -> list[Case]:
        return [Case("attention", shape, 32768, length) for shape in (*shapes, HEAD_16)]

    def losses(tokens: int) -> list[Case]:
        return [Case("linear_cross_entropy", shape, tokens) for shape in shapes]

    both = [case for pair in zip_longest(attention(2048), losses(32768)) for case in pair if case is not None]
    ordered = [*both, *pointwise(65536), *attention(512), *attention(8192), *losses(8192), *pointwise(16384)]
    return [case for case in ordered if case.op in only]


def byte_floor(case: Case, direction: str, element_size: int = 2) -> int:
    """Fewest bytes of device memory the op can move: each tensor it needs read once, each result written once.

    Backwards need (and no statistic need be kept, it can be computed again from what is read anyway):
    ``rms_norm`` x, dy, weight, for dx and dweight; ``add_rms_norm`` the sum, both outputs' gradients and weight, for
    dweight and one tensor that is the gradient of x and of the residual; ``rope`` as forward; ``swiglu`` gate, up and
    dy, for dgate and dup; ``attention`` q, k, v, the output and its gradient, for three gradients. The loss reads
    hidden, labels and a float32 weight and writes two gradients, in one step.
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
    if case.op == "attention":
        queries, keys = (case.tokens * n * shape.head_dim * element_size for n in (shape.n_heads, shape.n_kv_heads))
        return 4 * queries + 4 * keys if backward else 2 * queries + 2 * keys
    if case.op == "linear_cross_entropy":
        return 2 * rows + 2 * shape.vocab * weight + 8 * case.tokens
    raise ValueError(f"byte_floor: op: expected one of {', '.join(OPS)}, got {case.op!r}")


def flops(case: Case, direction: str) -> int | None:
    """Operations of the products an op needs, two per multiply-add; None for the ops that have none.

    Attention, causal: half of the scores; two products forward, and the backward counted as 2.5 times that, the
    convention of FlashAttention's benchmarks (five products, the scores computed again among them). The loss: three
    products of N x V x d, whatever an implementation computes twice.
    """
    shape = case.shape
    if case.op == "attention":
        forward = 2 * case.tokens * case.seq_len * shape.n_heads * shape.head_dim
        return forward * 5 // 2 if direction == "backward" else forward
    if case.op == "linear_cross_entropy":
        return 6 * case.tokens * shape.vocab * shape.d_model
    return None


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
    """Markdown: per pointwise op, byte floors and predicted microseconds of every case."""
    lines: list[str] = []
    for op in POINTWISE:
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
