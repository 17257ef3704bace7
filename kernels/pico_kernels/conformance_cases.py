"""What the conformance tool calls each op with: sizes, options, memory layouts, and what error is unavoidable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pico_kernels.kernel_set import OPS
from pico_kernels.rope import STYLES, rope_tables

GUARD = 64  # elements of NaN before and after a guarded tensor; 128 bytes at least, so alignment stays
INT32_ELEMENTS = 2**31


@dataclass(frozen=True)
class Case:
    """One call of an op: ``fn(*tensors.values(), *extra, **options)``, as :class:`KernelSet` users call it.

    ``differentiable`` names the tensors whose gradients are compared. ``main`` marks the few cases on which
    behaviour (layouts, repeatability, memory, tracing) is checked.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    differentiable: tuple[str, ...]
    extra: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    main: bool = False

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The same call with every tensor argument replaced."""
        return dataclasses.replace(self, tensors={name: change(t) for name, t in self.tensors.items()})

    def double(self) -> Case:
        """The same values in float64, contiguous."""
        return self.map(lambda t: (t.double() if t.is_floating_point() else t).contiguous())


CaseMaker = Callable[[torch.dtype, torch.device], list[Case]]


@dataclass(frozen=True)
class OpSpec:
    """How one op is checked.

    Args:
        outputs: names of what it returns.
        reference: the twin; in float64 it is the truth.
        baseline: the same-dtype PyTorch path whose error, doubled, is allowed.
        cases: calls with values; those marked ``main`` are the first two at most.
        empty: calls with zero rows.
        row_argument: the argument of which one row is set to NaN; the NaN must stay in that row.
        slack: absolute error allowed beyond the rule, of (case, output or gradient name, largest true value).
        large: a call whose largest intermediate, in a plain implementation, is too large for memory in earnest.
        forbidden: what that intermediate is, and its elements in a case: no tensor may have as many.
    """

    outputs: tuple[str, ...]
    reference: Callable[..., Any]
    baseline: Callable[..., Any]
    cases: CaseMaker
    empty: CaseMaker
    row_argument: str
    slack: Callable[[Case, str, float], float] = lambda case, name, largest: 0.0
    large: Callable[[torch.dtype, torch.device], Case] | None = None
    forbidden: tuple[str, Callable[[Case], int]] = ("", lambda case: 0)


def draw(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return numbers.to(dtype).to(device)


# Sizes: one row, one column, odd widths, widths that are no power of two, and Pico's own 96 and 1536.
_NORM_SHAPES = [(3, 5, 96), (1, 1), (7, 131), (1, 8), (65, 33), (2, 1536)]
_ROPE_SIZES = [(2, 11, 3, 1, 8), (1, 1, 1, 1, 8), (1, 17, 4, 2, 64), (2, 5, 6, 6, 20), (1, 3, 2, 1, 256)]
_GATE_SHAPES = [(5, 7), (1,), (3, 4, 513), (2, 2048)]
# (B, Sq, Sk, H, Hkv, D, causal, scale)
_ATTENTION_SIZES: list[tuple[int, int, int, int, int, int, bool, float | None]] = [
    (2, 17, 17, 4, 2, 8, True, None),
    (1, 1, 1, 1, 1, 8, True, None),
    (1, 65, 65, 6, 2, 32, True, None),
    (1, 9, 30, 2, 1, 64, True, 0.3),
    (2, 13, 21, 3, 3, 20, False, None),
]
# Only on a GPU: the other widths a kernel pads or tiles for, ragged lengths, and rows of many key tiles.
_ATTENTION_GPU_SIZES: list[tuple[int, int, int, int, int, int, bool, float | None]] = [
    (2, 203, 203, 4, 4, 16, True, None),
    (1, 113, 203, 3, 1, 96, True, None),
    (2, 257, 257, 12, 4, 128, True, None),
    (1, 130, 77, 2, 1, 256, False, None),
    (1, 1, 5000, 12, 4, 64, True, None),
    (1, 4099, 4099, 3, 1, 64, True, None),
]
# (N, d, V, options)
_LOSS_SIZES: list[tuple[int, int, int, dict[str, Any]]] = [
    (13, 24, 131, {}),
    (13, 24, 131, {"reduction": "none"}),
    (1, 8, 5, {}),
    (40, 16, 300, {"reduction": "sum", "z_loss": 1e-2}),
    (33, 96, 509, {"denominator": 7.0, "ignore_index": 3}),
]
# Only on a GPU: vocabularies that no tile divides, at a narrow and a wide model.
_LOSS_GPU_SIZES: list[tuple[int, int, int, dict[str, Any]]] = [
    (1000, 96, 50257, {}),
    (517, 1536, 50257, {"z_loss": 1e-4}),
    (300, 384, 50304, {"reduction": "none"}),
]


def _norm_case(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device, main: bool
) -> Case:
    tensors = {"x": draw(shape, 1, dtype, device)}
    if op == "add_rms_norm":
        tensors["residual"] = draw(shape, 2, dtype, device)
    tensors["weight"] = draw(shape[-1:], 3, weight_dtype, device)
    name = f"{' x '.join(map(str, shape))}, weight {str(weight_dtype).removeprefix('torch.')}"
    return Case(name, tensors, tuple(tensors), (1e-6,), main=main)


def _norm_cases(op: str) -> tuple[CaseMaker, CaseMaker]:
    def cases(dtype: torch.dtype, device: torch.device) -> list[Case]:
        shapes = [*_NORM_SHAPES, (4097, 768)] if device.type == "cuda" else _NORM_SHAPES
        made = [_norm_case(op, shape, dtype, torch.float32, device, shape == shapes[0]) for shape in shapes]
        if dtype != torch.float32:
            made.insert(1, _norm_case(op, shapes[0], dtype, dtype, device, True))
        # Squares of 300 overflow float16, so statistics must be float32; eps decides a row of zeros.
        harsh = _norm_case(op, (6, 40), dtype, torch.float32, device, False)
        for argument in set(harsh.tensors) - {"weight"}:
            harsh.tensors[argument][:3] *= 300
            harsh.tensors[argument][4] = 0
        return [*made, dataclasses.replace(harsh, name="6 x 40, values to 1000, a row of zeros", extra=(1e-5,))]

    def empty(dtype: torch.dtype, device: torch.device) -> list[Case]:
        return [_norm_case(op, shape, dtype, torch.float32, device, False) for shape in ((0, 8), (2, 0, 8))]

    return cases, empty


def _rope_case(
    size: tuple[int, int, int, int, int], style: str, dtype: torch.dtype, device: torch.device, main: bool
) -> Case:
    batch, seq_len, heads, kv_heads, dim = size
    cos, sin = rope_tables(seq_len + 3, dim, device=device)
    tensors = {
        "q": draw((batch, seq_len, heads, dim), 1, dtype, device),
        "k": draw((batch, seq_len, kv_heads, dim), 2, dtype, device),
        "cos": cos,
        "sin": sin,
    }
    name = f"{style}, B {batch}, S {seq_len}, H {heads}/{kv_heads}, D {dim}"
    return Case(name, tensors, ("q", "k"), (), {"style": style}, main)


def _rope_cases(dtype: torch.dtype, device: torch.device) -> list[Case]:
    sizes = [*_ROPE_SIZES, (2, 1024, 12, 4, 64)] if device.type == "cuda" else _ROPE_SIZES
    return [_rope_case(size, style, dtype, device, size == sizes[0]) for size in sizes for style in STYLES]


def _rope_empty(dtype: torch.dtype, device: torch.device) -> list[Case]:
    return [_rope_case(size, STYLES[0], dtype, device, False) for size in ((0, 3, 2, 1, 8), (2, 0, 2, 1, 8))]


def _gate_case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, main: bool) -> Case:
    tensors = {"gate": draw(shape, 1, dtype, device, 4), "up": draw(shape, 2, dtype, device)}
    return Case(" x ".join(map(str, shape)), tensors, ("gate", "up"), main=main)


def _gate_cases(dtype: torch.dtype, device: torch.device) -> list[Case]:
    shapes = [*_GATE_SHAPES, (4097, 3072)] if device.type == "cuda" else _GATE_SHAPES
    made = [_gate_case(shape, dtype, device, shape == shapes[0]) for shape in shapes]
    steep = _gate_case((4, 9), dtype, device, False)
    # exp overflows float16 at 12 and float32 at 89; silu must come out as 0 or as the gate itself.
    steep.tensors["gate"].copy_(torch.tensor([-200.0, -89, -20, -12, 0, 12, 20, 89, 200]).expand(4, 9))
    return [*made, dataclasses.replace(steep, name="4 x 9, gates from -200 to 200")]


def _gate_empty(dtype: torch.dtype, device: torch.device) -> list[Case]:
    return [_gate_case(shape, dtype, device, False) for shape in ((0, 8), (2, 0, 8))]


def _attention_case(
    size: tuple[int, int, int, int, int, int, bool, float | None], dtype: torch.dtype, device: torch.device, main: bool
) -> Case:
    batch, queries, keys, heads, kv_heads, dim, causal, scale = size
    tensors = {
        "q": draw((batch, queries, heads, dim), 1, dtype, device),
        "k": draw((batch, keys, kv_heads, dim), 2, dtype, device),
        "v": draw((batch, keys, kv_heads, dim), 3, dtype, device),
    }
    name = f"B {batch}, S {queries}/{keys}, H {heads}/{kv_heads}, D {dim}{', causal' if causal else ''}"
    return Case(name, tensors, ("q", "k", "v"), (), {"causal": causal, "scale": scale}, main)


def _attention_cases(dtype: torch.dtype, device: torch.device) -> list[Case]:
    sizes = [*_ATTENTION_SIZES, *(_ATTENTION_GPU_SIZES if device.type == "cuda" else [])]
    return [_attention_case(size, dtype, device, size == sizes[0]) for size in sizes]


def _attention_empty(dtype: torch.dtype, device: torch.device) -> list[Case]:
    return [
        _attention_case((batch, rows, rows, 4, 2, 8, True, None), dtype, device, False)
        for batch, rows in ((0, 3), (2, 0))
    ]


def attention_in_its_dtype(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """Attention as plain PyTorch computes it in the input dtype: scores and probabilities are rounded to it.

    The op's contract allows that; the twin, float32 throughout, would be too strict a baseline.
    """
    group = q.shape[2] // k.shape[2]
    key, value = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    scores = (q.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(future, -math.inf)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


def _attention_slack(case: Case, name: str, largest: float) -> float:
    """``p * (dp - sum(p * dp))`` cancels, wholly for a single key: the float32 rounding of dp is unavoidable."""
    if name not in ("q", "k") or not case.tensors["q"].numel():
        return 0.0
    q, k, v = (float(t.abs().max()) for t in case.tensors.values())
    return torch.finfo(torch.float32).eps * 4 * case.tensors["q"].shape[-1] ** 0.5 * v * max(q, k)


def _loss_case(
    size: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype, device: torch.device, main: bool
) -> Case:
    tokens, dim, vocab = size
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(4))
    labels[2::5] = options.get("ignore_index", -100)
    tensors = {
        "hidden": draw((tokens, dim), 1, dtype, device),
        "weight": draw((vocab, dim), 2, torch.float32, device, dim**-0.5),
        "labels": labels.to(device),
    }
    every = {"ignore_index": -100, "reduction": "mean", "denominator": None, "z_loss": 0.0} | options
    said = "".join(f", {key} {value}" for key, value in options.items())
    return Case(f"N {tokens}, d {dim}, V {vocab}{said}", tensors, ("hidden", "weight"), (), every, main)


def _loss_cases(dtype: torch.dtype, device: torch.device) -> list[Case]:
    sizes = [*_LOSS_SIZES, *(_LOSS_GPU_SIZES if device.type == "cuda" else [])]
    made = [
        _loss_case((tokens, dim, vocab), options, dtype, device, index < 2)
        for index, (tokens, dim, vocab, options) in enumerate(sizes)
    ]
    made.append(_loss_case((9, 8, 50), {"denominator": torch.tensor(11.0, device=device)}, dtype, device, False))
    # Every token adds to one row of the weight's gradient: summed in half precision it is off by several units.
    one_label = _loss_case((2400, 8, 5), {}, dtype, device, False)
    one_label.tensors["labels"].clamp_(max=0)
    return [*made, dataclasses.replace(one_label, name="N 2400, d 8, V 5, one label")]


def _loss_empty(dtype: torch.dtype, device: torch.device) -> list[Case]:
    return [_loss_case((0, 8, 5), {"reduction": reduction}, dtype, device, False) for reduction in ("sum", "none")]


def _large_loss(dtype: torch.dtype, device: torch.device) -> Case:
    """More logits than a chunk by a sensible byte budget has: 100 MB on a CPU, 400 MB on a GPU, at two bytes each."""
    return _loss_case((4096 if device.type == "cuda" else 1024, 8, 50304), {}, dtype, device, False)


def _logits(case: Case) -> int:
    return case.tensors["hidden"].shape[0] * case.tensors["weight"].shape[0]


def _loss_slack(case: Case, name: str, largest: float) -> float:
    """``p - 1`` cancels for a sure token: the float32 error of softmax (6 to 18 eps in PyTorch) times the operand.

    The products run in the dtype of ``hidden``, so an ulp of a gradient is one of that dtype.
    """
    float32 = torch.finfo(torch.float32).eps
    if name == "loss" or not case.tensors["hidden"].numel():
        return 32 * float32
    operand = case.tensors["weight" if name == "hidden" else "hidden"]
    return 32 * float32 * max(1.0, float(operand.abs().max())) + torch.finfo(case.tensors["hidden"].dtype).eps * largest


def _norm_slack(case: Case, name: str, largest: float) -> float:
    """In a row of one element ``s - n * mean(s * n)`` cancels wholly: what is left is the rounding of s / rms."""
    x = case.tensors["x"]
    if name == "weight" or x.shape[-1] != 1 or not x.numel():
        return 0.0
    total = x + case.tensors.get("residual", 0)
    return 32 * torch.finfo(torch.float32).eps * float(case.tensors["weight"].abs().max() / total.abs().min())


def _norm_spec(op: str, outputs: tuple[str, ...]) -> OpSpec:
    cases, empty = _norm_cases(op)
    return OpSpec(outputs, OPS[op]["reference"], OPS[op]["reference"], cases, empty, "x", _norm_slack)


SPECS: Mapping[str, OpSpec] = {
    "rms_norm": _norm_spec("rms_norm", ("normed",)),
    "add_rms_norm": _norm_spec("add_rms_norm", ("normed", "total")),
    "rope": OpSpec(
        ("rotated q", "rotated k"), OPS["rope"]["reference"], OPS["rope"]["reference"], _rope_cases, _rope_empty, "q"
    ),
    "swiglu": OpSpec(
        ("product",), OPS["swiglu"]["reference"], OPS["swiglu"]["reference"], _gate_cases, _gate_empty, "gate"
    ),
    "attention": OpSpec(
        ("mixed",),
        OPS["attention"]["reference"],
        attention_in_its_dtype,
        _attention_cases,
        _attention_empty,
        "q",
        _attention_slack,
    ),
    "linear_cross_entropy": OpSpec(
        ("loss",),
        OPS["linear_cross_entropy"]["reference"],
        OPS["linear_cross_entropy"]["reference"],
        _loss_cases,
        _loss_empty,
        "hidden",
        _loss_slack,
        _large_loss,
        ("the logits", _logits),
    ),
}
"""Op to how it is checked."""


def _filler(x: torch.Tensor) -> float:
    """What surrounds a tensor: NaN, or a label that no vocabulary has."""
    return math.nan if x.is_floating_point() else -1


def _expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand_as(x)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    if x.dim() < 3:
        return _transposed(x)
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


def _every_second(x: torch.Tensor) -> torch.Tensor:
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), _filler(x))
    buffer[..., 1::2] = x
    return buffer[..., 1::2]


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 3), _filler(x))
    buffer[..., 1:-2] = x
    return buffer[..., 1:-2]


_LAYOUTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded (stride 0)": _expanded,
    "transposed": _transposed,
    "heads first": _heads_first,
    "every second element": _every_second,
    "slice of wider rows": _rows_apart,
}
LAYOUTS = tuple(_LAYOUTS)
"""Names of the memory layouts; :func:`lay_out` makes them."""


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """``x`` in a memory layout; gaps hold NaN. ``expanded`` repeats the first entry, so values change."""
    return x if x.dim() == 0 else _LAYOUTS[layout](x)


def guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous copy of ``x`` between NaN, and the buffer it lies in."""
    buffer = x.new_full((x.numel() + 2 * GUARD,), _filler(x))
    inside = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, buffer


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The first two entries of ``x``, 2^31 elements apart, in memory that is mostly never touched.

    An offset computed in int32 wraps to 2^31 elements *before* the start, which is in the same allocation and NaN.
    """
    pair = x[:2].contiguous()
    row = pair[0].numel()
    storage = torch.empty(2 * INT32_ELEMENTS + row, dtype=x.dtype, device=x.device)
    storage[:row] = math.nan
    strides = (INT32_ELEMENTS, *pair.stride()[1:])
    return storage.as_strided(pair.shape, strides, INT32_ELEMENTS).copy_(pair)
