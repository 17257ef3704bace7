"""The benchmarks' correctness gate: who is stopped, and who passes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pico_kernels._triton import PICO_SHAPES

from benchmarks import kernel_matrix_opponents
from benchmarks.kernel_cases import OPS, Case
from benchmarks.kernel_opponent import Opponent
from benchmarks.kernel_opponents import make_inputs, opponents
from benchmarks.kernel_timing import Gate

CPU = torch.device("cpu")
SHAPE = replace(PICO_SHAPES[0], vocab=131)
TINY = {op: Case(op, SHAPE, 32, seq_len=16) for op in OPS}


def checked(op: str, change: Callable) -> str | None:
    """What the gate says of the reference with its outputs changed."""
    inputs = make_inputs(TINY[op], CPU)
    truth = opponents(TINY[op], CPU)[0][0].truth
    grads = tuple(torch.ones_like(out) * 0.5 for out in truth(*inputs))
    return Gate(inputs, grads).why_wrong(Opponent("other", lambda *tensors: change(truth(*tensors)), truth))


@pytest.mark.parametrize("op", OPS)
def test_the_gate_passes_the_reference_and_stops_what_is_wrong(op: str) -> None:
    assert checked(op, lambda outputs: outputs) is None
    assert checked(op, lambda outputs: (1.05 * outputs[0], *outputs[1:])).startswith("wrong: output 0 is off by ")
    assert checked(op, lambda outputs: (outputs[0] * float("nan"), *outputs[1:])).startswith("wrong: output 0 is off")
    assert checked(op, lambda outputs: (outputs[0][None], *outputs[1:])).startswith(
        "it raised RuntimeError: Mismatch in shape"
    )
    detached = checked(op, lambda outputs: tuple(out + 0.2 * (out - out.detach()) for out in outputs))
    assert detached.startswith(
        "wrong: gradient of input 0 is off by "
    )  # the outputs are right, the gradients 1.2 times


LOSS = Case("linear_cross_entropy", replace(SHAPE, vocab=32768), 64)
"""The softmax part of its weight's gradient is 200 times smaller than the labels', as at the tiny size."""


def judged(make: Callable[..., torch.Tensor]) -> str | None:
    """What the gate says of a loss that is ``make(hidden, weight, labels, the true loss)``."""
    inputs, labels = make_inputs(LOSS, CPU), kernel_matrix_opponents.make_labels(LOSS, CPU)
    truth = opponents(LOSS, CPU)[0][0].truth

    def call(hidden: torch.Tensor, weight: torch.Tensor) -> tuple:
        return (make(hidden, weight, labels, lambda *two: truth(*two)[0]),)

    return Gate(inputs, (torch.tensor(0.7),)).why_wrong(Opponent("other", call, truth))


def test_the_gate_sees_a_loss_that_is_slightly_off() -> None:
    assert judged(lambda hidden, weight, labels, loss: loss(hidden, weight)) is None
    said = judged(lambda hidden, weight, labels, loss: loss(hidden, weight) + 0.1)
    assert said.startswith("wrong: output 0 is off by 0.009")


def test_the_gate_sees_a_weight_gradient_without_its_softmax() -> None:
    """In the rows that labels name it is lost among the labels' own part."""

    def labels_only(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss: Callable) -> torch.Tensor:
        part = -(hidden.detach() * weight[labels]).sum(-1).mean()
        return loss(hidden, weight.detach()) + part - part.detach()

    said = judged(labels_only)
    assert said.startswith("wrong: gradient of input 1 is off by 1 of its norm in its smallest rows, allowed 0.0")


def test_correct_losses_pass_the_gate() -> None:
    inputs, grads = make_inputs(LOSS, CPU), (torch.tensor(0.7),)
    found = [opponent for opponent in opponents(LOSS, CPU)[0] if opponent.name not in ("triton", "tiles", "chunks")]
    assert {opponent.name for opponent in found} >= {"auto", "torch", "plain"}
    gate = Gate(inputs, grads)
    assert {opponent.name: gate.why_wrong(opponent) for opponent in found} == dict.fromkeys(o.name for o in found)


def test_an_opponent_that_rounds_coarsely_is_given_slack() -> None:
    inputs, truth = make_inputs(LOSS, CPU), opponents(LOSS, CPU)[0][0].truth

    def coarse(hidden: torch.Tensor, weight: torch.Tensor) -> tuple:
        (loss,) = truth(hidden, weight)
        rounded = loss.bfloat16().float() - loss
        return (loss + rounded.detach() + 0.04 * (loss - loss.detach()),)

    gate, opponent = Gate(inputs, (torch.tensor(0.7),)), Opponent("coarse", coarse, truth)
    assert "output 0" in gate.why_wrong(opponent)
    assert "gradient of input 0" in gate.why_wrong(replace(opponent, output_dtype=torch.bfloat16))
    assert gate.why_wrong(replace(opponent, output_dtype=torch.bfloat16, gradient_slack=0.1)) is None


def test_the_gate_reports_what_an_opponent_raises() -> None:
    def broken(outputs: tuple) -> tuple:
        raise RuntimeError("no kernel image\nfor this device")

    assert checked("swiglu", broken) == "it raised RuntimeError: no kernel image"
