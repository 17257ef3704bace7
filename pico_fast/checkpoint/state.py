"""The tensors that make up the state of a run: parameters and optimizer state, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MODEL = "model/"
OPTIMIZER = "optimizer/"


@dataclass(frozen=True)
class LoadedState:
    """A checkpoint read back. ``tensors``: on the CPU, named as by :func:`state_tensors`; ``meta``: the trainer's own.

    ``source`` is ``pico-fast`` or ``pico-train`` (see :mod:`.legacy` for what ``meta`` then holds). ``warnings`` name
    damage that does not touch the state: a Hugging Face file that is no longer what was written.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    path: Path
    source: str = "pico-fast"
    warnings: list[str] = field(default_factory=list)


class StateMismatchError(ValueError):
    """The tensors do not fit the model and optimizer; the message lists every difference."""


def state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The live tensors, not copies: ``model/<parameter or buffer>`` and ``optimizer/<key>/<parameter>``.

    Before an optimizer's first step its moments do not exist and are absent here. Hyperparameters (learning rate,
    betas) are not state: they come from the configuration. Raises TypeError for optimizer state that is not a tensor.
    """
    tensors = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in _trained(model, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} is {type(value).__name__}, not a tensor")
            tensors[f"{OPTIMIZER}{key}/{name}"] = value
    return tensors


def load_state_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Copy ``tensors`` into ``model`` and ``optimizer``, exactly: same names, shapes and dtypes, or StateMismatchError.

    Nothing is changed if anything differs. A parameter has all of the optimizer's keys or none (no step taken yet).
    """
    trained = _trained(model, optimizer)
    moments = _by_parameter(tensors)
    differences = [*_model_differences(model, tensors), *_optimizer_differences(trained, moments)]
    differences += [f"{name}: unknown name" for name in tensors if not name.startswith((MODEL, OPTIMIZER))]
    if differences:
        shown = [*differences[:20], *([f"and {len(differences) - 20} more"] if len(differences) > 20 else [])]
        raise StateMismatchError("\n  - ".join(["the checkpoint is not of this model and optimizer:", *shown]))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[f"{MODEL}{name}"])
    names = {id(parameter): name for name, parameter in trained.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    # load_state_dict keeps the tensors it is given: without the clone the moments would live in the mapped file
    state = {
        number: {key: value.clone() for key, value in moments[name].items()}
        for number, name in enumerate(ordered)
        if name in moments
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """The parameters that ``optimizer`` updates, by name, in the model's order."""
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in mine}
    if len(named) != len(mine):
        raise ValueError(f"the optimizer updates {len(mine) - len(named)} parameters that are not the model's")
    return named


def _by_parameter(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            key, _, parameter = name[len(OPTIMIZER) :].partition("/")
            found.setdefault(parameter, {})[key] = tensor
    return found


def _model_differences(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    expected = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    given = {name for name in tensors if name.startswith(MODEL)}
    return [
        *(f"{name}: not in the checkpoint" for name in expected if name not in given),
        *(f"{name}: not in the model" for name in sorted(given - set(expected))),
        *(
            f"{name}: {_kind(tensors[name])} in the checkpoint, {_kind(tensor)} in the model"
            for name, tensor in expected.items()
            if name in given and _kind(tensors[name]) != _kind(tensor)
        ),
    ]


def _optimizer_differences(
    trained: Mapping[str, torch.nn.Parameter], moments: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[str]:
    differences = [f"{OPTIMIZER}*/{name}: not a parameter of the optimizer" for name in moments if name not in trained]
    keys = sorted({key for state in moments.values() for key in state})
    for name, state in moments.items():
        if name not in trained:
            continue
        parameter = trained[name]
        differences += [f"{OPTIMIZER}{key}/{name}: not in the checkpoint" for key in keys if key not in state]
        differences += [
            f"{OPTIMIZER}{key}/{name}: {_kind(value)} in the checkpoint, {_kind(parameter)} or one number expected"
            for key, value in state.items()
            if value.numel() != 1 and _kind(value) != _kind(parameter)
        ]
    return differences


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
