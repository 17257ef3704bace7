"""Batches: the global order for every layout and resume point, prefetching, errors and ending."""

import gc
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pico_fast.data import source
from pico_fast.data.source import DataError, open_rows
from pico_fast.data.stream import BatchStream, row_indices

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def write_rows(folder, shard_sizes, row_group_size):
    """Rows of 3 ids, [number, 2 * number, 7], spread over shards."""
    folder.mkdir(parents=True)
    first = 0
    for shard, size in enumerate(shard_sizes):
        numbers = np.arange(first, first + size)
        values = np.stack([numbers, 2 * numbers, np.full(size, 7)], axis=1).tolist()
        table = pa.table({"input_ids": pa.array(values, pa.list_(pa.int32()))})
        pq.write_table(table, folder / f"train-{shard:03d}.parquet", row_group_size=row_group_size)
        first += size
    return str(folder)


@st.composite
def layouts(draw):
    micro_batches, world_size, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any))
    return {
        "micro_batches": micro_batches,
        "world_size": world_size,
        "batch_size": micro_batches * world_size * per_rank,
        "shard_sizes": sizes,
        "row_group_size": draw(st.integers(1, 40)),
        "window": draw(st.integers(1, 16)),
        "start_step": draw(st.integers(0, 40)),
        "prefetch": draw(st.integers(1, 3)),
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts())
def test_rows_depend_on_step_and_batch_size_alone(layout, tmp_path_factory):
    name = write_rows(tmp_path_factory.mktemp("d") / "rows", layout["shard_sizes"], layout["row_group_size"])
    n_rows, batch, start = sum(layout["shard_sizes"]), layout["batch_size"], layout["start_step"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_WINDOW_ROWS", layout["window"])
        for rank in range(layout["world_size"]):
            arguments = {key: layout[key] for key in ("batch_size", "micro_batches", "world_size")}
            stream = BatchStream(open_rows(name), rank=rank, start_step=start, prefetch=layout["prefetch"], **arguments)
            with stream:
                mine = [next(stream) for _ in range(3)]
            for step, given_batch in enumerate(mine, start):
                assert given_batch.dtype == torch.int32
                expected = row_indices(step, n_rows, rank=rank, **arguments)
                assert tuple(given_batch.shape) == (*expected.shape, 3)
                np.testing.assert_array_equal(given_batch[..., 0], expected)
                np.testing.assert_array_equal(given_batch[..., 1], 2 * expected)
            seen.append(torch.stack(mine).numpy())
    # ranks side by side within each micro-batch are the rows in global order: the specification itself
    together = np.stack(seen, axis=2)[..., 0].reshape(3, batch)
    expected = (np.arange(start * batch, (start + 3) * batch) % n_rows).reshape(3, batch)
    np.testing.assert_array_equal(together, expected)


def test_row_indices_by_hand():
    arguments = {"batch_size": 8, "micro_batches": 2, "world_size": 2}
    np.testing.assert_array_equal(row_indices(0, 100, rank=0, **arguments), [[0, 1], [4, 5]])
    np.testing.assert_array_equal(row_indices(0, 100, rank=1, **arguments), [[2, 3], [6, 7]])
    np.testing.assert_array_equal(row_indices(1, 11, rank=1, **arguments), [[10, 0], [3, 4]])


def test_golden_batches():
    rows = open_rows(str(GOLDEN / "train"), row_len=129)
    stored = np.concatenate(
        [
            np.stack(pq.read_table(file)["input_ids"].to_numpy())
            for file in sorted((GOLDEN / "train" / "data").iterdir())
        ]
    )
    with BatchStream(rows, batch_size=8, micro_batches=4) as stream:
        for step in range(6):
            np.testing.assert_array_equal(next(stream).numpy().reshape(8, 129), stored[8 * step : 8 * step + 8])


def bad_shard(folder):
    name = write_rows(folder, [10, 10], 4)
    table = pa.table({"input_ids": pa.array([[1, 2, 3], [1, 2]], pa.list_(pa.int32()))})
    pq.write_table(table, folder / "train-001.parquet")
    return name


def test_errors_come_after_the_good_batches_and_stay(tmp_path):
    with BatchStream(open_rows(bad_shard(tmp_path / "d")), batch_size=5, micro_batches=1, prefetch=3) as stream:
        assert [int(next(stream)[0, 0, 0]) for _ in range(2)] == [0, 5]
        for _ in range(2):
            with pytest.raises(DataError, match=r"train-001.parquet: row 1 \(global row 11\) has 2 ids, 3 expected"):
                next(stream)


def test_prefetches_no_more_than_asked(tmp_path):
    rows = open_rows(write_rows(tmp_path / "d", [100], 10))
    reads = []
    read = rows.read
    rows.read = lambda start, stop, out=None: (reads.append(start), read(start, stop, out))[1]
    with BatchStream(rows, batch_size=4, micro_batches=1, prefetch=3) as stream:
        next(stream)
        deadline = time.monotonic() + 5
        while len(reads) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert reads == [0, 4, 8, 12]


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "pico-fast-data"]


def test_close_ends_the_thread_and_the_iteration(tmp_path):
    stream = BatchStream(open_rows(write_rows(tmp_path / "d", [20], 5)), batch_size=2, micro_batches=1)
    thread = stream._thread
    next(stream)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 2
    assert not thread.is_alive()
    assert list(stream) == []
    stream.close()


def test_dropping_the_stream_ends_the_thread(tmp_path):
    stream = BatchStream(open_rows(write_rows(tmp_path / "d", [20], 5)), batch_size=2, micro_batches=1)
    thread = stream._thread
    assert thread.daemon
    next(stream)
    del stream
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_consumer_waiting_in_another_thread_is_released_by_close(tmp_path):
    rows = open_rows(write_rows(tmp_path / "d", [20], 5))
    release = threading.Event()
    rows.read = lambda *_: release.wait(10)  # a read that hangs
    stream = BatchStream(rows, batch_size=2, micro_batches=1)
    ended = []
    consumer = threading.Thread(target=lambda: ended.append(list(stream)))
    consumer.start()
    stream._finalizer()
    consumer.join(timeout=5)
    assert ended == [[]]
    release.set()
    stream.close()


def test_a_hanging_read_does_not_hold_up_the_stop(tmp_path):
    rows = open_rows(write_rows(tmp_path / "d", [20], 5))
    release, stop, read = threading.Event(), threading.Event(), rows.read
    rows.read = lambda start, end, out: read(start, end, out) if start < 4 else release.wait(10)
    stream = BatchStream(rows, batch_size=2, micro_batches=1, should_stop=stop.is_set)
    assert [int(next(stream)[0, 0, 0]) for _ in range(2)] == [0, 2]
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    with pytest.raises(StopIteration):
        next(stream)
    assert 0.2 < time.monotonic() - started < 3
    release.set()
    assert list(stream) == []  # it stays over, whatever arrives afterwards
    stream.close()


def test_ready_batches_and_errors_come_before_the_stop(tmp_path):
    rows = open_rows(bad_shard(tmp_path / "d"))
    with BatchStream(rows, batch_size=10, micro_batches=1, should_stop=lambda: True) as stream:
        stream._thread.join(timeout=10)  # the first batch is ready, the second has failed
        assert next(stream).shape == (1, 10, 3)
        with pytest.raises(DataError, match="has 2 ids"):
            next(stream)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 6, "micro_batches": 4},
        {"batch_size": 8, "micro_batches": 2, "world_size": 3},
        {"batch_size": 8, "micro_batches": 2, "world_size": 2, "rank": 2},
        {"batch_size": 0, "micro_batches": 1},
        {"batch_size": 8, "micro_batches": 1, "start_step": -1},
        {"batch_size": 8, "micro_batches": 1, "prefetch": 0},
    ],
)
def test_impossible_layouts_are_refused(tmp_path, arguments):
    rows = open_rows(write_rows(tmp_path / "d", [20], 5))
    before = len(data_threads())
    with pytest.raises(ValueError, match=r"must be at least|is not a multiple"):
        BatchStream(rows, **arguments)
    assert len(data_threads()) == before


def test_pinned_memory_is_asked_for(tmp_path, monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory, **kwargs: (asked.append(pin_memory), empty(*size, **kwargs))[1]
    )
    rows = open_rows(write_rows(tmp_path / "d", [20], 5))
    for pin in (True, False):
        with BatchStream(rows, batch_size=2, micro_batches=1, prefetch=1, pin_memory=pin) as stream:
            next(stream)
        assert asked[-1] is pin
