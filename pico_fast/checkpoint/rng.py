"""The states of the random generators as JSON: torch on the CPU and on this process's GPU, Python's random, numpy."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The states now: ``torch``, ``cuda``, ``python``, ``numpy``.

    ``torch`` and ``cuda`` are base64 of the generator's bytes; ``cuda`` is the current device's, and there only if CUDA
    is in use.
    """
    state: dict[str, Any] = {"torch": _encoded(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encoded(torch.cuda.get_rng_state())
    version, internal, gauss = random.getstate()
    state["python"] = [version, list(internal), gauss]
    kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (the generator libraries use)
    state["numpy"] = [str(kind), np.asarray(key).tolist(), int(position), int(has_gauss), float(cached)]
    return state


def set_rng_state(state: Mapping[str, Any]) -> list[str]:
    """Set the generators to a state that :func:`rng_state` gave.

    Returns the names of generators that stay as they are: absent from ``state``, or of a device that this process has
    not.
    """
    missing = []
    if "torch" in state:
        torch.set_rng_state(_decoded(state["torch"]))
    else:
        missing.append("torch")
    if "python" in state:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
    else:
        missing.append("python")
    if "numpy" in state:
        kind, key, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.asarray(key, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    else:
        missing.append("numpy")
    here, saved = torch.cuda.is_available(), "cuda" in state
    if here and saved:
        torch.cuda.set_rng_state(_decoded(state["cuda"]))
    elif here != saved:
        missing.append("cuda")
    return missing


def encoded_generator(state: torch.Tensor) -> str:
    """A torch generator's state (uint8) as :func:`rng_state` writes it."""
    return _encoded(state)


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
