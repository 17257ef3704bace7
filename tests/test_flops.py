import pytest
import torch

from pico_fast.config import ModelConfig
from pico_fast.flops import (
    flops_per_token,
    measured_matmul_flops,
    parameter_counts,
    peak_flops,
    training_memory,
    vendor_peak,
)
from pico_fast.parallel.layout import Layout

PUBLISHED = {96: 11_282_784, 384: 64_595_328, 768: 181_095_168, 1536: 569_808_384}


def pico(d_model: int, **changes: int) -> ModelConfig:
    return ModelConfig(d_model=d_model, activation_hidden_dim=4 * d_model, **changes)


@pytest.mark.parametrize(("d_model", "total"), PUBLISHED.items())
def test_published_models_have_exactly_their_parameters(d_model: int, total: int) -> None:
    counts = parameter_counts(pico(d_model))
    assert counts.total == total
    assert counts.embedding == counts.head == 50304 * d_model
    assert counts.embedding + counts.head + counts.non_embedding == total


@pytest.mark.parametrize(("d_model", "megaflops"), [(96, 67), (384, 385), (768, 1081), (1536, 3408)])
def test_flops_per_token_of_the_published_models(d_model: int, megaflops: int) -> None:
    assert round(flops_per_token(pico(d_model), 2048) / 1e6) == megaflops


def test_flops_are_those_of_the_matrix_products_that_torch_counts() -> None:
    """Forward products of a decoder, attention scores apart, as torch counts them; 6 N is three times 2 N."""
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(
        d_model=24, n_layers=2, vocab_size=50, attention_n_heads=4, attention_n_kv_heads=2, activation_hidden_dim=40
    )
    attention = [(24, 24), (24, 12), (24, 12), (24, 24)]
    shapes = [*attention, (24, 40), (24, 40), (40, 24)] * config.n_layers + [(24, 50)]
    with FlopCounterMode(display=False) as counter:
        for rows, columns in shapes:
            torch.ones(1, rows) @ torch.ones(rows, columns)
    norms = (2 * config.n_layers + 1) * config.d_model
    scores = 12 * config.n_layers * config.d_model * 8
    assert flops_per_token(config, 8) == 3 * counter.get_total_flops() + 6 * norms + scores


def test_causal_count_is_the_mean_number_of_visible_keys() -> None:
    config = pico(96)
    linear = 6 * (parameter_counts(config).total - parameter_counts(config).embedding)
    full, causal = flops_per_token(config, 7) - linear, flops_per_token(config, 7, causal=True) - linear
    assert causal / full == pytest.approx((sum(range(1, 8)) / 7) / 7)


def test_memory_follows_precision_and_micro_batch() -> None:
    config = pico(96)
    total = parameter_counts(config).total
    full = training_memory(config, precision="32-true", rows=4, seq_len=256)
    mixed = training_memory(config, precision="bf16-mixed", rows=4, seq_len=256)
    half = training_memory(config, precision="bf16-true", rows=4, seq_len=256)
    assert (full.weights, full.gradients, full.moments) == (4 * total, 4 * total, 8 * total)
    assert (mixed.weights, mixed.gradients, mixed.moments) == (6 * total, 4 * total, 8 * total)
    assert (half.weights, half.gradients, half.moments) == (2 * total, 2 * total, 4 * total)
    assert mixed.activations < full.activations
    assert training_memory(config, precision="bf16-mixed", rows=8, seq_len=256).activations == 2 * mixed.activations
    assert full.total == full.weights + full.gradients + full.moments + full.activations


def test_memory_of_each_rank_follows_the_layout() -> None:
    config, precision = pico(96), "bf16-mixed"
    counts = parameter_counts(config)

    def estimate(micro_batches: int = 1, recomputed: str = "none", **sizes: int):
        return training_memory(
            config,
            precision=precision,
            rows=4,
            seq_len=256,
            micro_batches=micro_batches,
            layout=Layout(**sizes),
            recomputed=recomputed,
        )

    single, tp, sharded = estimate(), estimate(tp=2), estimate(dp_shard=4)
    assert estimate(dp_replicate=4) == single
    assert tp.gradients == 4 * (counts.total - counts.split // 2)
    assert tp.activations == single.activations // 2
    assert (sharded.gradients, sharded.moments) == (single.gradients // 4, single.moments // 4)
    assert estimate(2, dp_shard=4).gradients == sharded.gradients + 4 * counts.total
    assert sharded.activations == single.activations
    blocks, attention = estimate(recomputed="block"), estimate(recomputed="attention")
    assert blocks.activations < attention.activations < single.activations


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_vendor_peaks(name: str, peak: float) -> None:
    assert vendor_peak(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA A1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Some other card",
    ],
)
def test_other_devices_are_measured_not_guessed(name: str) -> None:
    assert vendor_peak(name) is None


def test_measured_peak_says_so_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < rate < 1e15
    assert source.startswith("of the float32 matmul rate measured at start, ")
    assert source.endswith("FLOP/s")


def test_measured_rate_is_not_above_what_single_products_reach() -> None:
    rate = measured_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    again = measured_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1 / 8 < rate / again < 8  # a busy machine; a wrong count of operations would be off by a power of the size
