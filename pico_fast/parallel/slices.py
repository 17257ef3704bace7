"""Which part of each parameter a rank holds: cut by tensor parallelism (the sharding table), then by FSDP.

A part is a box, :class:`Slice`, in the whole tensor. Checkpoints are saved and loaded by these boxes, so that a state
saved under one layout loads under any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pico_fast.model.sharding import tensor_parallel_dim
from pico_fast.parallel.mesh import Parallel


@dataclass(frozen=True)
class Slice:
    """The box of ``shape`` that begins at ``offset`` in a tensor of ``global_shape``; a length of 0 is an empty box."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Slice:
        """All of a tensor of ``shape``."""
        shape = tuple(shape)
        return cls(shape, (0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements in the box."""
        return prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the box is the tensor."""
        return self.shape == self.global_shape

    def overlap(self, other: Slice) -> Slice | None:
        """The box that both have in common; None if it is empty. Raises ValueError for boxes of different tensors."""
        if self.global_shape != other.global_shape:
            raise ValueError(f"slices of tensors of shape {self.global_shape} and {other.global_shape}")
        starts = tuple(map(max, self.offset, other.offset))
        stops = (min(mine, theirs) for mine, theirs in zip(self._stops(), other._stops(), strict=True))
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Slice(self.global_shape, starts, shape) if all(length > 0 for length in shape) else None

    def index(self, inner: Slice) -> tuple[slice, ...]:
        """Where ``inner``, a box inside this one, lies in a tensor that holds this box."""
        starts = (mine - outer for mine, outer in zip(inner.offset, self.offset, strict=True))
        return tuple(slice(start, start + length) for start, length in zip(starts, inner.shape, strict=True))

    def _stops(self) -> tuple[int, ...]:
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether FSDP has cut ``tensor``; by its method, since importing the class takes 1.2 s."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (sharing its memory); a plain tensor is returned as it is."""
    cut: Any = tensor
    return cut.to_local() if is_dtensor(tensor) else tensor


def parameter_slice(name: str, parameter: Tensor, parallel: Parallel) -> Slice:
    """The part of the parameter ``name`` (``layers.0.attention.q_proj.weight``) that this rank holds.

    ``parameter`` has the shape that tensor parallelism left of it, as a plain tensor or as FSDP's DTensor. Raises
    KeyError for a name that the sharding table has not, where the table is needed.
    """
    within = _shard_of(parameter)
    dim = tensor_parallel_dim(name) if parallel.tp.size > 1 else None
    if dim is None:
        return within
    global_shape, offset = list(parameter.shape), list(within.offset)
    offset[dim] += parallel.tp.rank * global_shape[dim]
    global_shape[dim] *= parallel.tp.size
    return Slice(tuple(global_shape), tuple(offset), within.shape)


def writes(name: str, parallel: Parallel) -> bool:
    """Whether this rank is the one that speaks for its part of the parameter ``name``: saves it, counts it once.

    Ranks along dp_replicate hold the same parts; ranks along tp hold the same where the table does not cut.
    """
    if parallel.dp_replicate.rank != 0:
        return False
    return parallel.tp.rank == 0 or tensor_parallel_dim(name) is not None


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` by name, FSDP's as the shards that the optimizer updates.

    A forward pass without a backward one (evaluation) leaves FSDP's gathered weights in their place; asking for the
    state dict puts the shards back.
    """
    model.state_dict()
    return dict(model.named_parameters())


def gather_full(model: nn.Module, parallel: Parallel) -> dict[str, Tensor] | None:
    """The whole parameters, float32 on the CPU, on rank 0; None on the others. Every rank must call it.

    Parameter by parameter over ``parallel.hosts``: rank 0 holds the model once and one part of one parameter. Where a
    part is the whole, on the CPU and float32, no copy is made: the result then changes with the model.
    """
    parameters = sharded_parameters(model)
    parts = {
        name: parameter_slice(name, parameter, parallel) if writes(name, parallel) else None
        for name, parameter in parameters.items()
    }
    plan = _all_parts(parts, parallel)
    full = {}
    for name, parameter in parameters.items():
        gathered = _gather(local(parameter).detach(), [theirs[name] for theirs in plan], parallel)
        if gathered is not None:
            full[name] = gathered
    return full if parallel.is_main else None


def _shard_of(parameter: Tensor) -> Slice:
    """FSDP's part of ``parameter``: as ``torch.chunk`` cuts, every shard but the last ones of equal length."""
    piece: dict[int, tuple[int, int]] = {}  # dimension: start, length
    dtensor: Any = parameter
    for mesh_dim, placement in enumerate(dtensor.placements if is_dtensor(parameter) else ()):
        if placement.is_replicate():
            continue
        if not placement.is_shard() or placement.dim in piece:
            raise ValueError(f"a parameter placed as {dtensor.placements} has no slice; FSDP cuts each dimension once")
        length, ranks = parameter.shape[placement.dim], dtensor.device_mesh.size(mesh_dim)
        chunk = -(-length // ranks)
        start = min(length, chunk * dtensor.device_mesh.get_local_rank(mesh_dim))
        piece[placement.dim] = (start, min(chunk, length - start))
    shape = tuple(parameter.shape)
    offset = tuple(piece.get(dim, (0, 0))[0] for dim in range(len(shape)))
    found = Slice(shape, offset, tuple(piece.get(dim, (0, length))[1] for dim, length in enumerate(shape)))
    if found.shape != tuple(local(parameter).shape):
        raise ValueError(f"{found} expected of a parameter whose local shape is {tuple(local(parameter).shape)}")
    return found


def _all_parts(parts: Mapping[str, Slice | None], parallel: Parallel) -> list[Mapping[str, Slice | None]]:
    """What each rank speaks for, on rank 0 in the order of ranks; elsewhere only this rank's own."""
    if not parallel.active:
        return [parts]
    collected: list[Any] | None = [None] * parallel.world_size if parallel.is_main else None
    dist.gather_object(dict(parts), collected, dst=0, group=parallel.hosts)
    return [parts] if collected is None else collected


def _gather(mine: Tensor, parts: list[Slice | None], parallel: Parallel) -> Tensor | None:
    """One parameter, on rank 0 from the ``parts`` of all ranks; elsewhere ``parts`` is the rank's own, and is sent."""
    own = parts[0]
    if not parallel.is_main:
        if own is not None and own.numel:
            dist.send(mine.to("cpu", torch.float32).contiguous(), dst=0, group=parallel.hosts)
        return None
    assert own is not None  # rank 0 is the first along every axis, so it speaks for all that it holds
    if own.is_whole:
        return mine.to("cpu", torch.float32)
    full = torch.empty(own.global_shape)
    whole = Slice.whole(own.global_shape)
    full[whole.index(own)] = mine.to("cpu", torch.float32)
    for rank, part in enumerate(parts[1:], start=1):
        if part is not None and part.numel:
            piece = torch.empty(part.shape)
            dist.recv(piece, src=rank, group=parallel.hosts)
            full[whole.index(part)] = piece
    return full
