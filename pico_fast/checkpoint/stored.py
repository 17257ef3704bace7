"""The tensors of a checkpoint as they lie on the disk: whole ones, and any slice of them, however they were cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pico_fast.checkpoint.errors import CheckpointError, described
from pico_fast.checkpoint.manifest import TensorEntry
from pico_fast.checkpoint.tensorfile import TORCH_DTYPES, read_tensors
from pico_fast.parallel.slices import Slice


class StoredTensors(Mapping[str, Tensor]):
    """Whole tensors by name, on the CPU; :meth:`read_into` reads a part without the rest."""

    @abstractmethod
    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of the whole tensor. Raises KeyError."""

    @abstractmethod
    def read_into(self, name: str, part: Slice, out: Tensor) -> None:
        """Copy ``part`` of the tensor into ``out`` (of its shape, on any device), with no other copy on the way."""

    def read(self, name: str, part: Slice) -> Tensor:
        """``part`` of the tensor, as a new tensor."""
        out = torch.empty(part.shape, dtype=self.kind(name)[0])
        self.read_into(name, part, out)
        return out


class WholeTensors(StoredTensors):
    """Tensors in memory, or mapped by ``torch.load``: pico-train's state."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """See StoredTensors."""
        return self._tensors[name].dtype, tuple(self._tensors[name].shape)

    def read_into(self, name: str, part: Slice, out: Tensor) -> None:
        """See StoredTensors."""
        tensor = self._tensors[name]
        out.copy_(tensor[Slice.whole(tensor.shape).index(part)])


class SlicedTensors(StoredTensors):
    """The tensors of a committed state, whose files are in ``folder``: any slice of any slicing.

    The files are mapped into memory: what nobody reads costs nothing. Raises CheckpointError where the slices of a
    tensor leave a gap or overlap, or a file is missing or not what ``entries`` says; with ``check`` every checksum is
    compared, for which every byte is read.
    """

    def __init__(self, folder: Path, entries: Sequence[TensorEntry], *, check: bool):
        problem = tiling_problem(entries)
        if problem is not None:
            raise CheckpointError(problem, path=folder)
        self._slices: dict[str, list[tuple[Slice, Tensor]]] = {}
        by_file: dict[str, list[TensorEntry]] = {}
        for entry in entries:
            by_file.setdefault(entry.file, []).append(entry)
        for file, inside in sorted(by_file.items()):
            try:
                (folder / file).stat()  # safetensors' own error about a missing file has no errno
                tensors = read_tensors(folder / file, inside, check=check)
            except OSError as error:
                raise CheckpointError(f"{file}: {described(error)}", path=folder / file, errno=error.errno) from error
            except ValueError as error:
                raise CheckpointError(f"{file}: {error}", path=folder / file) from error
            for entry in inside:
                self._slices.setdefault(entry.name, []).append((slice_of(entry), tensors[entry.name]))

    def __getitem__(self, name: str) -> Tensor:
        slices = self._slices[name]
        return slices[0][1] if len(slices) == 1 else self.read(name, Slice.whole(slices[0][0].global_shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """See StoredTensors."""
        part, tensor = self._slices[name][0]
        return tensor.dtype, part.global_shape

    def read_into(self, name: str, part: Slice, out: Tensor) -> None:
        """See StoredTensors."""
        for saved, tensor in self._slices[name]:
            common = saved.overlap(part)
            if common is not None:
                out[part.index(common)].copy_(tensor[saved.index(common)])


def slice_of(entry: TensorEntry) -> Slice:
    """Where the entry's tensor lies in the whole one."""
    return Slice(tuple(entry.global_shape), tuple(entry.offset), tuple(entry.shape))


def tiling_problem(entries: Sequence[TensorEntry]) -> str | None:
    """What is wrong with the slices: each tensor must have every element exactly once. None if all is well.

    Layouts cut tensors into grids, so this asks for a grid: the cuts of each dimension join without gap or overlap,
    and every combination of them is there once.
    """
    by_name: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    for name, parts in by_name.items():
        if len({(entry.dtype, *entry.global_shape) for entry in parts}) > 1:
            return f"tensor {name!r}: its slices disagree about its shape or dtype"
        if not all(len(entry.shape) == len(entry.offset) == len(entry.global_shape) for entry in parts):
            return f"tensor {name!r}: a slice has not the dimensions of the tensor"
        if parts[0].dtype not in TORCH_DTYPES or not _is_grid([slice_of(entry) for entry in parts]):
            return f"tensor {name!r}: its {len(parts)} slices do not make up the whole of {parts[0].global_shape}"
    return None


def _is_grid(parts: Sequence[Slice]) -> bool:
    cells = 1
    for dim, length in enumerate(parts[0].global_shape):
        cuts = sorted({(part.offset[dim], part.shape[dim]) for part in parts})
        joined = [0]
        for start, size in cuts:
            if start != joined[-1]:
                return False
            joined.append(start + size)
        if joined[-1] != length:
            return False
        cells *= len(cuts)
    return len(parts) == cells == len({part.offset for part in parts})
