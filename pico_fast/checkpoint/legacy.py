"""Reading the state of an old pico-train run: ``step_N/fabric_state/checkpoint.pt``, as Lightning Fabric wrote it.

The file is ``torch.save`` of ``_model`` (parameters by name), ``_optimizer`` (AdamW's state dict, parameters by
number), ``_lr_scheduler``, ``_checkpoint_step`` and ``_rng_states`` (torch, numpy, python, torch.cuda). It is read
with ``weights_only=True`` and an allow-list for numpy's generator state, so it cannot run code. Its only checksums
are the archive's CRC-32s; they are verified.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pico_fast.checkpoint.errors import CheckpointError, described
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.rng import encoded_generator
from pico_fast.checkpoint.state import MODEL, OPTIMIZER, LoadedState
from pico_fast.checkpoint.stored import WholeTensors

_KEYS = ("_model", "_optimizer", "_lr_scheduler", "_checkpoint_step")


def pico_parameter_names(n_layers: int) -> list[str]:
    """The names in the order in which pico-train constructs them, which is the order of its optimizer's numbers.

    Source: src/model/pico_decoder.py of github.com/pico-lm/pico-train; a block makes attention, swiglu, then both
    norms.
    """
    block = [
        *(f"attention.{name}_proj.weight" for name in "qkvo"),
        *(f"swiglu.w_{number}.weight" for number in range(3)),
        "attention_norm.weight",
        "swiglu_norm.weight",
    ]
    layers = [f"layers.{layer}.{name}" for layer in range(n_layers) for name in block]
    return ["embedding_proj.weight", *layers, "output_norm.weight", "de_embedding_proj.weight"]


def load_legacy(layout: RunLayout, step: int, *, verify: bool = True) -> LoadedState:
    """The state of a pico-train step, named as pico-fast names it; its tensors are mapped, not read.

    ``meta`` holds ``step``, ``rng`` (for :func:`~pico_fast.checkpoint.rng.set_rng_state`), ``lr_scheduler``
    (LambdaLR's state) and ``param_groups`` (AdamW's hyperparameters). Raises CheckpointError if the file is missing,
    damaged, of DeepSpeed, holds any object that pico-train does not write, or does not fit together. ``verify=False``
    leaves the archive's checksums out, for which every byte is read.
    """
    path = layout.fabric_state(step)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: only pico-train's single-device state can be read, not DeepSpeed's", path=path
        )
    content = _read(path, verify)
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise CheckpointError(f"{path}: not a pico-train checkpoint: {', '.join(missing)} missing", path=path)
    if content["_checkpoint_step"] != step:
        raise CheckpointError(f"{path}: belongs to step {content['_checkpoint_step']}, not {step}", path=path)
    try:
        tensors = {**_model(content["_model"]), **_optimizer(content["_model"], content["_optimizer"])}
        meta = {
            "step": step,
            "rng": _rng(content.get("_rng_states", {})),
            "lr_scheduler": dict(content["_lr_scheduler"]),
            "param_groups": _hyperparameters(content["_optimizer"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}", path=path) from error
    return LoadedState(step, WholeTensors(tensors), meta, layout.step_dir(step), source="pico-train")


def _allowed() -> list[Any]:
    """What Fabric's file holds beyond tensors and plain Python: numpy's generator state, by old and new names."""
    reconstruct = np.zeros(1).__reduce__()[0]
    return [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.uint32)),
    ]


def _read(path: Path, verify: bool) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise CheckpointError(f"{path}: checksum of {damaged} does not match", path=path)
        with torch.serialization.safe_globals(_allowed()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {described(error)}", path=path, errno=error.errno) from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {found.group(1)}" if found else "data"
        raise CheckpointError(
            f"{path}: refused, because it holds {what} that pico-train does not write and that could run code",
            path=path,
        ) from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged or not written by torch.save ({error})", path=path) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a pico-train checkpoint but {type(content).__name__}", path=path)
    return content


def _model(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layers = {name.split(".")[1] for name in parameters if name.startswith("layers.")}
    if list(parameters) != pico_parameter_names(len(layers)):
        raise ValueError("its parameters are not those of a Pico decoder, in pico-train's order")
    return {f"{MODEL}{name}": tensor for name, tensor in parameters.items()}


def _optimizer(parameters: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if numbers != list(range(len(parameters))) or not set(optimizer["state"]) <= set(numbers):
        raise ValueError(f"its optimizer numbers {len(numbers)} parameters, the model has {len(parameters)}")
    tensors = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        for key, value in optimizer["state"].get(number, {}).items():
            value = torch.as_tensor(value)
            if value.numel() != 1 and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}, {name} has {tuple(parameter.shape)}"
                raise ValueError(f"optimizer state {key!r} number {number} has shape {shapes}")
            tensors[f"{OPTIMIZER}{key}/{name}"] = value
    return tensors


def _hyperparameters(optimizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer["param_groups"]]


def _rng(states: Mapping[str, Any]) -> dict[str, Any]:
    """Fabric's generator states in the form of :mod:`.rng`."""
    found: dict[str, Any] = {}
    if "torch" in states:
        found["torch"] = encoded_generator(states["torch"])
    if states.get("torch.cuda"):  # one per visible GPU; a single-device run trains on the first
        found["cuda"] = encoded_generator(states["torch.cuda"][0])
    if "python" in states:
        version, internal, gauss = states["python"]
        found["python"] = [version, list(internal), gauss]
    if "numpy" in states:
        kind, key, position, has_gauss, cached = states["numpy"]
        found["numpy"] = [kind, np.asarray(key).tolist(), position, has_gauss, cached]
    return found
