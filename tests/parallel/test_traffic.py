"""The formula of docs/parallel.md counts the bytes that a step's collectives really send."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from pico_kernels import KernelSet
from torch.utils._python_dispatch import TorchDispatchMode

from pico_fast.config import Config, ModelConfig
from pico_fast.model.build import build_model
from pico_fast.parallel.data_parallel import parallelise
from pico_fast.parallel.gradients import sum_over_tensor_parallel
from pico_fast.parallel.layout import Layout, layout_of
from pico_fast.parallel.mesh import DIMENSIONS, Parallel, start_parallel
from pico_fast.parallel.traffic import step_traffic
from pico_fast.runtime import Runtime
from tests.ranks import run_ranks

# Every first dimension divides by 4: FSDP2 would fill up others, which the formula does not count
SHAPE = ModelConfig(
    d_model=32,
    n_layers=2,
    vocab_size=64,
    max_seq_len=16,
    attention_n_heads=4,
    attention_n_kv_heads=4,
    activation_hidden_dim=48,
)
MICRO_BATCHES, ROWS = 3, 2


class RingBytes(TorchDispatchMode):
    """Adds up what a ring sends for every collective, by the dimension of the mesh that its group belongs to."""

    def __init__(self, parallel: Parallel):
        super().__init__()
        axes = {name: getattr(parallel, name) for name in DIMENSIONS}
        self._dimensions = {axis.group.group_name: name for name, axis in axes.items() if axis.group is not None}
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("c10d::"):
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            ring = (group.size() - 1) / group.size()
            if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
                self.sent[self._dimensions[group.group_name]] += ring * max(args[0].nbytes, args[1].nbytes)
            elif name in ("c10d::allreduce_", "c10d::allreduce_coalesced_"):
                self.sent[self._dimensions[group.group_name]] += 2 * ring * sum(tensor.nbytes for tensor in args[0])
            elif name != "c10d::broadcast_":  # DDP makes sure in its first step that all have the same parameters
                raise AssertionError(f"{name} is not in the formula")
        return function(*args, **(kwargs or {}))


def count(sizes: dict[str, int], dtype: torch.dtype, recomputed: str) -> None:
    config = Config(model=SHAPE)
    config.parallel.timeout_s, config.parallel.activation_checkpointing = 60, recomputed
    for name, size in sizes.items():
        setattr(config.parallel, name, size)
    runtime = Runtime(torch.device("cpu"), torch.float32, dtype, 1)
    parallel = start_parallel(config, runtime.device)
    model = build_model(config, KernelSet.from_config({"default": "torch"}), runtime, parallel)
    loss = parallelise(model, runtime, parallel)
    ids = torch.randint(64, (ROWS, 17))
    with RingBytes(parallel) as counted:
        for index in range(MICRO_BATCHES):
            with loss.accumulating(index < MICRO_BATCHES - 1):
                loss(ids[:, :-1], ids[:, 1:], reduction="sum", denominator=64).backward()
        sum_over_tensor_parallel(model, parallel)
    layout = layout_of(config.parallel, parallel.world_size)
    expected = step_traffic(
        SHAPE,
        layout,
        micro_batches=MICRO_BATCHES,
        tokens=ROWS * 16,
        activation_bytes=dtype.itemsize,
        recomputed=recomputed,
    )
    for name, bytes_sent in dataclasses.asdict(expected).items():
        assert counted.sent[name] == pytest.approx(bytes_sent, rel=1e-12), (str(layout), dtype, recomputed, name)


def count_every_layout() -> None:
    for sizes in (
        {},
        {"dp_shard": 4},
        {"dp_shard": 2},
        {"tp": 2},
        {"tp": 4},
        {"tp": 2, "dp_shard": 2},
    ):
        for dtype in (torch.float32, torch.bfloat16):
            count(sizes, dtype, "none")
    for recomputed in ("block", "attention"):
        count({"tp": 2, "dp_shard": 2}, torch.float32, recomputed)


@pytest.mark.distributed
def test_bytes_sent_in_every_layout_are_those_of_the_formula():
    run_ranks(count_every_layout, 4, timeout=300)


def test_one_process_sends_nothing():
    assert step_traffic(SHAPE, Layout(), micro_batches=2, tokens=32, activation_bytes=4).total == 0
