"""The two halves of preparing a dataset: work units to token files, and token files to shuffled parquet shards.

Both are functions of fixed inputs that write their result atomically, so any number of processes, in any order, after
any interruption, gives the same bytes. All units' tokens of a split, in unit order, are one long stream; row ``i`` is
its ``row_len`` tokens from ``i * row_len`` on, so packing loses nothing but the end of the stream that fills no row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pico_fast.data.documents import Piece, Reading, documents
from pico_fast.data.tokenizer import Tokenizer

SPLITS = ("train", "val")
_ROW_GROUP = 1024  # 8 MB of 2,049 ids: a reader that wants few rows decodes little
_ENCODE_CHARS = 1 << 20  # texts are tokenised about this many characters at a time, to bound memory


@dataclass
class Counts:
    """What was found in some units; tokens include one end-of-text token per document."""

    documents: int = 0
    val_documents: int = 0
    without_text: int = 0
    undecodable: int = 0
    train_tokens: int = 0
    val_tokens: int = 0

    def add(self, other: Counts) -> None:
        """Add ``other`` to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(frozen=True)
class Packing:
    """What a worker needs to know besides its unit.

    Attributes:
        parts: folder of the token files.
        eos_id: follows every document.
        dtype: of the token files, ``uint16`` or ``uint32``.
        val_fraction: share of the documents that go to ``val``, by a hash of ``seed`` and their text.
    """

    parts: Path
    reading: Reading
    eos_id: int
    dtype: str
    val_fraction: float
    seed: int


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well; a kill leaves the old ``path`` or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def token_file(parts: Path, split: str, unit: int) -> Path:
    """Where a unit's tokens of a split are: raw integers."""
    return parts / f"unit-{unit:06d}.{split}.bin"


def _counts_file(parts: Path, unit: int) -> Path:
    return parts / f"unit-{unit:06d}.json"


def unit_done(parts: Path, unit: int) -> Counts | None:
    """The counts of a unit whose token files are complete, else None."""
    try:
        return Counts(**json.loads(_counts_file(parts, unit).read_text()))
    except (FileNotFoundError, ValueError):
        return None


def tokenise_unit(unit: int, pieces: Sequence[Piece], packing: Packing, tokenizer: Tokenizer) -> Counts:
    """Write the tokens of one unit, ``train`` and ``val`` apart; the counts file, written last, marks it as done."""
    counts = Counts()
    paths = [token_file(packing.parts, split, unit) for split in SPLITS]
    with written_whole(paths[0]) as train, written_whole(paths[1]) as val, train.open("wb") as a, val.open("wb") as b:
        for texts in _portions(documents(pieces, packing.reading), counts):
            for text, ids in zip(texts, _encode(texts, tokenizer), strict=True):
                tokens = np.array([*ids, packing.eos_id], packing.dtype)
                counts.documents += 1
                if _is_val(text, packing):
                    counts.val_documents += 1
                    counts.val_tokens += len(tokens)
                    b.write(tokens.tobytes())
                else:
                    counts.train_tokens += len(tokens)
                    a.write(tokens.tobytes())
    with written_whole(_counts_file(packing.parts, unit)) as path:
        path.write_text(json.dumps(asdict(counts)))
    return counts


def _portions(texts: Iterable[str | None], counts: Counts) -> Iterator[list[str]]:
    """The documents with text, some at a time; the others are counted."""
    portion: list[str] = []
    characters = 0
    for text in texts:
        if text is None:
            counts.undecodable += 1
        elif not text:
            counts.without_text += 1
        else:
            portion.append(text)
            characters += len(text)
            if characters >= _ENCODE_CHARS:
                yield portion
                portion, characters = [], 0
    if portion:
        yield portion


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each text; one longer than twice ``_ENCODE_CHARS`` is tokenised in parts, cut at the end of a line
    where there is one.
    """
    parts = [list(_parts(text)) for text in texts]
    encoded = iter(tokenizer.encode([part for text in parts for part in text]))
    for text in parts:
        yield [token for _ in text for token in next(encoded)]


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * _ENCODE_CHARS:
        stop = text.rfind("\n", start, start + _ENCODE_CHARS) + 1 or start + _ENCODE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _is_val(text: str, packing: Packing) -> bool:
    """By content, so that copies of one document never stand on both sides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(packing.seed).encode()).digest()
    return int.from_bytes(digest, "big") < packing.val_fraction * 2**64


def shuffled_rows(n_rows: int, seed: int) -> np.ndarray:
    """A permutation of the rows: int64 (n_rows,), from numpy's PCG64."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(n_rows)


def gather(rows: np.ndarray, files: Sequence[Path], ends: np.ndarray, row_len: int, dtype: str) -> np.ndarray:
    """Rows of the token stream, in the order asked for: int32 (len(rows), row_len).

    Args:
        rows: int64 row numbers.
        files: the units' token files, memory-mapped one after the other.
        ends: int64, tokens up to and including each file.
    """
    out = np.empty((len(rows), row_len), np.int32)
    order = np.argsort(rows)  # front to back through the files, however the rows are shuffled
    starts = rows[order] * row_len
    begins = np.concatenate([[0], ends[:-1]])
    for file, begin, end in zip(files, begins, ends, strict=True):
        first = np.searchsorted(starts, begin - row_len, side="right")
        last = np.searchsorted(starts, end, side="left")
        if first == last or begin == end:
            continue
        tokens = np.memmap(file, dtype, mode="r")
        for position, start in zip(order[first:last], starts[first:last], strict=True):
            a, b = max(start, begin), min(start + row_len, end)
            out[position, a - start : b - start] = tokens[a - begin : b - begin]
    return out


def write_shard(path: Path, tokens: np.ndarray, first_row: int) -> None:
    """Write rows as parquet in pico's schema: ``input_ids`` list<int32>, ``idx`` int64, the global row number.

    zstd decodes faster than snappy here (130 against 65 million tokens/s on one core) and is smaller.
    """
    n_rows, row_len = tokens.shape
    offsets = pa.array(np.arange(n_rows + 1, dtype=np.int32) * row_len)
    table = pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens.reshape(-1))),
            "idx": pa.array(np.arange(first_row, first_row + n_rows, dtype=np.int64)),
        }
    )
    with written_whole(path) as temporary:
        pq.write_table(table, temporary, row_group_size=_ROW_GROUP, compression="zstd", write_page_checksum=True)
