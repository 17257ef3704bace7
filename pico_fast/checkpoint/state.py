"""The tensors that make up the state of a run: parameters and optimizer state, by name.

A rank holds its part of each (:mod:`pico_fast.parallel.slices`); a moment is cut as its parameter is. Counters of steps
are single numbers and the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pico_fast.checkpoint.stored import StoredTensors, WholeTensors
from pico_fast.parallel.mesh import SINGLE, Parallel
from pico_fast.parallel.slices import Slice, is_dtensor, local, parameter_slice, sharded_parameters, writes

MODEL = "model/"
OPTIMIZER = "optimizer/"


@dataclass(frozen=True)
class LoadedState:
    """A checkpoint read back. ``tensors``: whole ones, or any slice, named as by :func:`state_tensors`; ``meta``: the
    trainer's own, of rank 0.

    ``source`` is ``pico-fast`` or ``pico-train`` (see :mod:`.legacy` for what ``meta`` then holds). ``warnings`` name
    damage that does not touch the state: a Hugging Face file that is no longer what was written.
    """

    step: int
    tensors: StoredTensors
    meta: dict[str, Any]
    path: Path
    source: str = "pico-fast"
    warnings: list[str] = field(default_factory=list)


class StateMismatchError(ValueError):
    """The tensors do not fit the model and optimizer; the message lists every difference."""


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The live tensors of this rank, not copies: ``model/<parameter or buffer>`` and ``optimizer/<key>/<parameter>``.

    FSDP's are the local shards. Before an optimizer's first step its moments do not exist and are absent here.
    Hyperparameters (learning rate, betas) are not state: they come from the configuration. Raises TypeError for
    optimizer state that is not a tensor.
    """
    return {name: local(tensor) for name, (_, tensor) in _live(model, optimizer).items()}


def state_slices(model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel = SINGLE) -> dict[str, Slice]:
    """Those of :func:`state_tensors` that this rank saves, and which part of the whole each is.

    Over all ranks every element is named exactly once; empty shards are left out.
    """
    slices = {}
    parameters = sharded_parameters(model)
    for name, (owner, tensor) in _live(model, optimizer).items():
        cut_alike = owner in parameters and parameters[owner].shape == tensor.shape  # not a counter of steps
        part = parameter_slice(owner, tensor, parallel) if cut_alike else Slice.whole(tensor.shape)
        mine = writes(owner, parallel) if cut_alike else parallel.is_main
        if not is_dtensor(tensor):  # then the ranks along dp_shard hold the same
            mine &= parallel.dp_shard.rank == 0
        if mine and (part.numel or part.is_whole):
            slices[name] = part
    return slices


def load_state_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    parallel: Parallel = SINGLE,
) -> None:
    """Copy this rank's part of ``tensors`` (whole ones) into ``model`` and ``optimizer``, exactly.

    Same names, shapes and dtypes, or StateMismatchError, on every rank alike; nothing is changed if anything differs.
    A parameter has all of the optimizer's keys or none (no step taken yet). Of a LoadedState's tensors no more is read
    than this rank's part, and each part is copied to its place at once.
    """
    stored = tensors if isinstance(tensors, StoredTensors) else WholeTensors(tensors)
    model_state = model.state_dict()
    parts = _parts(model, parallel)
    trained = _trained(model, optimizer)
    moments = _by_parameter(stored)
    differences = [
        *_model_differences(model_state, parts, stored),
        *_optimizer_differences(trained, parts, moments, stored),
    ]
    differences += [f"{name}: unknown name" for name in stored if not name.startswith((MODEL, OPTIMIZER))]
    if differences:
        shown = [*differences[:20], *([f"and {len(differences) - 20} more"] if len(differences) > 20 else [])]
        raise StateMismatchError("\n  - ".join(["the checkpoint is not of this model and optimizer:", *shown]))
    with torch.no_grad():
        for name, tensor in model_state.items():
            stored.read_into(f"{MODEL}{name}", parts[name], local(tensor))
    names = {id(parameter): name for name, parameter in trained.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {key: _moment(stored, f"{OPTIMIZER}{key}/{name}", trained[name], parts[name]) for key in moments[name]}
        for number, name in enumerate(ordered)
        if name in moments
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _live(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, Tensor]]:
    """By name in the state: the parameter or buffer that it belongs to, and the tensor itself, FSDP's as a DTensor."""
    found = {f"{MODEL}{name}": (name, tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in _trained(model, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} is {type(value).__name__}, not a tensor")
            found[f"{OPTIMIZER}{key}/{name}"] = (name, value)
    return found


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that ``optimizer`` updates, by name, in the model's order."""
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in sharded_parameters(model).items() if id(parameter) in mine}
    if len(named) != len(mine):
        raise ValueError(f"the optimizer updates {len(mine) - len(named)} parameters that are not the model's")
    return named


def _parts(model: nn.Module, parallel: Parallel) -> dict[str, Slice]:
    """This rank's part of every parameter and buffer; buffers are whole."""
    parameters = sharded_parameters(model)
    return {
        name: parameter_slice(name, tensor, parallel) if name in parameters else Slice.whole(tensor.shape)
        for name, tensor in model.state_dict().items()
    }


def _moment(stored: StoredTensors, name: str, parameter: nn.Parameter, part: Slice) -> Tensor:
    """This rank's part of one tensor of the optimizer's state of ``parameter``, on its device and cut as it is."""
    dtype, shape = stored.kind(name)
    if shape != part.global_shape:  # one number, on the CPU: load_state_dict puts it where the optimizer wants it
        return stored.read(name, Slice.whole(shape))
    moment = torch.empty(part.shape, dtype=dtype, device=local(parameter).device)
    stored.read_into(name, part, moment)
    if not is_dtensor(parameter):
        return moment
    from torch.distributed.tensor import DTensor

    cut: Any = parameter
    return DTensor.from_local(
        moment, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    )


def _by_parameter(stored: StoredTensors) -> dict[str, list[str]]:
    """The optimizer's keys by parameter."""
    found: dict[str, list[str]] = {}
    for name in stored:
        if name.startswith(OPTIMIZER):
            key, _, parameter = name[len(OPTIMIZER) :].partition("/")
            found.setdefault(parameter, []).append(key)
    return found


def _model_differences(
    model_state: Mapping[str, Tensor], parts: Mapping[str, Slice], stored: StoredTensors
) -> list[str]:
    expected = {f"{MODEL}{name}": _kind(tensor.dtype, parts[name].global_shape) for name, tensor in model_state.items()}
    given = {name: _kind(*stored.kind(name)) for name in stored if name.startswith(MODEL)}
    return [
        *(f"{name}: not in the checkpoint" for name in expected if name not in given),
        *(f"{name}: not in the model" for name in sorted(set(given) - set(expected))),
        *(
            f"{name}: {given[name]} in the checkpoint, {kind} in the model"
            for name, kind in expected.items()
            if given.get(name, kind) != kind
        ),
    ]


def _optimizer_differences(
    trained: Mapping[str, nn.Parameter],
    parts: Mapping[str, Slice],
    moments: Mapping[str, list[str]],
    stored: StoredTensors,
) -> list[str]:
    differences = [f"{OPTIMIZER}*/{name}: not a parameter of the optimizer" for name in moments if name not in trained]
    keys = sorted({key for present in moments.values() for key in present})
    for name, present in moments.items():
        if name not in trained:
            continue
        expected = _kind(trained[name].dtype, parts[name].global_shape)
        differences += [f"{OPTIMIZER}{key}/{name}: not in the checkpoint" for key in keys if key not in present]
        for key in present:
            full_name = f"{OPTIMIZER}{key}/{name}"
            dtype, shape = stored.kind(full_name)
            if math.prod(shape) != 1 and _kind(dtype, shape) != expected:
                differences.append(
                    f"{full_name}: {_kind(dtype, shape)} in the checkpoint, {expected} or one number expected"
                )
    return differences


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"
