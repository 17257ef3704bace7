"""``state/manifest.json``: what a checkpoint consists of, with checksums.

The file is one line of JSON in ASCII, keys sorted, no spaces, and a newline. Its key ``xxh3_128`` is the hash of
that same line without the key; reading demands the exact bytes that writing gives, so any changed bit is found.

Keys: ``format``, ``version``, ``step``, ``world_size``, ``torch`` (its version), ``meta`` (whatever the trainer
keeps; NaN and infinity as Python's json writes them), ``tensors`` (name, file, dtype in safetensors' names, shape of
this slice, global_shape, offset of the slice, xxh3_128 of its bytes) and ``files`` (path below the step folder, size
in bytes, crc32c of each block of 1 MiB). ``files`` lists the state files and the Hugging Face files, not the
manifest.

A name stands once in ``tensors`` for each slice; together the slices make up the tensor. ``VERSION`` rises when a
reader of the old version would misread the new one. States of several ranks did not raise it: the keys were there, and
readers before them refuse a ``world_size`` above 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = "pico-fast-state"
VERSION = 1
BLOCK_BYTES = 1 << 20

_HASH = "xxh3_128"


class ManifestError(ValueError):
    """The bytes are not an intact manifest of a version this code reads."""


class BlockChecksums:
    """crc32c of each block of 1 MiB of a byte stream."""

    def __init__(self) -> None:
        import google_crc32c

        self._extend = google_crc32c.extend
        self._finished: list[int] = []
        self._crc = 0
        self._filled = 0
        self.size = 0

    def update(self, data: Any) -> None:
        """Add bytes, or a one-dimensional uint8 numpy array."""
        start, length = 0, len(data)
        self.size += length
        while start < length:
            piece = data[start : start + BLOCK_BYTES - self._filled]
            self._crc = self._extend(self._crc, piece)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == BLOCK_BYTES:
                self._finished.append(self._crc)
                self._crc = self._filled = 0

    def blocks(self) -> list[int]:
        """The checksums so far, with that of the unfinished last block."""
        return [*self._finished, self._crc] if self._filled else list(self._finished)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, or one rank's slice of it: ``offset`` is where the slice begins in ``global_shape``."""

    name: str
    file: str
    dtype: str
    shape: list[int]
    global_shape: list[int]
    offset: list[int]
    xxh3_128: str


@dataclass(frozen=True)
class FileEntry:
    """One file: path below the step folder, size, crc32c of each block."""

    path: str
    size: int
    crc32c: list[int]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's contents; see the module's text."""

    step: int
    world_size: int
    torch: str
    meta: dict[str, Any]
    tensors: list[TensorEntry]
    files: list[FileEntry]

    def to_bytes(self) -> bytes:
        """The file's bytes. Raises TypeError if ``meta`` holds something that JSON has not."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return _line({**body, _HASH: _digest(body)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest in ``data``. Raises ManifestError if one bit is not as it was written."""
        try:
            body = json.loads(data.decode("utf-8"))
        except ValueError as error:
            raise ManifestError(f"not JSON ({error})") from None
        if not isinstance(body, dict) or _HASH not in body:
            raise ManifestError("not a manifest")
        claimed = body.pop(_HASH)
        if claimed != _digest(body) or _line({**body, _HASH: claimed}) != data:
            raise ManifestError("its checksum does not match")
        if body.pop("format", None) != FORMAT or body.pop("version", None) != VERSION:
            raise ManifestError(f"not {FORMAT} version {VERSION}: written by another version of pico-fast")
        try:
            return cls(**{**body, "tensors": _entries(TensorEntry, body), "files": _entries(FileEntry, body)})
        except (TypeError, KeyError) as error:
            raise ManifestError(f"unexpected keys ({error})") from None


def _entries(kind: type[Any], body: dict[str, Any]) -> list[Any]:
    rows: Iterable[dict[str, Any]] = body["tensors" if kind is TensorEntry else "files"]
    return [kind(**row) for row in rows]


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("utf-8") + b"\n"


def _digest(body: dict[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(_line(body))
