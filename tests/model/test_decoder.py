"""The decoder: pico's parameters, initial weights and arithmetic."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from pico_kernels import KernelSet
from torch import nn

from pico_fast.config import ModelConfig
from pico_fast.config_io import load_config
from pico_fast.flops import parameter_counts
from pico_fast.model.build import build_model
from pico_fast.model.cache import KVCache
from pico_fast.model.decoder import Embedding, PicoDecoder
from pico_fast.model.sharding import tensor_parallel_dim
from pico_fast.parallel.mesh import Axis
from pico_fast.runtime import Runtime

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(
    d_model=32,
    n_layers=2,
    vocab_size=61,
    max_seq_len=24,
    attention_n_heads=4,
    attention_n_kv_heads=2,
    activation_hidden_dim=48,
)


def decoder(config=SMALL, kernels="auto", dtype=torch.float32, seed=0) -> PicoDecoder:
    torch.manual_seed(seed)
    return PicoDecoder(config, KernelSet.from_config({"default": kernels}), dtype)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("tiny", 11_282_784), ("small", 64_595_328), ("medium", 181_095_168), ("large", 569_808_384)],
)
def test_published_sizes(size, parameters):
    config = load_config(ROOT / f"configs/pico-decoder-{size}.yaml").model
    with torch.device("meta"):
        model = PicoDecoder(config, KernelSet.from_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_frequent_token_are_summed_in_float32(dtype):
    """8192 terms of about 1e-3, which a sum in bfloat16 would stop adding at 0.5; and one token that occurs once."""
    embedding = Embedding(5, 3).to(dtype)
    ids = torch.full((8, 1024), 2)
    ids[3, 5] = 4
    embedding(ids).backward(torch.full((8, 1024, 3), 1e-3, dtype=dtype))
    term = float(torch.tensor(1e-3, dtype=dtype))
    expected = torch.tensor([0, 0, 8191 * term, 0, term])[:, None].expand(5, 3)
    assert embedding.weight.grad.dtype == dtype
    torch.testing.assert_close(embedding.weight.grad.float(), expected, rtol=2**-8, atol=0)
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_initial_weights_are_picos(golden):
    record = json.loads((golden / "golden.json").read_text())
    config = load_config()
    config.model = ModelConfig(**record["config"]["model"])
    cpu = Runtime(torch.device("cpu"), torch.float32, torch.float32, 1)
    weights = dict(build_model(config, KernelSet.from_config(), cpu).named_parameters())
    expected = record["weights"]["0"]
    assert weights.keys() == expected.keys()
    for name, of_pico in expected.items():
        assert list(weights[name].shape) == of_pico["shape"]
        assert weights[name].flatten()[:4].tolist() == of_pico["first"]
        assert weights[name].double().norm().item() == pytest.approx(of_pico["l2"], rel=1e-12)


def plain_logits(model: PicoDecoder, ids: torch.Tensor) -> torch.Tensor:
    """The decoder written out in float64 with nothing but torch's elementary operations."""
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}
    config, length = model.config, ids.shape[1]

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weights[f"{name}.weight"]

    angles = torch.outer(
        torch.arange(length).double(),
        config.position_emb_theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim),
    )

    def rotate(x):
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.view_as_real(turned).flatten(-2)

    x = weights["embedding_proj.weight"][ids]
    for layer in range(config.n_layers):
        name = f"layers.{layer}"
        y = norm(x, f"{name}.attention_norm")
        q, k, v = (
            (y @ weights[f"{name}.attention.{p}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)) for p in "qkv"
        )
        repeats = config.attention_n_heads // config.attention_n_kv_heads
        q, k, v = rotate(q), rotate(k).repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(config.head_dim)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)
        x = x + attended @ weights[f"{name}.attention.o_proj.weight"].T
        y = norm(x, f"{name}.swiglu_norm")
        gate, up = (y @ weights[f"{name}.swiglu.w_{i}.weight"].T for i in (0, 1))
        x = x + (nn.functional.silu(gate) * up) @ weights[f"{name}.swiglu.w_2.weight"].T
    return norm(x, "output_norm") @ weights["de_embedding_proj.weight"].T


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_logits_and_loss_equal_the_network_written_out(kernels, kv_heads):
    model = decoder(dataclasses.replace(SMALL, attention_n_kv_heads=kv_heads), kernels)
    ids = torch.randint(61, (3, 17))
    expected = plain_logits(model, ids[:, :-1])
    torch.testing.assert_close(model(ids[:, :-1]).double(), expected, atol=1e-5, rtol=1e-5)
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:]).double(), loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_equal_transformers_llama(kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    from pico_fast.interop.llama import llama_config_dict, to_llama_state

    config = dataclasses.replace(SMALL, attention_n_kv_heads=kv_heads, position_emb_theta=500.0)
    model = decoder(config)
    llama = LlamaForCausalLM(LlamaConfig(**llama_config_dict(config)))
    llama.load_state_dict(to_llama_state(model.state_dict(), config))
    ids = torch.randint(61, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), llama(ids).logits, atol=1e-4, rtol=0)


def test_each_op_can_be_swapped_alone():
    ids = torch.randint(61, (2, 9))
    expected = decoder(kernels="reference").loss(ids[:, :-1], ids[:, 1:])
    for op in [field.name for field in dataclasses.fields(KernelSet)]:
        torch.manual_seed(0)
        model = PicoDecoder(SMALL, KernelSet.from_config({"default": "reference", op: "torch"}))
        torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:]), expected, atol=1e-5, rtol=1e-5)


def test_models_with_different_settings_live_side_by_side():
    """pico-train keeps its rotary table on the class: the second model gets the first one's positions."""
    ids = torch.randint(61, (1, 9))
    long = dataclasses.replace(SMALL, max_seq_len=64, position_emb_theta=100.0, attention_n_heads=2)
    first, second = decoder(), decoder(long)
    for model in (first, second, first):
        torch.testing.assert_close(model(ids).double(), plain_logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5], [1, 7, 1], [3, 1, 5]])
def test_cache_gives_the_same_logits_however_the_tokens_arrive(pieces):
    model, ids = decoder(), torch.randint(61, (2, 9))
    cache = KVCache(SMALL, 2, 12, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        got = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(got, model(ids), atol=1e-5, rtol=1e-5)
    assert cache.length == 9


def test_bf16_activations_keep_float32_gradients():
    model, ids = decoder(dtype=torch.bfloat16), torch.randint(61, (2, 17))
    assert model.hidden(ids).dtype == torch.bfloat16
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    exact = decoder()
    exact.loss(ids[:, :-1], ids[:, 1:]).backward()
    for (name, rounded), full in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (rounded.grad - full.grad).norm() / full.grad.norm()
        assert error < 0.05, f"{name}: {error}"


def test_positions_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match=r"25 positions.*max_seq_len is 24"):
        decoder()(torch.zeros(1, 25, dtype=torch.long))


def test_the_formula_counts_the_parameters_that_the_table_splits():
    counts, split, whole = parameter_counts(SMALL), 0, 0
    for name, parameter in decoder().named_parameters():
        if tensor_parallel_dim(name) is None:
            whole += parameter.numel()
        else:
            split += parameter.numel()
    assert (counts.split, counts.total - counts.split) == (split, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_parts_have_the_same_gradient_bit_for_bit_and_keep_less(dtype):
    ids = torch.randint(61, (3, 25))
    gradients, kept = [], []
    for recomputed in ("none", "attention", "block"):
        torch.manual_seed(0)
        model = PicoDecoder(SMALL, KernelSet.from_config({"default": "torch"}), dtype, recomputed=recomputed)
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(storages.values()))
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert all(map(torch.equal, gradients[0], gradients[2]))
    assert kept[0] > kept[1] > kept[2]


def test_a_part_of_the_model_needs_sizes_that_divide():
    with pytest.raises(ValueError, match=r"q_proj.*parallel.tp = 3 does not divide dimension 0 of 32"):
        PicoDecoder(SMALL, KernelSet.from_config(), tp=Axis(3, 0))


def test_the_sharding_table_names_every_parameter_and_splits_into_whole_heads():
    for name, parameter in decoder().named_parameters():
        dim = tensor_parallel_dim(name)
        assert dim is None or parameter.shape[dim] % 2 == 0
    with pytest.raises(KeyError):
        tensor_parallel_dim("layers.0.attention.bias")
