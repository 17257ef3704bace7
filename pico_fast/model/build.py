"""A decoder with its initial weights, as the configuration describes it."""

from __future__ import annotations

import dataclasses

import torch
from pico_kernels import KernelSet

from pico_fast.config import Config
from pico_fast.model.decoder import PicoDecoder
from pico_fast.parallel.mesh import SINGLE, Parallel
from pico_fast.parallel.symmetric_memory import symmetric_memory_problem
from pico_fast.runtime import Runtime, UsageError


def build_kernels(config: Config, runtime: Runtime) -> KernelSet:
    """The KernelSet of the ``kernels`` section on this run's device; UsageError where a name cannot be resolved."""
    try:
        return KernelSet.from_config(dataclasses.asdict(config.kernels), device=runtime.device)
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_model(config: Config, kernels: KernelSet, runtime: Runtime, parallel: Parallel = SINGLE) -> PicoDecoder:
    """The decoder on its device, parameters in the dtype of ``training.fabric.precision``.

    Whole weights are drawn on the CPU after ``torch.manual_seed(runtime.seed)`` and a rank keeps its part of them, so
    the same seed gives the same model on every device and every layout and, at 42, pico-train's. Raises UsageError
    where ``parallel.symmetric_memory`` is asked for and there is none.
    """
    if config.parallel.symmetric_memory:
        problem = symmetric_memory_problem(runtime.device, parallel.tp)
        if problem is not None:
            raise UsageError(problem)
    torch.manual_seed(config.runtime.seed)
    model = PicoDecoder(
        config.model,
        kernels,
        runtime.compute_dtype,
        tp=parallel.tp,
        recomputed=config.parallel.activation_checkpointing,
        symmetric_memory=config.parallel.symmetric_memory,
    )
    for parameter in model.parameters():  # not model.to(dtype): the rotary tables stay float32
        parameter.data = parameter.data.to(runtime.param_dtype)
    return model.to(runtime.device)
