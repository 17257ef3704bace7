"""The mesh of processes, with the dimensions dp_replicate, dp_shard and tp, tp innermost.

A rank's place is ``rank = (dp_replicate * dp_shard.size + dp_shard) * tp.size + tp``: the ranks of one tensor-parallel
group, which talk several times per block, are neighbours and so lie on one node; data-parallel ranks talk once per
step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pico_fast.config_io import changes
from pico_fast.parallel.layout import layout_of
from pico_fast.runtime import UsageError, world_size

if TYPE_CHECKING:
    from pico_fast.config import Config

DIMENSIONS = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as this process sees it; ``group`` holds the ranks along it, None for a size of 1."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


ONE = Axis()


@dataclass(frozen=True)
class Parallel:
    """This process among the others.

    Attributes:
        rank, world_size: as torchrun numbers them.
        dp_replicate: ranks with the same weights and other rows (DDP).
        dp_shard: ranks that hold a shard of the weights each and other rows (FSDP2).
        tp: ranks that share rows and split heads, hidden units and tokens among them.
        mesh: those of the dimensions above that have several ranks, for FSDP2 and DTensor; None on one process.
        hosts: gloo over all ranks, for objects and tensors on the CPU; None on one process.
    """

    rank: int = 0
    world_size: int = 1
    dp_replicate: Axis = ONE
    dp_shard: Axis = ONE
    tp: Axis = ONE
    mesh: DeviceMesh | None = None
    hosts: dist.ProcessGroup | None = None

    @property
    def dp_rank(self) -> int:
        """Which share of each micro-batch's rows this rank takes."""
        return self.dp_replicate.rank * self.dp_shard.size + self.dp_shard.rank

    @property
    def dp_size(self) -> int:
        """Into how many shares the rows are cut."""
        return self.dp_replicate.size * self.dp_shard.size

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints, locks and writes for all."""
        return self.rank == 0

    @property
    def active(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1


SINGLE = Parallel()


def start_parallel(config: Config, device: torch.device) -> Parallel:
    """Join the other processes that torchrun started (its environment says where they meet) and build the mesh.

    Every rank calls it, with a ``config`` whose layout fits the world (``config.problems``). NCCL on CUDA, and gloo
    beside it for tensors on the CPU; gloo elsewhere. Every collective gives up after ``config.parallel.timeout_s``. An
    initialised default group is used as it is, so that tests build several meshes. One process: :data:`SINGLE`,
    nothing is started.

    Raises UsageError, on all ranks, where one has another configuration: with another layout, or another batch, they
    would wait for each other.
    """
    started = world_size()
    if started == 1:
        return SINGLE
    timeout = timedelta(seconds=config.parallel.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        # With its device bound, NCCL connects here and not inside the first step, where its errors are harder to read
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    hosts = dist.new_group(backend="gloo", timeout=timeout)
    _require_same_config(config, hosts)
    layout = layout_of(config.parallel, started)
    ranks = torch.arange(started).view(layout.dp_replicate, layout.dp_shard, layout.tp)
    axes = {
        name: _axis(ranks.movedim(dimension, -1).flatten(0, -2), name, timeout)
        for dimension, name in enumerate(DIMENSIONS)
    }
    groups = {name: axis.group for name, axis in axes.items() if axis.group is not None}
    # Not init_device_mesh: its groups have the library's timeout (30 minutes on gloo), whatever the default group's is
    mesh = DeviceMesh.from_group(list(groups.values()), device.type, mesh=ranks.squeeze(), mesh_dim_names=tuple(groups))
    return Parallel(dist.get_rank(), started, **axes, mesh=mesh, hosts=hosts)


def _require_same_config(config: Config, hosts: dist.ProcessGroup) -> None:
    configs: list[Any] = [None] * hosts.size()
    dist.all_gather_object(configs, dataclasses.asdict(config), group=hosts)
    others = [rank for rank, other in enumerate(configs) if other != configs[0]]
    if others:
        differing = changes(configs[0], configs[others[0]])
        values = ", ".join(f"{key} is {theirs!r} (on rank 0 {main!r})" for key, main, theirs in differing)
        raise UsageError(
            f"rank(s) {', '.join(map(str, others))} have another configuration than rank 0; on rank {others[0]}: "
            f"{values}; give every node the same --config file and overrides"
        )


def _axis(members: torch.Tensor, name: str, timeout: timedelta) -> Axis:
    """This rank's place along the dimension ``name``, whose groups are the rows of ``members`` (groups, size).

    A rank makes its own group only: among 64 ranks of tp 2, torch's default would make each take part in 34. It makes
    one per dimension, in the same order everywhere, which is what ``use_local_synchronization`` asks for, and
    ncclCommSplit, where all ranks split the default group into groups of their own at the same time.
    """
    size = members.shape[1]
    if size == 1:
        return ONE
    mine = next(row for row in members.tolist() if dist.get_rank() in row)
    group = dist.new_group(mine, timeout=timeout, use_local_synchronization=True, group_desc=f"mesh_{name}")
    return Axis(size, group.rank(), group)


def stop_parallel() -> None:
    """Leave the process group, if there is one. Not after another rank has died: it would wait for that one."""
    if dist.is_initialized():
        dist.destroy_process_group()
