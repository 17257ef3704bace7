"""Writing and reading one safetensors file as a stream.

The format is safetensors' own (8 bytes little-endian header length, JSON header padded with spaces to a multiple of
8, data without holes), emitted here because ``safetensors.torch.save_file`` neither fsyncs nor honours the umask (it
leaves mode 0600), and because hashing while writing reads memory once. Tensors stand by falling element size, then
name, as the library orders them, so that each is aligned. Beyond the state itself at most one tensor's piece of 8 MiB
(device tensors) or one tensor (non-contiguous ones) is in memory.

A file that holds slices says in ``__metadata__`` where each begins in its tensor, under the keys that
``torch.distributed.checkpoint.HuggingFaceStorageReader`` looks for (``_hf_utils.py`` there). A file of whole tensors
needs no such keys and has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pico_fast.checkpoint.manifest import TensorEntry
from pico_fast.parallel.slices import Slice

PIECE_BYTES = 8 << 20
SLICES_KEY = "DCP_SHARDING_INFO"
SLICES_VERSION = {"DCP_VERSION": "1.0"}

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def file_bytes(tensors: Mapping[str, torch.Tensor], slices: Mapping[str, Slice]) -> int:
    """Size in bytes of the file that :func:`write_tensors` makes."""
    return len(_header(tensors, slices)) + sum(tensor.nbytes for tensor in tensors.values())


def write_tensors(
    tensors: Mapping[str, torch.Tensor], slices: Mapping[str, Slice], file: str, emit: Callable[[Any], None]
) -> list[TensorEntry]:
    """Pass the file's bytes to ``emit`` in order, as uint8 numpy arrays or bytes, and describe each tensor.

    ``slices``: which part of its tensor each is; a tensor without an entry is whole. Raises TypeError for a dtype that
    the format has not.
    """
    import xxhash

    emit(_header(tensors, slices))
    entries = []
    for name in _order(tensors):
        tensor = tensors[name]
        hasher = xxhash.xxh3_128()
        for piece in _pieces(tensor):
            hasher.update(piece)
            emit(piece)
        part = slices.get(name) or Slice.whole(tensor.shape)
        entries.append(
            TensorEntry(
                name=name,
                file=file,
                dtype=DTYPES[tensor.dtype],
                shape=list(part.shape),
                global_shape=list(part.global_shape),
                offset=list(part.offset),
                xxh3_128=hasher.hexdigest(),
            )
        )
    return entries


def read_tensors(path: Path, entries: Sequence[TensorEntry], *, check: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of ``path``, which must be exactly those of ``entries``, bit for bit; ValueError says what differs.

    They are private copies of the mapped file: reading costs no memory beyond the page cache until they are changed.
    ``check=False`` leaves out the checksums, for which every byte is read.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            if set(file.keys()) != {entry.name for entry in entries}:
                raise ValueError("its tensors are not those of the manifest")
            for entry in entries:
                tensor = file.get_tensor(entry.name)
                if DTYPES.get(tensor.dtype) != entry.dtype or list(tensor.shape) != entry.shape:
                    raise ValueError(f"tensor {entry.name!r} has not the shape or dtype of the manifest")
                if check and _hash(tensor) != entry.xxh3_128:
                    raise ValueError(f"tensor {entry.name!r} has another checksum than in the manifest")
                tensors[entry.name] = tensor
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from None
    return tensors


def _hash(tensor: torch.Tensor) -> str:
    import xxhash

    hasher = xxhash.xxh3_128()
    for piece in _pieces(tensor):
        hasher.update(piece)
    return hasher.hexdigest()


def _order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, torch.Tensor], slices: Mapping[str, Slice]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if any(not part.is_whole for part in slices.values()):  # the reader then looks every tensor of the file up
        offsets = {
            name: {"saved_offsets": list((slices.get(name) or Slice.whole(tensors[name].shape)).offset)}
            for name in _order(tensors)
        }
        header["__metadata__"] |= {SLICES_KEY: json.dumps(offsets, separators=(",", ":")), **SLICES_VERSION}
    end = 0
    for name in _order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"tensor {name!r}: {tensor.dtype} cannot be saved; known: {', '.join(map(str, DTYPES))}")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: torch.Tensor) -> Iterator[Any]:
    """The bytes of ``tensor`` in row-major order as uint8 numpy arrays: views of its memory if dense on the CPU."""
    if not tensor.numel():
        return
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(PIECE_BYTES):
        yield piece.cpu().numpy()
