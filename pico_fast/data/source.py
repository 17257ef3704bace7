"""Rows of token ids by their global number, out of many parquet shards.

Global order: shards sorted by name, rows as they stand in them. A footer tells how many rows its shard has, so
finding a row is arithmetic; footers are read only as far as the rows asked for need, many at a time. Values go from
arrow to numpy without Python objects; at most one window of rows is held decoded.
"""

from __future__ import annotations

import bisect
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pico_fast.data.decode import RowError, list_of_integers, token_matrix
from pico_fast.data.errors import DataError
from pico_fast.data.footers import FooterCache
from pico_fast.data.shards import Shards, find_shards

__all__ = ["DataError", "TokenRows", "open_rows"]

_WINDOW_ROWS = 512  # decoded at a time: 4 MB of 2,049 ids
_READ_BYTES = 16 << 20  # one request; a row group of any size is read in such pieces
_FOOTER_THREADS = 32


class TokenRows:
    """Fixed-length rows of token ids, numbered from 0 over all shards.

    Not safe to share between threads: one reader each.

    Attributes:
        row_len: ids per row.
        vocab_size: every id is less than this; None checks only that ids are not negative and fit 32 bits.

    ``sleep`` waits so many seconds between the tries of a remote read.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        row_len: int | None = None,
        vocab_size: int | None = None,
        column: str = "input_ids",
        footers: FooterCache | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self.shards, self.vocab_size, self.column = shards, vocab_size, column
        self._footers, self._sleep = footers or FooterCache(None), sleep
        self._starts = [0]  # _starts[i]: global number of shard i's first row, for the footers read so far
        self._groups: list[tuple[int, ...]] = []  # rows of each row group; all that is kept of a footer
        self._open: tuple[int, pq.ParquetFile] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._position: tuple[int, int, int] | None = None  # shard, row group, first row of the next window
        self._window: tuple[int, np.ndarray] = (0, np.empty((0, 0), np.int32))  # global number of its first row
        self._row_len = row_len
        if not self.has(0):
            raise DataError(f"dataset {shards.name!r}: its {len(shards.paths)} parquet file(s) hold no rows")
        self._load_window(0)
        self.row_len: int = self._window[1].shape[1]
        self._row_len = self.row_len
        if self.row_len < 2:
            raise DataError(
                f"dataset {shards.name!r}: rows of {self.row_len} id(s); at least 2 are needed (input and label)"
            )

    @property
    def n_rows(self) -> int:
        """Rows of all shards. Reads every footer: on a large hub dataset that takes a while; see :meth:`has`."""
        self._read_footers(until=None)
        return self._starts[-1]

    @property
    def n_rows_known(self) -> int | None:
        """:attr:`n_rows` if every footer has been read already, else None."""
        return self._starts[-1] if len(self._groups) == len(self.shards.paths) else None

    def has(self, row: int) -> bool:
        """Whether there is a row ``row``; reads footers only as far as the answer needs."""
        self._read_footers(until=row)
        return 0 <= row < self._starts[-1]

    def fingerprint(self) -> str:
        """Short string that changes when the data do.

        Local files: names, sizes and row counts. Hub: names and commit, which costs no footers.
        """
        local = self.shards.revision is None
        if local:
            self._read_footers(until=None)
        digest = hashlib.sha256(f"{self.column}\n{self.row_len}\n{self.shards.revision}\n".encode())
        for index, label in enumerate(self.shards.labels):
            digest.update(f"{label}\n".encode())
            if local:
                digest.update(f"{self._size(index)} {sum(self._groups[index])}\n".encode())
        return digest.hexdigest()[:16]

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop`` (exclusive) of the global order: int32 (stop - start, row_len).

        Args:
            out: array of that shape to fill, instead of a new one.

        Raises DataError naming file and row: a row that is null, of another length or with an id out of range; a file
        that cannot be read. IndexError: rows that are not there.
        """
        if start < 0 or stop < start or (stop > start and not self.has(stop - 1)):
            raise IndexError(f"rows {start} to {stop} of dataset {self.shards.name!r}, which has {self.n_rows}")
        if out is None:
            out = np.empty((stop - start, self.row_len), np.int32)
        row = start
        while row < stop:
            first, rows = self._window
            if not first <= row < first + len(rows):
                self._load_window(row)
                first, rows = self._window
            n = min(stop, first + len(rows)) - row
            out[row - start : row - start + n] = rows[row - first : row - first + n]
            row += n
        return out

    def close(self) -> None:
        """Close the open file; reading opens it again."""
        self._batches, self._position, opened, self._open = iter(()), None, self._open, None
        if opened is not None:
            opened[1].close(force=True)

    def _read_footers(self, until: int | None) -> None:
        """Extend the index until it covers row ``until`` (None: all shards), in growing parallel portions."""
        portion = 1
        while len(self._groups) < len(self.shards.paths) and (until is None or until >= self._starts[-1]):
            done = len(self._groups)
            if until is not None and done:  # as many as the shards so far suggest: exact where all are alike
                rows_per_shard = max(1, self._starts[-1] // done)
                portion = (until - self._starts[-1]) // rows_per_shard + 1
            wanted = range(
                done, len(self.shards.paths) if until is None else min(len(self.shards.paths), done + portion)
            )
            unknown = [shard for shard in wanted if self.shards.labels[shard] not in self._footers]
            if len(unknown) > 1:
                with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
                    read = dict(zip(unknown, pool.map(self._row_group_sizes, unknown), strict=True))
            else:
                read = {shard: self._row_group_sizes(shard) for shard in unknown}
            self._footers.add((self.shards.labels[shard], sizes) for shard, sizes in read.items())
            for shard in wanted:
                sizes = self._footers[self.shards.labels[shard]]
                self._groups.append(sizes)
                self._starts.append(self._starts[-1] + sum(sizes))

    def _row_group_sizes(self, shard: int) -> tuple[int, ...]:
        """Rows of each row group of a shard, from its footer, whose schema is checked."""
        try:
            with self.shards.open(shard, self._sleep) as source:
                metadata = pq.read_metadata(source)
        except self.shards.read_errors as error:
            raise self.shards.unreadable(f"{self._label(shard)}: not a readable parquet file", error) from error
        schema = metadata.schema.to_arrow_schema()
        if self.column not in schema.names:
            raise DataError(
                f"{self._label(shard)}: no column {self.column!r}; its columns are {', '.join(schema.names) or 'none'}"
            )
        kind = schema.field(self.column).type
        if not list_of_integers(kind):
            raise DataError(f"{self._label(shard)}: column {self.column!r} is {kind}; lists of integers are expected")
        return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))

    def _size(self, shard: int) -> int:
        with self.shards.open(shard, self._sleep) as source:
            return int(source.seek(0, 2))

    def _label(self, shard: int) -> str:
        return f"{self.shards.name}: {self.shards.labels[shard]}"

    def _load_window(self, row: int) -> None:
        """Make the decoded window one that holds global row ``row``, which must exist."""
        shard = bisect.bisect_right(self._starts, row) - 1
        sizes, row_in_shard = self._groups[shard], row - self._starts[shard]
        group, group_start = 0, 0
        while row_in_shard >= group_start + sizes[group]:
            group_start += sizes[group]
            group += 1
        try:
            if self._position is None or self._position[:2] != (shard, group) or self._position[2] > row_in_shard:
                self._start_row_group(shard, group, group_start)
            batch = self._next_batch()
            while row_in_shard >= batch[0] + len(batch[1]):
                batch = self._next_batch()
        except self.shards.read_errors as error:
            self.close()
            what = f"{self._label(shard)}: row {row_in_shard} (global row {row}) cannot be read"
            raise self.shards.unreadable(what, error) from error
        first, column = batch
        try:
            self._window = self._starts[shard] + first, token_matrix(column, self._row_len, self.vocab_size)
        except RowError as error:
            self.close()
            bad = first + error.row
            raise DataError(
                f"{self._label(shard)}: row {bad} (global row {self._starts[shard] + bad}) {error.problem}"
            ) from None

    def _start_row_group(self, shard: int, group: int, first_row: int) -> None:
        if self._open is None or self._open[0] != shard:
            self.close()
            file = pq.ParquetFile(
                self.shards.open(shard, self._sleep),
                buffer_size=_READ_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            self._open = shard, file
        self._batches = self._open[1].iter_batches(_WINDOW_ROWS, [group], [self.column], use_threads=False)
        self._position = shard, group, first_row

    def _next_batch(self) -> tuple[int, pa.Array]:
        """The next window of the open row group: number of its first row in the shard, and its column."""
        if self._position is None:
            raise RuntimeError("no row group is open")
        shard, group, first = self._position
        batch = next(self._batches, None)
        if batch is None:
            raise OSError(f"row group {group} ends early")
        self._position = shard, group, first + batch.num_rows
        return first, batch.column(0)


def open_rows(
    name: str,
    split: str = "train",
    revision: str | None = None,
    row_len: int | None = None,
    vocab_size: int | None = None,
    column: str = "input_ids",
    *,
    filesystem: Any = None,
    sleep: Callable[[float], object] = time.sleep,
) -> TokenRows:
    """Rows of token ids of a dataset; reads the first footer and the first rows, so that mistakes show at once.

    Args:
        name: a local folder or file of parquet, or a dataset on the hub, whose row groups are read over the network
            as they are needed (nothing is downloaded first; HF_TOKEN opens private ones). A remote read that fails
            for a passing reason is repeated for about a minute.
        split: which files; see :func:`pico_fast.data.shards.find_shards`.
        revision: of a hub dataset.
        row_len: ids per row, ``max_seq_len + 1`` to train; None takes the first row's.
        vocab_size: ids must be less.
        column: list of integers of any width.
        filesystem: an fsspec file system to read from instead.
        sleep: waits so many seconds between the tries of a remote read.

    Raises DataError.
    """
    shards = find_shards(name, split, revision, filesystem)
    on_hub = filesystem is None and shards.revision is not None
    footers = FooterCache.for_commit(name, shards.revision or "", column) if on_hub else None
    return TokenRows(shards, row_len=row_len, vocab_size=vocab_size, column=column, footers=footers, sleep=sleep)
