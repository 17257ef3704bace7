"""Sampling: filters against their definition, the cache against the whole sequence, seeds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pico_kernels import KernelSet

from pico_fast.config import ModelConfig
from pico_fast.model.decoder import PicoDecoder
from pico_fast.model.generate import filter_logits, generate

CONFIG = ModelConfig(
    d_model=32,
    n_layers=2,
    vocab_size=31,
    max_seq_len=20,
    attention_n_heads=4,
    attention_n_kv_heads=2,
    activation_hidden_dim=48,
)


@pytest.fixture(scope="module")
def model() -> PicoDecoder:
    torch.manual_seed(0)
    return PicoDecoder(CONFIG, KernelSet.from_config())


@pytest.mark.parametrize("prompt_length", [1, 2, 7])
def test_greedy_equals_the_argmax_of_whole_sequences(model, prompt_length):
    tokens = torch.randint(31, (3, prompt_length))
    got = generate(model, tokens, 8, temperature=0)
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, tokens)


def test_a_seed_repeats_and_other_seeds_differ(model):
    prompt = torch.randint(31, (2, 3))
    first, again, other = (generate(model, prompt, 15, seed=seed, top_k=20, top_p=0.95) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    generate(model, torch.zeros(1, 1, dtype=torch.long), 5, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_sampled_frequencies_follow_the_models_distribution(model):
    prompt = torch.full((20_000, 1), 5)
    drawn = generate(model, prompt, 1, temperature=0.7, seed=0)[:, 1].bincount(minlength=31) / 20_000
    expected = (model(prompt[:1])[0, -1] / 0.7).softmax(-1)
    assert (drawn - expected).abs().max() < 0.015


def test_a_sequence_ends_at_eos_and_is_filled_with_it(model):
    prompt = torch.randint(31, (4, 2))
    free = generate(model, prompt, 10, temperature=0)
    eos = int(free[0, 4])
    stopped = generate(model, prompt, 10, temperature=0, eos_id=eos)
    for row, unstopped in zip(stopped, free, strict=True):
        ends = (unstopped[2:] == eos).nonzero()
        length = int(ends[0]) + 3 if len(ends) else 12
        assert torch.equal(row[:length], unstopped[:length][: len(row)])
        assert (row[length:] == eos).all()


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.integers(1, 12), st.floats(0.01, 1.0))
def test_filters_keep_exactly_top_k_and_the_nucleus(values, top_k, top_p):
    logits = torch.tensor([values], dtype=torch.float64) + torch.arange(len(values)) * 1e-6  # no ties
    by_rank = logits[0].argsort(descending=True).tolist()
    kept = filter_logits(logits, top_k=top_k)[0].isfinite().nonzero().flatten().tolist()
    assert sorted(kept) == sorted(by_rank[:top_k])
    kept = set(filter_logits(logits, top_p=top_p)[0].isfinite().nonzero().flatten().tolist())
    probabilities = logits[0].softmax(-1)
    nucleus = by_rank[: len(kept)]
    assert kept == set(nucleus)
    assert sum(probabilities[i] for i in nucleus) >= top_p - 1e-9
    assert len(nucleus) == 1 or sum(probabilities[i] for i in nucleus[:-1]) < top_p + 1e-9


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}),
        (torch.zeros(1, 15, dtype=torch.long), {}),
        (torch.zeros(1, 2, dtype=torch.long), {"temperature": -1.0}),
        (torch.zeros(1, 2, dtype=torch.long), {"top_k": 0}),
        (torch.zeros(1, 2, dtype=torch.long), {"top_p": 0.0}),
    ],
)
def test_impossible_requests_are_refused(model, prompt, settings):
    with pytest.raises(ValueError, match=r"possible|expected"):
        generate(model, prompt, 6, **settings)
