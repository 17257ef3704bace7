"""From an arrow column of token lists to an int32 matrix, with every assumption checked."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pico_fast.data.errors import DataError


class RowError(DataError):
    """A bad row; ``row`` counts from the start of the array it was found in, ``problem`` says what is wrong."""

    def __init__(self, row: int, problem: str):
        super().__init__(row, problem)
        self.row = row
        self.problem = problem


def list_of_integers(kind: pa.DataType) -> bool:
    """Whether ``kind`` is a list, large list or fixed-size list of integers."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def token_matrix(column: pa.Array, row_len: int | None, vocab_size: int | None) -> np.ndarray:
    """The rows of ``column`` as int32 (rows, row_len); None takes the length of the first row.

    A row is bad if it is null, holds a null, has another length, or has an id that is negative or at least
    ``vocab_size`` (at least 2**31 for None). Raises RowError for the first bad row.
    """
    if column.null_count:
        raise RowError(_first(~column.is_valid().to_numpy(zero_copy_only=False)), "is null")
    lengths = _lengths(column)
    if row_len is None:
        row_len = int(lengths[0])
    wrong = lengths != row_len
    if wrong.any():
        row = _first(wrong)
        raise RowError(row, f"has {lengths[row]} ids, {row_len} expected (every row: max_seq_len + 1)")
    values = column.flatten()
    if values.null_count:
        position = _first(~values.is_valid().to_numpy(zero_copy_only=False))
        raise RowError(position // row_len, f"has a null at position {position % row_len}")
    ids = values.to_numpy(zero_copy_only=True)
    limit = 2**31 if vocab_size is None else vocab_size
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= limit):
        position = _first((ids < 0) | (ids >= limit))
        raise RowError(
            position // row_len,
            f"has id {ids[position]} at position {position % row_len}; ids must be at least 0 and less than "
            + (f"vocab_size = {vocab_size}" if vocab_size is not None else "2**31"),
        )
    return ids.astype(np.int32, copy=False).reshape(len(column), row_len)


def _lengths(column: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        return np.full(len(column), column.type.list_size)
    return np.diff(column.offsets.to_numpy())


def _first(flags: np.ndarray) -> int:
    return int(np.flatnonzero(flags)[0])
