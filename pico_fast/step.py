"""One training step, and the late reading of its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pico_fast.model.decoder import PicoDecoder
from pico_fast.parallel.data_parallel import LossFunction
from pico_fast.parallel.gradients import clip, global_numbers, sum_over_tensor_parallel
from pico_fast.parallel.mesh import SINGLE, Parallel


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of one step, still on the device: loss (mean over counted tokens) and gradient norm before clipping.

    Both are of the global batch, and the same on every rank.
    """

    step: int
    lr: float
    loss: Tensor
    grad_norm: Tensor | None


def training_step(
    model: PicoDecoder,
    optimizer: torch.optim.Optimizer,
    micro_batches: Tensor,
    *,
    step: int,
    lr: float,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    measure_norm: bool = False,
    give_up: Callable[[], bool] = lambda: False,
    loss_function: LossFunction | None = None,
    parallel: Parallel = SINGLE,
) -> StepNumbers | None:
    """Forward, backward and update on ``micro_batches`` (micro-batches, rows, max_seq_len + 1) int32.

    The loss is the sum over all tokens divided by their number, so gradients do not depend on how the rows are cut into
    micro-batches. Nothing here waits for the device. ``skip_nonfinite`` leaves weights, moments and step count
    untouched where loss or gradient are not finite (the fused optimizer's ``found_inf``). If ``give_up()`` becomes true
    between micro-batches, None is returned and everything is as it was before the step.

    Several processes: ``micro_batches`` are the rows of this data-parallel rank, ``loss_function`` is what
    :func:`~pico_fast.parallel.data_parallel.parallelise` gave, and ``give_up`` answers all ranks alike. After a step
    given up, FSDP2 keeps gradients of its own: save and end, do not step again.
    """
    loss_function = loss_function or LossFunction(model.loss)
    device = model.rope_cos.device
    rows = micro_batches.to(device, non_blocking=True)
    counted_tokens = rows[..., 1:].numel() * parallel.dp_size
    loss = torch.zeros((), device=device)
    for index, micro_batch in enumerate(rows.long(), start=1):
        if give_up():
            optimizer.zero_grad(set_to_none=True)
            return None
        with loss_function.accumulating(index < len(rows)):
            micro_loss = loss_function(
                micro_batch[:, :-1], micro_batch[:, 1:], reduction="sum", denominator=counted_tokens
            )
            micro_loss.backward()
        loss += micro_loss.detach()
    sum_over_tensor_parallel(model, parallel)

    needs_norm = measure_norm or skip_nonfinite or max_grad_norm is not None
    loss, grad_norm = global_numbers(model, loss, parallel, norm=needs_norm)
    if max_grad_norm is not None and grad_norm is not None:
        clip(model, max_grad_norm, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if skip_nonfinite and grad_norm is not None:
        optimizer.found_inf = (~(loss + grad_norm).isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepNumbers(step, lr, loss, grad_norm)


@dataclass(frozen=True)
class StepValues:
    """:class:`StepNumbers` on the host."""

    step: int
    lr: float
    loss: float
    grad_norm: float | None


class LateReader:
    """Reads the numbers of a step one step later, so that the host never waits for the step it has just launched.

    On CUDA the values travel through pinned memory behind an event. On a CPU reading them costs nothing; on MPS it
    waits for the work queued so far, there being no such copy.
    """

    def __init__(self) -> None:
        self._pending: tuple[StepNumbers, Tensor, torch.cuda.Event | None] | None = None

    def push(self, numbers: StepNumbers) -> StepValues | None:
        """Start the copy of this step's numbers; returns the values of the step before, if there was one."""
        before = self.flush()
        norm = numbers.grad_norm if numbers.grad_norm is not None else torch.zeros_like(numbers.loss)
        values, event = torch.stack([numbers.loss.float(), norm.float()]), None
        if values.is_cuda:
            values = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = numbers, values, event
        return before

    def flush(self) -> StepValues | None:
        """The values of the last pushed step; waits for them."""
        if self._pending is None:
            return None
        (numbers, values, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        loss, norm = values.tolist()
        return StepValues(numbers.step, numbers.lr, loss, None if numbers.grad_norm is None else norm)
