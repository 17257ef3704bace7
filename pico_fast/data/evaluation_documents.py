"""Documents to measure perplexity on, as token ids, from any parquet folder or hub dataset."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pico_fast.config import PalomaConfig
from pico_fast.data.decode import list_of_integers
from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.data.shards import Shards, find_shards
from pico_fast.data.tokenizer import Tokenizer

_READ_ROWS = 256  # decoded and tokenised at a time


@dataclass(frozen=True)
class Documents:
    """Token ids of documents, in the order of the dataset's rows.

    Attributes:
        name: of the dataset.
        ids: one int32 array per document; may be empty or a single id, which evaluation passes over.
        truncated: how many documents were longer than what is kept of them.
    """

    name: str
    ids: tuple[np.ndarray, ...]
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.ids)


def load_documents(
    config: PalomaConfig,
    tokenizer: Tokenizer | None,
    max_seq_len: int,
    vocab_size: int,
    *,
    filesystem: Any = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Documents:
    """The documents of ``evaluation.paloma``, each cut to ``min(config.max_length, max_seq_len + 1)`` tokens.

    Text is tokenised here, without special tokens, as pico-train does; lists of ids may have any length. ``column:
    auto`` takes text where the dataset has it. A row is named in messages by its number in its file.

    Args:
        config: dataset, split, column and how many documents at most.
        tokenizer: needed for text only.
        max_seq_len: of the model.
        vocab_size: of the model; every id must be less.
        filesystem: an fsspec file system to read from instead of the local disk or the hub.
        sleep: waits so many seconds between the tries of a remote read.

    Raises DataError: no such data, split or column, a null, an id out of range, an unreadable file, no document of two
    tokens. TokenizerError: text without a tokenizer.
    """
    shards = find_shards(config.dataset_name, config.dataset_split, config.revision, filesystem)
    keep = min(config.max_length, max_seq_len + 1)  # the last token is only predicted, never read
    kept: list[np.ndarray] = []
    truncated = 0
    for where, ids in islice(_documents(shards, config.column, tokenizer, sleep), config.limit):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            bad = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise DataError(
                f"{where} has id {bad}; ids must be at least 0 and less than model.vocab_size = {vocab_size} "
                "(text: is data.tokenizer.name the tokenizer that the model was made for?)"
            )
        truncated += len(ids) > keep
        kept.append(ids[:keep].astype(np.int32))
    if not any(len(ids) > 1 for ids in kept):
        raise DataError(
            f"dataset {shards.name!r}, split {config.dataset_split!r}: none of its {len(kept)} documents has two "
            "tokens, the least that has a perplexity"
        )
    return Documents(shards.name, tuple(kept), truncated)


def _documents(
    shards: Shards, wanted: str, tokenizer: Tokenizer | None, sleep: Callable[[float], object]
) -> Iterator[tuple[str, np.ndarray]]:
    """(file and row for messages, all its token ids) of every row, in the order of the rows."""
    for shard, label in enumerate(shards.labels):
        where = f"{shards.name}: {label}"
        for first_row, column, rows in _batches(shards, shard, wanted, where, sleep):
            if rows.null_count:
                row = first_row + int(np.flatnonzero(rows.is_null().to_numpy(zero_copy_only=False))[0])
                raise DataError(f"{where}: row {row} is null")
            found = _tokenised(rows, tokenizer, where) if column == "text" else _listed(rows, where, first_row)
            for row, ids in enumerate(found, first_row):
                yield f"{where}: row {row}", ids


def _batches(
    shards: Shards, shard: int, wanted: str, where: str, sleep: Callable[[float], object]
) -> Iterator[tuple[int, str, pa.Array]]:
    """(number of the first row in the file, column name, column) of every few rows of one file."""
    try:
        with shards.open(shard, sleep) as source, pq.ParquetFile(source) as file:
            column = _column(file.schema_arrow, wanted, where)
            first_row = 0
            for batch in file.iter_batches(_READ_ROWS, columns=[column]):
                yield first_row, column, batch.column(0)
                first_row += batch.num_rows
    except DataError:
        raise
    except shards.read_errors as error:
        raise shards.unreadable(f"{where}: cannot be read as parquet", error) from None


def _column(schema: pa.Schema, wanted: str, where: str) -> str:
    """The column to read: the one asked for, or text before input_ids."""
    names = ("text", "input_ids") if wanted == "auto" else (wanted,)
    column = next((name for name in names if name in schema.names), None)
    if column is None:
        raise DataError(
            f"{where}: no column {' or '.join(map(repr, names))} (evaluation.paloma.column = {wanted}); its columns "
            f"are {', '.join(schema.names) or 'none'}"
        )
    kind = schema.field(column).type
    if column == "text" and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: column 'text' is {kind}; strings are expected")
    if column == "input_ids" and not list_of_integers(kind):
        raise DataError(f"{where}: column 'input_ids' is {kind}; lists of integers are expected")
    return column


def _tokenised(rows: pa.Array, tokenizer: Tokenizer | None, where: str) -> Iterator[np.ndarray]:
    if tokenizer is None:
        raise TokenizerError(
            f"{where}: to evaluate on text a tokenizer is needed",
            "set data.tokenizer.name, or evaluation.paloma.column: input_ids if the dataset has that column",
        )
    return (np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode(rows.to_pylist()))


def _listed(rows: pa.Array, where: str, first_row: int) -> Iterator[np.ndarray]:
    ends = np.cumsum(pc.list_value_length(rows).to_numpy(zero_copy_only=False), dtype=np.int64)
    values = rows.flatten()
    if values.null_count:
        position = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = first_row + int(np.searchsorted(ends, position, "right"))
        raise DataError(f"{where}: row {row} has a null among its ids")
    return iter(np.split(values.to_numpy(), ends[:-1]))
