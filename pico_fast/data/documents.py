"""Documents out of text files, JSON lines and parquet, in work units whose composition depends on the input alone."""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pico_fast.data.errors import DataError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".txt.gz")
_FOLDER_SUFFIXES = (*_TEXT_SUFFIXES, *_JSON_SUFFIXES, ".parquet")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Input:
    """One input file.

    Attributes:
        path: where it is.
        label: what it is called in messages.
        kind: text, json or parquet.
        size: in bytes.
        mtime_ns: time of its last change, in ns.
    """

    path: str
    label: str
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """A part of an input: bytes [start, stop) of a text or JSON file, row groups [start, stop) of a parquet file."""

    source: Input
    start: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """How documents are taken from files.

    Attributes:
        text_column: key or column that holds the text, in JSON lines and parquet.
        separator: string between the documents of a text file; None: the file is one document.
        skip_undecodable: leave out what is not UTF-8, and count it.
    """

    text_column: str = "text"
    separator: str | None = None
    skip_undecodable: bool = False


def find_inputs(
    names: Iterable[str | Path], include: Sequence[str] = (), exclude_under: Path | None = None
) -> list[Input]:
    """The files of ``names`` (files, or folders searched recursively) in a fixed order.

    Args:
        include: patterns for files in folders (``*.py``, ``docs/*``), matched with the name and the relative path;
            none: the known suffixes of text, JSON lines and parquet. Files given by name are taken as they are.
        exclude_under: a folder to leave out: the output.

    Raises DataError: nothing there, or a folder without a file that matches.
    """
    found: dict[str, Input] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            chosen = [(path, str(name))]
        elif path.is_dir():
            chosen = [(path / relative, f"{name}/{relative}") for relative in _in_folder(path, include, exclude_under)]
        else:
            raise DataError(f"input {str(name)!r}: no such file or folder")
        for file, label in chosen:
            stat = file.stat()
            found.setdefault(
                str(file.resolve()), Input(str(file.resolve()), label, _kind(file.name), stat.st_size, stat.st_mtime_ns)
            )
    return list(found.values())


def _in_folder(folder: Path, include: Sequence[str], exclude_under: Path | None) -> list[str]:
    everything = []
    for parent, folders, names in os.walk(folder):
        excluded = exclude_under.resolve() if exclude_under is not None else None
        folders[:] = [f for f in folders if not f.startswith(".") and Path(parent, f).resolve() != excluded]
        everything += [Path(parent, file).relative_to(folder).as_posix() for file in names if not file.startswith(".")]
    if include:
        chosen = [
            f for f in everything if any(fnmatch.fnmatch(f, p) or fnmatch.fnmatch(Path(f).name, p) for p in include)
        ]
    else:
        chosen = [file for file in everything if file.lower().endswith(_FOLDER_SUFFIXES)]
    if not chosen:
        suffixes = Counter(os.path.splitext(file)[1] or "no suffix" for file in everything).most_common(5)
        there = ", ".join(f"{n} {suffix}" for suffix, n in suffixes) or "no files"
        wanted = " ".join(include) if include else ", ".join(_FOLDER_SUFFIXES)
        raise DataError(f"input {str(folder)!r}: no file matches {wanted} (it has {there}); see --include")
    return sorted(chosen)


def _kind(name: str) -> str:
    name = name.lower()
    return "json" if name.endswith(_JSON_SUFFIXES) else "parquet" if name.endswith(".parquet") else "text"


def work_units(inputs: Sequence[Input], reading: Reading) -> list[list[Piece]]:
    """The inputs cut into units of 1 to 64 MB (about 256 of them), in order; the same for the same inputs.

    Raises DataError: a parquet file that cannot be read or lacks the text column.
    """
    target = min(max(sum(source.size for source in inputs) // 256, 1 << 20), 64 << 20)
    units: list[list[Piece]] = [[]]
    in_unit = 0
    for source in inputs:
        for piece, size in _pieces(source, target, reading):
            if in_unit and in_unit + size > target:
                units.append([])
                in_unit = 0
            units[-1].append(piece)
            in_unit += size
    return [unit for unit in units if unit]


def _pieces(source: Input, target: int, reading: Reading) -> Iterator[tuple[Piece, int]]:
    """Parts of one file with their sizes in bytes: what has records is cut near ``target``, the rest is whole."""
    if source.kind == "parquet":
        metadata = _parquet(source, reading).metadata
        for group in range(metadata.num_row_groups):
            yield Piece(source, group, group + 1), metadata.row_group(group).total_byte_size
        return
    separator = "\n" if source.kind == "json" else reading.separator
    cut = separator is not None and not source.path.endswith(".gz") and _unambiguous(separator.encode())
    step = target if cut else max(source.size, 1)
    for start in range(0, max(source.size, 1), step):
        stop = min(start + step, source.size)
        yield Piece(source, start, stop), stop - start


def _unambiguous(separator: bytes) -> bool:
    """Whether occurrences can never overlap, so that they are the same wherever in a file one starts to look."""
    return not any(separator[:n] == separator[-n:] for n in range(1, len(separator)))


def documents(unit: Iterable[Piece], reading: Reading) -> Iterator[str | None]:
    """The texts of a unit in order; ``""`` for a document without text, None for one that was skipped as undecodable.

    Raises DataError naming the file and the line or row.
    """
    for piece in unit:
        if piece.source.kind == "parquet":
            yield from _parquet_documents(piece, reading)
        elif piece.source.kind == "json":
            yield from _json_documents(piece, reading)
        else:
            yield from _text_documents(piece, reading)


def _text_documents(piece: Piece, reading: Reading) -> Iterator[str | None]:
    if reading.separator is None:
        with _opened(piece.source) as file:
            records: Iterable[tuple[int, bytes]] = [(0, _read(piece.source, file, -1))]
    else:
        records = _records(piece, reading.separator.encode())
    for offset, record in records:
        yield _decoded(record, offset, piece.source, reading)


def _decoded(record: bytes, offset: int, source: Input, reading: Reading) -> str | None:
    try:
        return record.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        if not reading.skip_undecodable:
            raise DataError(
                f"{source.label}: not UTF-8 text (byte {offset + error.start}); convert it, leave it out, or give "
                "--skip-undecodable"
            ) from None
        return None


def _json_documents(piece: Piece, reading: Reading) -> Iterator[str | None]:
    for offset, record in _records(piece, b"\n"):
        if not record.strip():
            continue
        try:
            yield _text_of(json.loads(record.decode("utf-8-sig" if offset == 0 else "utf-8")), reading.text_column)
        except UnicodeError:  # bytes that are not UTF-8, or an escape for half a surrogate pair
            if not reading.skip_undecodable:
                line = _line_number(piece.source, offset)
                raise DataError(
                    f"{piece.source.label}, line {line}: not UTF-8 text; convert the file or give --skip-undecodable"
                ) from None
            yield None
        except ValueError as error:
            raise DataError(f"{piece.source.label}, line {_line_number(piece.source, offset)}: {error}") from None


def _text_of(value: Any, key: str) -> str:
    """Text of one JSON line; ValueError that says what is wrong with it (UnicodeError: it cannot be encoded)."""
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object expected, {type(value).__name__} given (one object per line)")
    if key not in value:
        raise ValueError(f"no key {key!r} (it has {', '.join(value) or 'none'}); see --text-column")
    if not isinstance(value[key], (str, type(None))):
        raise ValueError(f"{key!r} is {type(value[key]).__name__}, not a string")
    text = value[key] or ""
    text.encode()  # half of a surrogate pair is valid JSON, but not text
    return text


def _parquet_documents(piece: Piece, reading: Reading) -> Iterator[str]:
    file = _parquet(piece.source, reading)
    try:
        batches = file.iter_batches(
            1024, list(range(piece.start, piece.stop)), [reading.text_column], use_threads=False
        )
        for batch in batches:
            for text in batch.column(0):
                yield text.as_py() or ""
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{piece.source.label}, row group {piece.start}: cannot be read ({error})") from None


def _parquet(source: Input, reading: Reading) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(source.path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source.label}: not a readable parquet file ({error})") from None
    schema = file.schema_arrow
    if reading.text_column not in schema.names:
        raise DataError(
            f"{source.label}: no column {reading.text_column!r}; its columns are {', '.join(schema.names)}; see "
            "--text-column"
        )
    kind = schema.field(reading.text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{source.label}: column {reading.text_column!r} is {kind}, not a string; see --text-column")
    return file


def _records(piece: Piece, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Records between separators that begin in the piece, each with its byte offset in the file."""
    whole = piece.source.path.endswith(".gz")
    with _opened(piece.source) as file:
        position = 0  # of buffer[0] in the file
        buffer = b""
        if not whole and piece.start:
            # the record that begins exactly at `start` is ours: look for its separator from just before
            position = max(0, piece.start - len(separator))
            file.seek(position)
        skip_first = not whole and piece.start > 0
        while True:
            data = _read(piece.source, file, _READ_BYTES)
            buffer += data
            *complete, rest = buffer.split(separator) if data else [*buffer.split(separator), b""]
            for record in complete:
                if skip_first:
                    skip_first = False
                elif not whole and position >= piece.stop:
                    return
                elif record or data:
                    yield position, record
                position += len(record) + len(separator)
            buffer = rest
            if not data:
                return


def _opened(source: Input) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(source.path)) if source.path.endswith(".gz") else open(source.path, "rb")
    except OSError as error:
        raise DataError(f"{source.label}: cannot be read ({error.strerror or error})") from None


def _read(source: Input, file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except (OSError, EOFError, zlib.error) as error:  # a cut or damaged gzip stream gives any of them
        raise DataError(f"{source.label}: cannot be read to its end ({error})") from None


def _line_number(source: Input, offset: int) -> int:
    """1 plus the newlines before ``offset``, which may be far into the file."""
    line, left = 1, offset
    with _opened(source) as file:
        while left > 0 and (data := file.read(min(left, _READ_BYTES))):
            line += data.count(b"\n")
            left -= len(data)
    return line
