"""What attention can take at least on a GPU, and what rotating q and k beforehand adds to it.

``python -m benchmarks.kernel_attention`` prints the tables of docs/performance-attention-gpu.md. They are predictions;
``python -m benchmarks.gpu --only attention`` measures the same cases.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from benchmarks.kernel_cases import (
    ATTENTION_SHAPES,
    CARDS,
    DIRECTIONS,
    Case,
    byte_floor,
    flops,
    predicted_seconds,
    tokens_text,
)

TOKENS = 32768
LENGTHS = (512, 2048, 8192)
EXPONENTIALS_PER_SECOND = 132 * 16 * 1.75e9  # SMs x per clock (ex2) x clock under load, assumed
MATMUL_PER_SECOND = 790e12  # assumed: 80 % of the nominal 989; the benchmark measures it
NARROWEST_PRODUCT = 16  # of the tensor cores: head_dim 8 is padded to it
# A kernel for the gradient of q and one for those of k and v: each computes the probabilities again.
EXPONENTIALS = {"forward": 1, "backward": 2}  # per score
PRODUCTS = {"forward": 2, "backward": 7}  # per score, each over head_dim


@dataclass(frozen=True)
class Bound:
    """Seconds that each unit of a card needs at least; the longest of them bounds the kernels together."""

    exponentials: float
    products: float
    memory: float

    @property
    def seconds(self) -> float:
        """As if the others were hidden behind it."""
        return max(self.exponentials, self.products, self.memory)


def bound(case: Case, direction: str) -> Bound:
    """Of our kernels, causal: half of the scores, whole tiles on the diagonal not counted."""
    shape = case.shape
    scores = case.tokens * case.seq_len * shape.n_heads / 2
    width = max(NARROWEST_PRODUCT, shape.head_dim)
    return Bound(
        EXPONENTIALS[direction] * scores / EXPONENTIALS_PER_SECOND,
        PRODUCTS[direction] * 2 * scores * width / MATMUL_PER_SECOND,
        byte_floor(case, direction) / CARDS[0].copy,
    )


def _row(case: Case) -> list[str]:
    forward, backward = (bound(case, direction) for direction in DIRECTIONS)
    total = forward.seconds + backward.seconds
    rope = sum(predicted_seconds(replace(case, op="rope"), direction, CARDS[0]) for direction in DIRECTIONS)
    work = sum(flops(case, direction) or 0 for direction in DIRECTIONS)
    cells = [forward.exponentials, forward.products, forward.memory, forward.seconds, backward.seconds, rope]
    return [
        f"{case.shape.name}, {case.shape.head_dim}",
        str(case.seq_len),
        *(f"{seconds * 1e6:.0f}" for seconds in cells),
        f"{work / total / 1e12:.0f}",
        f"{100 * rope / total:.0f} %",
    ]


def prediction_table() -> str:
    """Markdown: bounds in microseconds of every size and length, and the share of rope."""
    heads = [
        "size, head_dim",
        "length",
        "forward: exponentials, µs",
        "products, µs",
        "memory, µs",
        "forward, µs",
        "backward, µs",
        "rope, both, µs",
        "TFLOP/s",
        "rope / attention",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    cases = [Case("attention", shape, TOKENS, length) for shape in ATTENTION_SHAPES for length in LENGTHS]
    return "\n".join([*lines, *(f"| {' | '.join(_row(case))} |" for case in cases)]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(f"{CARDS[0].name}, {tokens_text(TOKENS)} tokens\n\n{prediction_table()}")
