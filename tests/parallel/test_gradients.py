"""The step's numbers and decisions are those of all ranks; other precisions and recomputation work in every layout."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pico_fast.parallel.agreement import Poll
from pico_fast.parallel.gradients import clip, sum_over_tensor_parallel
from pico_fast.parallel.slices import local
from tests.parallel.tiny_training import LAYOUTS, some_rows, start, tiny_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Collectives(TorchDispatchMode):
    """Counts the c10d operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def state_of(training) -> list[torch.Tensor]:
    moments = [local(value) for state in training.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*map(local, training.model.parameters()), *moments]]


def changed(before, after) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def a_step_that_one_rank_spoils(training) -> None:
    """NaN in a weight's gradient on the last rank only: every rank leaves everything as it was, and knows why."""
    training.step(some_rows(), 0)
    before = state_of(training)
    parameter = next(p for p in training.model.parameters() if local(p).numel())
    broken = training.parallel.rank == training.parallel.world_size - 1
    original = training.loss_function.loss
    spoiled = copy.copy(training.loss_function)
    if broken:  # in its loss and gradients
        object.__setattr__(spoiled, "loss", lambda *a, **k: original(*a, **k) * float("nan"))
    training.loss_function, kept = spoiled, training.loss_function
    numbers = training.step(some_rows(1), 1, skip_nonfinite=True)
    training.loss_function = kept
    assert not torch.isfinite(numbers.loss)
    assert not torch.isfinite(numbers.grad_norm)
    assert not changed(before, state_of(training))
    assert parameter.grad is None
    assert torch.isfinite(training.step(some_rows(2), 2, skip_nonfinite=True).loss)
    assert changed(before, state_of(training))


def a_step_given_up(training) -> None:
    """Asked of one rank only, in the first micro-batch: all know in the second, of four. No step can follow."""
    before, poll = state_of(training), Poll(training.parallel)
    mine = training.parallel.rank == 1
    rows = torch.cat([some_rows(1), some_rows(2)])
    assert training.step(rows, 1, give_up=lambda: poll.ask(mine)) is None
    assert not changed(before, state_of(training))


def the_tp_sum_is_one_collective(training) -> None:
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Collectives() as seen:
        sum_over_tensor_parallel(training.model, training.parallel)
    tp = training.parallel.tp.size
    assert seen.names == (["allreduce_coalesced_"] if tp > 1 else [])
    whole, split = training.model.output_norm.weight.grad, training.model.layers[0].attention.q_proj.weight.grad
    assert set(local(whole).tolist()) == {tp}
    assert set(local(split).flatten().tolist()) == {1}
    training.optimizer.zero_grad()


def losses_with(precision: str, recomputed: str, layout) -> list[float]:
    """Of two steps, with rotary tables that arrive in float32: FSDP2's mixed precision would cast what it is given."""
    config = tiny_config(precision)
    config.parallel.activation_checkpointing = recomputed
    training = start(config, layout)
    seen = set()
    for block in training.model.layers:
        block.attention.register_forward_pre_hook(lambda module, given: seen.update(t.dtype for t in given[1:3]))
    losses = [float(training.step(some_rows(step), step).loss) for step in range(2)]
    assert seen == {torch.float32}
    return losses


def every_check(world_size: int) -> None:
    expected = {precision: losses_with(precision, "none", None) for precision in ("32-true", "bf16-mixed", "bf16-true")}
    for name, layout in LAYOUTS[world_size].items():
        if max(layout.dp_shard, layout.dp_replicate) == 4:  # nothing that two processes have not shown
            continue
        training = start(tiny_config(), layout)
        the_tp_sum_is_one_collective(training)
        a_step_that_one_rank_spoils(training)
        a_step_given_up(training)
        for precision, recomputed, limit in (
            ("bf16-mixed", "attention", 5e-3),
            ("bf16-true", "none", 2e-2),
            ("32-true", "block", 1e-5),
        ):
            found = losses_with(precision, recomputed, layout)
            assert found == pytest.approx(expected[precision], rel=limit), (name, precision, recomputed)


@pytest.mark.parametrize("world_size", [2, 4])
def test_numbers_and_decisions_in_every_layout(world_size):
    run_ranks(every_check, world_size, world_size)


def test_clipping_on_one_process_is_torchs_own_bit_for_bit():
    model = torch.nn.Sequential(torch.nn.Linear(30, 70), torch.nn.Linear(70, 5))
    twin = copy.deepcopy(model)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.7, foreach=True)
    clip(model, 0.7, norm)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
