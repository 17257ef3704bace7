"""Learning-rate schedules and the optimizer's settings."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pico_fast.config import OptimizationConfig, TrainingConfig
from pico_fast.optim import build_optimizer, learning_rate


def training(scheduler="linear_with_warmup", max_steps=100, warmup=10, **rest) -> TrainingConfig:
    optimization = OptimizationConfig(lr=1e-3, lr_scheduler=scheduler, lr_warmup_steps=warmup, **rest)
    return TrainingConfig(optimization=optimization, max_steps=max_steps)


def test_linear_schedule_equals_the_golden_run(golden):
    logged = json.loads((golden / "golden.json").read_text())["learning_rates_logged"]
    config = training(max_steps=6, warmup=3)
    assert [f"{learning_rate(config, step):.2e}" for step in range(6)] == logged


@pytest.mark.parametrize(
    ("config", "at"),
    [
        (training("cosine"), {0: 0.0, 5: 5e-4, 10: 1e-3, 55: 5e-4, 100: 0.0}),
        (training("cosine", lr_min_ratio=0.1), {10: 1e-3, 55: 5.5e-4, 100: 1e-4, 200: 1e-4}),
        (training("wsd"), {5: 5e-4, 10: 1e-3, 89: 1e-3, 90: 1e-3, 95: 5e-4, 100: 0.0}),
        (training("wsd", lr_decay_steps=40, lr_min_ratio=0.5), {60: 1e-3, 80: 7.5e-4, 100: 5e-4}),
        (training("constant"), {5: 5e-4, 10: 1e-3, 1000: 1e-3}),
        (training(warmup=0), {0: 1e-3, 50: 5e-4}),
        (training(warmup=200), {100: 5e-4, 199: 9.95e-4}),
    ],
)
def test_schedules_at_known_steps(config, at):
    for step, expected in at.items():
        assert learning_rate(config, step) == pytest.approx(expected, abs=1e-12)


@given(
    scheduler=st.sampled_from(["linear_with_warmup", "cosine", "wsd", "constant"]),
    max_steps=st.integers(1, 50),
    warmup=st.integers(0, 60),
    ratio=st.floats(0, 1),
)
def test_a_schedule_rises_then_falls_within_its_bounds(scheduler, max_steps, warmup, ratio):
    config = training(scheduler, max_steps, warmup, lr_min_ratio=ratio)
    rates = [learning_rate(config, step) for step in range(max_steps)]
    assert all(0 <= rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    peak = min(warmup, max_steps - 1)
    assert all(a <= b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-15 for a, b in pairwise(rates[peak:]))


def test_weight_decay_is_on_every_parameter_as_in_pico():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizationConfig())
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 2
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.01, (0.9, 0.999), 1e-8)
