"""The arithmetic of a layout: how many processes each dimension of the mesh has, and whether the model allows it.

No torch here: the configuration is checked with it before anything else is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pico_fast.config import Config, ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh, outermost first. Ranks that differ only in ``tp`` are neighbours: they share a node."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def dp_size(self) -> int:
        """Ways in which the rows of a batch are dealt out."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"tp {self.tp} x dp_shard {self.dp_shard} x dp_replicate {self.dp_replicate}"


def layout_of(parallel: ParallelConfig, world_size: int | None = None) -> Layout:
    """The layout that ``parallel`` gives ``world_size`` processes; ``dp_replicate: auto`` fills them.

    Without ``world_size`` it is the smallest that the section allows. Where the sizes do not multiply to
    ``world_size``, :func:`layout_problems` says so; this function rounds down.
    """
    inner = parallel.tp * parallel.dp_shard
    filling = max(1, (world_size or inner) // inner)
    replicate = filling if parallel.dp_replicate == "auto" else parallel.dp_replicate
    return Layout(replicate, parallel.dp_shard, parallel.tp)


def layout_problems(config: Config, world_size: int | None = None) -> list[str]:
    """Why ``config.parallel`` does not fit the model or ``world_size`` processes (None: any number of them).

    Messages with dotted keys, the numbers and the nearest choices that would do. The section's values must be within
    their bounds; a model's sizes below 1 are left to those.
    """
    parallel = config.parallel
    found = [*_tensor_parallel_problems(config), *_world_problems(config, world_size)]
    if parallel.symmetric_memory and parallel.tp == 1:
        found.append("parallel.symmetric_memory: it is of use with parallel.tp above 1 only, tp is 1; remove it")
    return found


def row_problem(config: Config, row_tokens: int, world_size: int) -> str | None:
    """Why ``parallel.tp`` ranks cannot share micro-batches of rows of ``row_tokens`` tokens; None where they can.

    The end of a sentence about the dataset. Its rows may be shorter than ``model.max_seq_len``, which tp divides.
    """
    layout = layout_of(config.parallel, world_size)
    rows = config.data.dataloader.batch_size // config.training.optimization.gradient_accumulation_steps
    rows //= layout.dp_size
    if rows * row_tokens % layout.tp == 0:
        return None
    valid = _nearest(_divisors(math.gcd(row_tokens, *_split_sizes(config).values())), layout.tp)
    return (
        f"has rows of {row_tokens} tokens; a rank's micro-batch of {rows} of them is {rows * row_tokens} tokens, which "
        f"parallel.tp = {layout.tp} does not divide; with these rows and this model tp may be {_either(valid)}"
    )


def _split_sizes(config: Config) -> dict[str, int]:
    """What ``parallel.tp`` must divide of the model, by dotted key."""
    model = config.model
    return {
        "model.attention_n_heads": model.attention_n_heads,
        "model.attention_n_kv_heads": model.attention_n_kv_heads,
        "model.activation_hidden_dim": model.activation_hidden_dim,
        "model.max_seq_len": model.max_seq_len,
    }


def _tensor_parallel_problems(config: Config) -> Iterator[str]:
    tp, split = config.parallel.tp, _split_sizes(config)
    undivided = [f"{key} = {size}" for key, size in split.items() if size % tp]
    if undivided and min(split.values()) > 0:
        valid = _nearest(_divisors(math.gcd(*split.values())), tp)
        yield f"parallel.tp: {tp} does not divide {', '.join(undivided)}; with this model tp may be {_either(valid)}"


def _world_problems(config: Config, world_size: int | None) -> Iterator[str]:
    parallel = config.parallel
    layout = layout_of(parallel, world_size)
    if world_size is None or layout.world_size == world_size:
        return
    if parallel.dp_replicate == "auto":
        inner = parallel.tp * parallel.dp_shard
        below = world_size // inner * inner
        started = _either([count for count in (below, below + inner) if count])
        yield (
            f"parallel: tp = {parallel.tp} x dp_shard = {parallel.dp_shard} needs a multiple of {inner} processes, "
            f"{world_size} {_were(world_size)} started; start {started}, or give sizes whose product divides "
            f"{world_size} ({_either(_nearest(_divisors(world_size), inner))})"
        )
        return
    advice = f"start {layout.world_size}"
    if world_size % (parallel.tp * parallel.dp_shard) == 0:
        advice += f", or give parallel.dp_replicate=auto (here {world_size // (parallel.tp * parallel.dp_shard)})"
    yield (
        f"parallel: tp = {parallel.tp} x dp_shard = {parallel.dp_shard} x dp_replicate = {parallel.dp_replicate} is "
        f"{layout.world_size} processes, {world_size} {_were(world_size)} started; {advice}"
    )


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(choices: list[int], wanted: int, count: int = 4) -> list[int]:
    """The ``count`` of ``choices`` nearest to ``wanted``, in ascending order."""
    return sorted(sorted(choices, key=lambda choice: abs(choice - wanted))[:count])


def _either(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
