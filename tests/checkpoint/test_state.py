"""Parameters, moments and generators go out and come back exactly."""

import json
import random

import numpy as np
import pytest
import torch

from pico_fast.checkpoint.rng import rng_state, set_rng_state
from pico_fast.checkpoint.state import StateMismatchError, load_state_tensors, state_tensors


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 6, bias=False), torch.nn.LayerNorm(6))


def adamw(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 7, (5,), generator=torch.Generator().manual_seed(step))
        loss = model(ids).float().pow(2).sum() + model[1].weight.float().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"fused": True, "amsgrad": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_exactly(options, dtype):
    model = network().to(dtype)
    optimizer = adamw(model, **options)
    train(model, optimizer, range(3))
    saved = {name: tensor.detach().clone() for name, tensor in state_tensors(model, optimizer).items()}
    expected = train(model, optimizer, range(3, 6))
    other = network(1).to(dtype)
    other_optimizer = adamw(other, **options)
    train(other, other_optimizer, range(9, 11))  # state that must be replaced, not kept
    load_state_tensors(other, other_optimizer, saved)
    assert train(other, other_optimizer, range(3, 6)) == expected
    final, other_final = state_tensors(model, optimizer), state_tensors(other, other_optimizer)
    assert all(torch.equal(tensor, other_final[name]) for name, tensor in final.items())


def test_names():
    model = network()
    optimizer = adamw(model, fused=True)
    before = state_tensors(model, optimizer)
    assert list(before) == ["model/0.weight", "model/1.weight", "model/2.weight", "model/2.bias"]
    assert before["model/1.weight"].data_ptr() == model[1].weight.data_ptr()
    train(model, optimizer, range(1))
    names = {name for name in state_tensors(model, optimizer) if name.endswith("/1.weight")}
    assert names == {
        f"{key}/1.weight" for key in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step")
    }


def test_before_the_first_step_there_are_no_moments():
    model = network()
    saved = {name: tensor.clone() for name, tensor in state_tensors(model, adamw(model)).items()}
    other = network(1)
    optimizer = adamw(other, fused=True)
    train(other, optimizer, range(2))
    load_state_tensors(other, optimizer, saved)
    assert not any(optimizer.state.values())
    assert train(other, optimizer, range(3)) == train(model, adamw(model, fused=True), range(3))


def test_loaded_moments_are_not_shared_with_the_source():
    model = network()
    optimizer = adamw(model, fused=True)
    train(model, optimizer, range(1))
    saved = {name: tensor.detach().clone() for name, tensor in state_tensors(model, optimizer).items()}
    copy = {name: tensor.clone() for name, tensor in saved.items()}
    load_state_tensors(model, optimizer, saved)
    train(model, optimizer, range(1))
    assert all(torch.equal(copy[name], tensor) for name, tensor in saved.items())


def test_parameter_groups_keep_their_parameters():
    def grouped(model):
        return torch.optim.AdamW(
            [{"params": [model[2].weight, model[2].bias], "lr": 1e-3}, {"params": [model[1].weight, model[0].weight]}]
        )

    model, other = network(), network(1)
    optimizer, other_optimizer = grouped(model), grouped(other)
    train(model, optimizer, range(2))
    load_state_tensors(other, other_optimizer, state_tensors(model, optimizer))
    assert train(other, other_optimizer, range(2, 4)) == train(model, optimizer, range(2, 4))
    assert [group["lr"] for group in other_optimizer.param_groups] == [1e-3, 1e-3]


def damaged(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    if change == "missing parameter":
        del tensors["model/1.weight"]
    elif change == "extra parameter":
        tensors["model/9.weight"] = torch.zeros(1)
    elif change == "shape":
        tensors["model/1.weight"] = torch.zeros(4, 6)
    elif change == "dtype":
        tensors["model/1.weight"] = tensors["model/1.weight"].double()
    elif change == "missing moment":
        del tensors["optimizer/exp_avg_sq/1.weight"]
    elif change == "moment shape":
        tensors["optimizer/exp_avg/1.weight"] = torch.zeros(6, 5)
    elif change == "moment dtype":
        tensors["optimizer/exp_avg/1.weight"] = tensors["optimizer/exp_avg/1.weight"].bfloat16()
    elif change == "moment of nothing":
        tensors["optimizer/exp_avg/9.weight"] = torch.zeros(1)
    elif change == "unknown":
        tensors["else/1.weight"] = torch.zeros(1)
    return tensors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("missing parameter", "model/1.weight: not in the checkpoint"),
        ("extra parameter", "model/9.weight: not in the model"),
        ("shape", r"model/1.weight: float32 \(4, 6\) in the checkpoint, float32 \(6, 4\) in the model"),
        ("dtype", r"model/1.weight: float64 \(6, 4\) in the checkpoint"),
        ("missing moment", "optimizer/exp_avg_sq/1.weight: not in the checkpoint"),
        ("moment shape", r"optimizer/exp_avg/1.weight: float32 \(6, 5\)"),
        ("moment dtype", r"optimizer/exp_avg/1.weight: bfloat16 \(6, 4\)"),
        ("moment of nothing", r"9.weight: not a parameter of the optimizer"),
        ("unknown", "else/1.weight: unknown name"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(change, named):
    model = network()
    optimizer = adamw(model, fused=True)
    train(model, optimizer, range(1))
    other = network(1)
    other_optimizer = adamw(other)
    before = {name: tensor.clone() for name, tensor in state_tensors(other, other_optimizer).items()}
    with pytest.raises(StateMismatchError, match=named):
        load_state_tensors(other, other_optimizer, damaged(state_tensors(model, optimizer), change))
    after = state_tensors(other, other_optimizer)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def draws() -> list[float]:
    return [
        *torch.rand(3).tolist(),
        torch.randn(1).item(),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
    ]


def test_generators_return_to_their_state():
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002
    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    np.random.randn()  # noqa: NPY002
    state = json.loads(json.dumps(rng_state()))
    expected = draws()
    draws()
    missing = set_rng_state(state)
    assert draws() == expected
    assert missing == []


def test_generators_that_are_not_in_the_state_are_named():
    assert set_rng_state({}) == ["torch", "python", "numpy", *(["cuda"] if torch.cuda.is_available() else [])]
    if not torch.cuda.is_available():
        assert set_rng_state({**rng_state(), "cuda": "AAAA"}) == ["cuda"]
