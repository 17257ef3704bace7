"""Rows by global number: every list type, windows and row groups, bad input by name, and how much is read remotely."""

import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pico_fast.data import source
from pico_fast.data.footers import FooterCache
from pico_fast.data.shards import find_shards
from pico_fast.data.source import DataError, TokenRows, open_rows


def lists(array, kind=None):
    kind = kind or pa.list_(pa.int32())
    return pa.array([row.tolist() if row is not None else None for row in array], kind)


def write(path, column, row_group_size=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"input_ids": column, "idx": np.arange(len(column))})
    pq.write_table(table, path, row_group_size=row_group_size, **options)


def shards(folder, ids, sizes, row_group_size=4):
    start = 0
    for number, size in enumerate(sizes):
        path = folder / "data" / f"train-{number:05d}-of-{len(sizes):05d}.parquet"
        write(path, lists(ids[start : start + size]), row_group_size)
        start += size
    return str(folder)


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 1000, (50, 9)).astype(np.int32)


def test_any_range_in_any_order(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(source, "_WINDOW_ROWS", 3)  # not a divisor of the row groups
    rows = open_rows(shards(tmp_path, ids, [7, 0, 1, 22, 20]), row_len=9, vocab_size=1000)
    assert (rows.n_rows, rows.row_len) == (50, 9)
    generator = np.random.default_rng(1)
    for _ in range(200):
        start, stop = sorted(generator.integers(0, 51, 2))
        read = rows.read(start, stop)
        assert read.dtype == np.int32
        np.testing.assert_array_equal(read, ids[start:stop])
    rows.close()
    np.testing.assert_array_equal(rows.read(3, 30), ids[3:30])  # reading opens again


def test_read_into_an_array(tmp_path, ids):
    rows = open_rows(shards(tmp_path, ids, [50]))
    out = np.full((4, 9), -1, np.int32)
    assert rows.read(10, 14, out) is out
    np.testing.assert_array_equal(out, ids[10:14])


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int64()),
        pa.list_(pa.uint16()),
        pa.list_(pa.int16()),
        pa.list_(pa.uint64()),
        pa.large_list(pa.int32()),
        pa.list_(pa.uint32(), 9),
        pa.list_(pa.int32(), 9),
    ],
    ids=str,
)
def test_every_list_of_integers(tmp_path, ids, kind):
    write(tmp_path / "a.parquet", lists(ids, kind), 8)
    rows = open_rows(str(tmp_path), row_len=9, vocab_size=1000)
    np.testing.assert_array_equal(rows.read(0, 50), ids)
    assert rows.read(5, 6).dtype == np.int32


def test_other_column_and_split(tmp_path, ids):
    pq.write_table(pa.table({"tokens": lists(ids[:5])}), tmp_path / "val.parquet")
    rows = open_rows(str(tmp_path), split="val", column="tokens")
    np.testing.assert_array_equal(rows.read(0, 5), ids[:5])


def test_rows_that_are_not_there(tmp_path, ids):
    rows = open_rows(shards(tmp_path, ids, [50]))
    assert rows.has(49)
    assert not rows.has(50)
    assert not rows.has(-1)
    for start, stop in [(49, 51), (-1, 2), (3, 2)]:
        with pytest.raises(IndexError, match="which has 50"):
            rows.read(start, stop)
    assert rows.read(50, 50).shape == (0, 9)


def bad_rows(ids, row, value):
    changed = list(ids)
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (np.arange(8), "has 8 ids, 9 expected"),
        (np.arange(10), "has 10 ids, 9 expected"),
        (np.arange(0), "has 0 ids, 9 expected"),
        (None, "is null"),
        (np.full(9, 1000), "has id 1000 at position 0; .* less than vocab_size = 1000"),
        (np.array([1, 2, -5, 0, 0, 0, 0, 0, 0]), "has id -5 at position 2"),
    ],
)
@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64())], ids=str)
def test_bad_rows_are_named(tmp_path, ids, row, message, kind):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", lists(ids[:20], kind), 4)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", lists(bad_rows(ids[20:], 13, row), kind), 4)
    rows = open_rows(str(tmp_path), row_len=9, vocab_size=1000)
    np.testing.assert_array_equal(rows.read(0, 32), ids[:32])
    with pytest.raises(DataError, match=rf"data/train-00001-of-00002.parquet: row 13 \(global row 33\) {message}"):
        rows.read(32, 34)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.list_(pa.int32(), 9)], ids=str)
def test_null_id_is_named(tmp_path, ids, kind):
    values = ids[:8].tolist()
    values[6][3] = None
    write(tmp_path / "a.parquet", pa.array(values, kind))
    with pytest.raises(DataError, match=r"a.parquet: row 6 \(global row 6\) has a null at position 3"):
        open_rows(str(tmp_path))


def test_null_row_in_fixed_size_lists(tmp_path, ids):
    write(tmp_path / "a.parquet", lists(bad_rows(ids, 2, None), pa.list_(pa.int32(), 9)))
    with pytest.raises(DataError, match=r"row 2 \(global row 2\) is null"):
        open_rows(str(tmp_path))


def test_wrong_length_shows_at_once(tmp_path, ids):
    with pytest.raises(DataError, match=r"row 0 \(global row 0\) has 9 ids, 17 expected .*max_seq_len \+ 1"):
        open_rows(shards(tmp_path, ids, [50]), row_len=17)


def test_ids_beyond_32_bits(tmp_path):
    write(tmp_path / "a.parquet", pa.array([[1, 2**31]], pa.list_(pa.int64())))
    with pytest.raises(DataError, match=r"has id 2147483648 at position 1; .* less than 2\*\*31"):
        open_rows(str(tmp_path))


def test_rows_too_short_to_train_on(tmp_path):
    write(tmp_path / "a.parquet", pa.array([[1], [2]], pa.list_(pa.int32())))
    with pytest.raises(DataError, match="at least 2 are needed"):
        open_rows(str(tmp_path))


def test_missing_column_lists_the_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "source": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'input_ids'; its columns are text, source"):
        open_rows(str(tmp_path))


@pytest.mark.parametrize("values", [["text"], [[1.5]], [3], [[["a"]]]])
def test_column_of_another_type(tmp_path, values):
    write(tmp_path / "a.parquet", pa.array(values))
    with pytest.raises(DataError, match=r"a\.parquet: column 'input_ids' is .*; lists of integers are expected"):
        open_rows(str(tmp_path))


def test_no_rows(tmp_path, ids):
    with pytest.raises(DataError, match=r"its 2 parquet file\(s\) hold no rows"):
        open_rows(shards(tmp_path, ids[:0], [0, 0]))


def test_damaged_files_are_named(tmp_path, ids):
    name = shards(tmp_path, ids, [20, 30])
    second = tmp_path / "data" / "train-00001-of-00002.parquet"
    whole = second.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"", b"not parquet at all"):
        second.write_bytes(damaged)
        rows = open_rows(name)
        np.testing.assert_array_equal(rows.read(0, 20), ids[:20])
        with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: not a readable parquet file"):
            rows.read(15, 25)


def test_damaged_page_is_named(tmp_path, ids):
    write(tmp_path / "a.parquet", lists(ids), 25, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0)
    content[column.data_page_offset + column.total_compressed_size - 7] ^= 1  # one bit of one id
    (tmp_path / "a.parquet").write_bytes(content)
    rows = open_rows(str(tmp_path), vocab_size=1000)
    np.testing.assert_array_equal(rows.read(0, 25), ids[:25])
    with pytest.raises(DataError, match=r"a.parquet: row 30 \(global row 30\) cannot be read .*CRC"):
        rows.read(30, 31)


def test_fingerprint_follows_the_data_not_the_place(tmp_path, ids):
    prints = {
        "same": open_rows(shards(tmp_path / "a", ids, [20, 30])).fingerprint(),
        "moved": open_rows(shards(tmp_path / "b", ids, [20, 30])).fingerprint(),
        "other shards": open_rows(shards(tmp_path / "c", ids, [30, 20])).fingerprint(),
        "fewer rows": open_rows(shards(tmp_path / "d", ids, [20, 29])).fingerprint(),
    }
    assert prints["same"] == prints.pop("moved")
    assert len(set(prints.values())) == len(prints)


class CountingFileSystem(MemoryFileSystem):
    """Memory as if it were remote: counts opened files and bytes read, by path."""

    protocol = "counting"
    cachable = False
    store: dict = {}  # noqa: RUF012 (as in fsspec)
    pseudo_dirs = [""]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.opened, self.bytes, self.lock = {}, 0, threading.Lock()

    def _open(self, path, mode="rb", **options):
        assert options.get("cache_type") == "none" or mode != "rb"
        file = super()._open(path, mode)
        if mode != "rb":
            return file
        with self.lock:
            self.opened[path] = self.opened.get(path, 0) + 1
        return _CountingFile(file.getvalue(), self)


class _CountingFile(fsspec.implementations.memory.BytesIO):
    def __init__(self, content, counter):
        super().__init__(content)
        self.counter = counter

    def read(self, size=-1):
        data = super().read(size)
        with self.counter.lock:
            self.counter.bytes += len(data)
        return data


@pytest.fixture
def remote(tmp_path):
    """120 shards of 10 rows in a remote folder; row i starts with i."""
    filesystem = CountingFileSystem()
    ids = np.random.default_rng(0).integers(0, 10_000, (1200, 2000)).astype(np.int32)
    ids[:, 0] = np.arange(1200)
    for number in range(120):
        table = pa.table({"input_ids": lists(ids[number * 10 : number * 10 + 10]), "idx": np.arange(10)})
        with filesystem.open(f"/repo/data/train-{number:05d}-of-00120.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=5)
    return filesystem, ids


def test_remote_reads_only_the_footers_and_rows_it_needs(remote):
    filesystem, ids = remote
    rows = open_rows("/repo", row_len=2000, filesystem=filesystem)
    assert len(filesystem.opened) == 1
    np.testing.assert_array_equal(rows.read(0, 25), ids[:25])
    assert len(filesystem.opened) == 3
    assert rows.n_rows_known is None
    filesystem.bytes = 0
    # a resume: the footers of shards 3 to 60 (arrow reads 64 KB for one), then one row group of five
    np.testing.assert_array_equal(rows.read(605, 608), ids[605:608])
    assert len(filesystem.opened) == 61
    row_group = 5 * 2000 * 4
    assert filesystem.bytes < (58 + 1) * 2**16 + 1.1 * row_group
    assert rows.n_rows == rows.n_rows_known == 1200
    assert max(filesystem.opened.values()) <= 2  # a footer, and once for the rows


def test_remote_batches_never_ask_for_the_total(remote):
    from pico_fast.data.stream import BatchStream

    filesystem, _ = remote
    rows = open_rows("/repo", filesystem=filesystem)
    with BatchStream(rows, batch_size=8, micro_batches=2, rank=1, world_size=2, start_step=3, prefetch=1) as stream:
        batch = next(stream).numpy()
    np.testing.assert_array_equal(batch[:, :, 0], [[26, 27], [30, 31]])
    assert len(filesystem.opened) < 8


def test_remote_failure_is_named(remote):
    filesystem, _ = remote
    rows = open_rows("/repo", filesystem=filesystem)

    def broken(*_, **__):
        raise RuntimeError("connection lost\nlong trace")  # the network library's own, not an OSError

    filesystem._open = broken
    with pytest.raises(
        DataError, match=r"/repo: data/train-00001-of-00120.parquet: .*connection lost\); check the connection"
    ):
        rows.read(10, 11)


def flaky(filesystem, failures):
    """Make the file system raise the next of ``failures`` (None: go well) whenever a file is opened or read."""
    open_file = filesystem._open

    def fail():
        error = failures.pop(0) if failures else None
        if error is not None:
            raise error

    def opened(path, mode="rb", **options):
        fail()
        file = open_file(path, mode, **options)
        read = file.read
        file.read = lambda size=-1: (fail(), read(size))[1]
        return file

    filesystem._open = opened


def test_remote_outages_are_waited_out(remote):
    filesystem, ids = remote
    outage, waits = [OSError("reset"), TimeoutError(), None, ConnectionError("refused")], []
    failures = [*outage]
    flaky(filesystem, failures)
    rows = open_rows("/repo", filesystem=filesystem, sleep=waits.append)  # footer and first rows
    assert waits == [4, 8, 4]  # opened at the third try, cut off at the first read, then well
    for start in range(0, 60, 7):  # any read: footers, row groups just opened, row groups half read
        failures[:] = [*[None] * (start % 4), *outage]
        np.testing.assert_array_equal(rows.read(start, start + 7), ids[start : start + 7])
    assert not failures
    assert len(waits) > 3 * 3


def test_remote_outages_end_after_about_a_minute(remote):
    filesystem, ids = remote
    waits, failures = [], []
    flaky(filesystem, failures)
    rows = open_rows("/repo", filesystem=filesystem, sleep=waits.append)
    failures[:] = [OSError(f"outage {number}") for number in range(1, 6)]
    with pytest.raises(DataError, match=r"train-00001-of-00120.parquet: .*\(outage 5\); check the connection"):
        rows.read(10, 12)
    assert (len(waits), sum(waits)) == (4, 60)
    np.testing.assert_array_equal(rows.read(10, 12), ids[10:12])  # and one may go on afterwards


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no")])
def test_what_lasts_is_not_tried_again(remote, error):
    filesystem, _ = remote
    failures = []
    flaky(filesystem, failures)
    rows = open_rows("/repo", filesystem=filesystem, sleep=lambda _: pytest.fail("waited"))
    failures.append(error)
    with pytest.raises(DataError, match=str(error)):
        rows.read(10, 12)


def test_local_files_are_not_tried_again(tmp_path, ids):
    name = shards(tmp_path, ids, [20, 20])
    rows = open_rows(name, sleep=lambda _: pytest.fail("waited"))
    (tmp_path / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        rows.read(20, 21)


def test_remote_single_file_and_missing_folder(remote):
    filesystem, ids = remote
    rows = open_rows("/repo/data/train-00002-of-00120.parquet", filesystem=filesystem)
    np.testing.assert_array_equal(rows.read(0, 10), ids[20:30])
    with pytest.raises(DataError, match="no files at all"):
        open_rows("/nothing", filesystem=filesystem)


def test_footers_are_kept_on_disk(remote, tmp_path):
    filesystem, ids = remote
    shards = find_shards("/repo", filesystem=filesystem)
    kept = tmp_path / "home" / "footers.jsonl"
    first = TokenRows(shards, footers=FooterCache(kept))
    first.read(605, 608)
    with kept.open("a") as file:
        file.write('["data/train-00099-of-00120.parquet", [5')  # a kill in the middle of a line
    filesystem.opened.clear()
    again = TokenRows(shards, footers=FooterCache(kept))
    np.testing.assert_array_equal(again.read(605, 608), ids[605:608])
    assert sorted(filesystem.opened) == [shards.paths[0], shards.paths[60]]  # the check of the first row, and the rows
    assert again.n_rows == 1200


def test_footer_cache_that_cannot_be_written_is_no_error(remote, tmp_path):
    filesystem, ids = remote
    (tmp_path / "file").write_text("")
    rows = TokenRows(find_shards("/repo", filesystem=filesystem), footers=FooterCache(tmp_path / "file" / "footers"))
    np.testing.assert_array_equal(rows.read(0, 30), ids[:30])
