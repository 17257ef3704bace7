"""Data parallelism: the loss whose backward pass sums the gradients of the ranks that see other rows.

Replicated weights go through DDP, sharded ones through FSDP2 (``fully_shard`` per block, the rest in one group), both
at once through its HSDP. None of them divides: every rank's loss is a sum over its tokens divided by the **global**
number of tokens, so that adding gradients up is right, whatever the number of ranks and micro-batches.

Tensor parallelism is not their business: the weights they see are plain local tensors, and the sum over the tp ranks
follows once per step (:mod:`pico_fast.parallel.gradients`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed import ProcessGroup

from pico_fast.model.decoder import PicoDecoder
from pico_fast.parallel.mesh import Parallel
from pico_fast.runtime import Runtime


@dataclass(frozen=True)
class LossFunction:
    """``model.loss`` for training, called as that is; its backward pass sums over the data-parallel ranks.

    Attributes:
        loss: takes input ids and labels (B, S) and ``reduction``, ``denominator``; returns a float32 scalar.
        accumulating: context for a micro-batch's forward and backward; ``accumulating(True)`` for all but a step's last
            one keeps the gradients on this rank, since their sum needs to travel once only.
    """

    loss: Callable[..., Tensor]
    accumulating: Callable[[bool], AbstractContextManager[None]] = lambda more: contextlib.nullcontext()

    def __call__(self, input_ids: Tensor, labels: Tensor, *, reduction: str, denominator: float | Tensor) -> Tensor:
        """The loss of this rank's rows: its share of the global one where ``denominator`` counts all ranks' tokens."""
        return self.loss(input_ids, labels, reduction=reduction, denominator=denominator)


def parallelise(model: PicoDecoder, runtime: Runtime, parallel: Parallel) -> LossFunction:
    """Spread ``model`` over the mesh's data-parallel axes; call it before the optimizer is made.

    ``model`` keeps its parameter names and its methods. Under FSDP its parameters become DTensors over ``dp_shard``
    (and ``dp_replicate``); otherwise they stay what they are. Without data-parallel ranks nothing is wrapped.
    """
    if parallel.dp_shard.size > 1:
        return _sharded(model, runtime, parallel)
    if parallel.dp_replicate.size > 1:
        return _replicated(model, parallel)
    return LossFunction(model.loss)


def _sharded(model: PicoDecoder, runtime: Runtime, parallel: Parallel) -> LossFunction:
    # imported here: it takes more than a second, which one process need not pay
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    assert parallel.mesh is not None
    dimensions = ("dp_replicate", "dp_shard") if parallel.dp_replicate.size > 1 else ("dp_shard",)
    policy = MixedPrecisionPolicy(
        param_dtype=runtime.compute_dtype,  # what is gathered; the shards and the optimizer keep runtime.param_dtype
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables are float32 inputs of every block, and must stay so
    )
    mesh = parallel.mesh[dimensions]
    units = [*model.layers, model]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that also divides, by 1 or anything else
    for method in ("loss", "hidden", "next_token_logits"):  # forward gathers the weights without being asked to
        register_fsdp_forward_method(model, method)
    assert parallel.dp_shard.group is not None
    model.shared_over.append(parallel.dp_shard.group)

    @contextlib.contextmanager
    def accumulating(more: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(not more)  # type: ignore[operator]
        yield

    return LossFunction(model.loss, accumulating)


class _Loss(nn.Module):
    """``model.loss`` as a module's forward, the only method that DDP wraps."""

    def __init__(self, model: PicoDecoder):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, reduction: str, denominator: float | Tensor) -> Tensor:
        return self.model.loss(input_ids, labels, reduction=reduction, denominator=denominator)


def _replicated(model: PicoDecoder, parallel: Parallel) -> LossFunction:
    from torch.nn.parallel import DistributedDataParallel

    # The rotary tables are the same everywhere: no broadcast in every forward pass. torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {
        "process_group": parallel.dp_replicate.group,
        "gradient_as_bucket_view": True,  # one copy of the gradients, not two
        no_broadcast: False,
    }
    wrapped = DistributedDataParallel(_Loss(model), **options)
    # a lambda: DDP compares a hook's annotations with classes, and here they are strings
    wrapped.register_comm_hook(parallel.dp_replicate.group, lambda group, bucket: _sum_in_float32(group, bucket))

    def loss(input_ids: Tensor, labels: Tensor, *, reduction: str, denominator: float | Tensor) -> Tensor:
        return wrapped(input_ids, labels, reduction, denominator)

    return LossFunction(loss, lambda more: wrapped.no_sync() if more else contextlib.nullcontext())


def _sum_in_float32(group: ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: add the bucket up over ``group``, without DDP's own division by its size.

    bfloat16 gradients (``bf16-true``) are added in float32 and rounded once.
    """
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer.float(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0].to(buffer.dtype))
