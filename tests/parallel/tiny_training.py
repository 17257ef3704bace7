"""A decoder small enough to train in every layout within a test, and its training on one process to compare with."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from pico_fast.config import Config
from pico_fast.model.build import build_kernels, build_model
from pico_fast.model.decoder import PicoDecoder
from pico_fast.optim import build_optimizer
from pico_fast.parallel.data_parallel import LossFunction, parallelise
from pico_fast.parallel.layout import Layout
from pico_fast.parallel.mesh import SINGLE, Parallel, start_parallel
from pico_fast.parallel.slices import Slice, local, parameter_slice
from pico_fast.runtime import PRECISIONS, Runtime
from pico_fast.step import StepNumbers, training_step
from tests.ranks import every_layout

SEQUENCE, ROWS, MICRO_BATCHES = 16, 4, 2  # tokens of a row; rows of a micro-batch, over all ranks
LAYOUTS = {world_size: {str(layout): layout for layout in every_layout(world_size)} for world_size in (2, 4)}


def tiny_config(precision: str = "32-true") -> Config:
    """4 heads and 4 key-value heads, so that tp may be 4; 50 ids and a width of 12, which 4 shards do not divide."""
    config = Config()
    config.model.d_model, config.model.n_layers, config.model.vocab_size = 24, 2, 50
    config.model.attention_n_heads = config.model.attention_n_kv_heads = 4
    config.model.activation_hidden_dim, config.model.max_seq_len = 36, SEQUENCE
    config.training.fabric.precision, config.training.fabric.accelerator = precision, "cpu"
    config.kernels.default = "torch"
    return config


@dataclass
class Training:
    """One rank's part of a training, or a whole one."""

    config: Config
    model: PicoDecoder
    loss_function: LossFunction
    optimizer: torch.optim.AdamW
    parallel: Parallel

    def step(self, rows: torch.Tensor, step: int, **settings) -> StepNumbers:
        """A step on this rank's share of ``rows`` (micro-batches, rows of all ranks, tokens + 1)."""
        share = rows.chunk(self.parallel.dp_size, dim=1)[self.parallel.dp_rank]
        settings = {"lr": 1e-2, "measure_norm": True, **settings}
        return training_step(
            self.model,
            self.optimizer,
            share,
            step=step,
            loss_function=self.loss_function,
            parallel=self.parallel,
            **settings,
        )

    def gradients(self, rows: torch.Tensor, **settings) -> dict[str, torch.Tensor]:
        """This rank's part of the gradients that a step without effect (learning rate 0) hands to the optimizer."""
        found = {}

        def keep(*_):
            found.update({name: local(p.grad).clone() for name, p in self.model.named_parameters()})

        hook = self.optimizer.register_step_pre_hook(keep)
        decay, self.optimizer.param_groups[0]["weight_decay"] = self.optimizer.param_groups[0]["weight_decay"], 0.0
        self.step(rows, 0, **{"lr": 0.0, **settings})
        self.optimizer.param_groups[0]["weight_decay"] = decay
        self.optimizer.state.clear()
        hook.remove()
        return found

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of ``whole``, a tensor of the shape of the parameter ``name``."""
        mine = parameter_slice(name, self.model.get_parameter(name), self.parallel)
        return whole[Slice.whole(whole.shape).index(mine)]


def start(config: Config, layout: Layout | None = None) -> Training:
    """A training in this layout, or on this process alone."""
    runtime = Runtime(torch.device("cpu"), *PRECISIONS[config.training.fabric.precision], 1)
    parallel = SINGLE
    if layout is not None:
        for name, size in asdict(layout).items():
            setattr(config.parallel, name, size)
        parallel = start_parallel(config, runtime.device)
    model = build_model(config, build_kernels(config, runtime), runtime, parallel)
    with torch.no_grad():  # pico's initial weights are so small that attention would not be felt in the gradients
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.dim() == 2 else 1)
    loss_function = parallelise(model, runtime, parallel)
    return Training(config, model, loss_function, build_optimizer(model, config.training.optimization), parallel)


def some_rows(seed: int = 0, micro_batches: int = MICRO_BATCHES) -> torch.Tensor:
    """A batch of ``MICRO_BATCHES * ROWS`` rows of ids in as many micro-batches as asked for: int32, of all ranks.

    Of at most 2 micro-batches each has a row for every one of 4 data-parallel ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(50, (MICRO_BATCHES * ROWS, SEQUENCE + 1), dtype=torch.int32, generator=generator)
    return rows.view(micro_batches, -1, SEQUENCE + 1)


def relative_difference(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest difference in units of the largest element of ``scale``."""
    if not found.numel():
        return 0.0
    return float((found - expected).abs().max() / scale.abs().max())
