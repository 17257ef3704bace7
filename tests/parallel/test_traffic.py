"""The formula of docs/parallel.md counts the bytes that a step's collectives really send."""

import dataclasses

import pytest
import torch
from pico_kernels import KernelSet

from benchmarks.parallel import sent_bytes
from pico_fast.config import Config, ModelConfig
from pico_fast.model.build import build_model
from pico_fast.parallel.data_parallel import parallelise
from pico_fast.parallel.gradients import sum_over_tensor_parallel
from pico_fast.parallel.layout import Layout
from pico_fast.parallel.mesh import start_parallel
from pico_fast.parallel.traffic import step_traffic
from pico_fast.runtime import Runtime
from tests.ranks import every_layout, run_ranks

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


def count(layout: Layout, dtype: torch.dtype, recomputed: str = "none") -> None:
    config = Config(model=SHAPE)
    config.parallel.timeout_s, config.parallel.activation_checkpointing = 60, recomputed
    for name, size in dataclasses.asdict(layout).items():
        setattr(config.parallel, name, size)
    runtime = Runtime(torch.device("cpu"), torch.float32, dtype, 1)
    parallel = start_parallel(config, runtime.device)
    model = build_model(config, KernelSet.from_config({"default": "torch"}), runtime, parallel)
    loss = parallelise(model, runtime, parallel)
    ids = torch.randint(64, (ROWS, 17))
    with sent_bytes(parallel) as sent:
        for index in range(MICRO_BATCHES):
            with loss.accumulating(index < MICRO_BATCHES - 1):
                loss(ids[:, :-1], ids[:, 1:], reduction="sum", denominator=64).backward()
        sum_over_tensor_parallel(model, parallel)
    expected = step_traffic(
        SHAPE,
        layout,
        micro_batches=MICRO_BATCHES,
        tokens=ROWS * 16,
        activation_bytes=dtype.itemsize,
        recomputed=recomputed,
    )
    assert sent["world"] == 0
    for name, bytes_sent in dataclasses.asdict(expected).items():
        assert sent[name] == pytest.approx(bytes_sent, rel=1e-12), (str(layout), dtype, recomputed, name)


def count_every_layout() -> None:
    for layout in every_layout(4):
        count(layout, torch.bfloat16)
    sharded = Layout(tp=2, dp_shard=2)
    count(sharded, torch.float32)
    for recomputed in ("block", "attention"):
        count(sharded, torch.bfloat16, recomputed)


@pytest.mark.distributed
def test_bytes_sent_in_every_layout_are_those_of_the_formula():
    run_ranks(count_every_layout, 4, timeout=300)


def test_one_process_sends_nothing():
    assert step_traffic(SHAPE, Layout(), micro_batches=2, tokens=32, activation_bytes=4).total == 0
