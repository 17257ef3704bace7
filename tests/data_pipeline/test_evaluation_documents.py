"""Documents for evaluation: columns, truncation, limits, and what is refused."""

import io

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pico_fast.config import PalomaConfig
from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.data.evaluation_documents import load_documents

ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]


class Letters:
    """A tokenizer: a is 0, b is 1, ..."""

    def encode(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]


def written(folder, columns, name="val-00000-of-00001.parquet", **options):
    pq.write_table(pa.table(columns), folder / name, **options)
    return str(folder)


def loaded(name, tokenizer=None, max_seq_len=100, vocab_size=26, filesystem=None, sleep=None, **config):
    paloma = PalomaConfig(dataset_name=name, dataset_split="val", **config)
    return load_documents(paloma, tokenizer, max_seq_len, vocab_size, filesystem=filesystem, sleep=sleep)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())])
def test_lists_of_any_length(tmp_path, kind):
    documents = loaded(written(tmp_path, {"input_ids": pa.array(ROWS, kind)}))
    assert [ids.tolist() for ids in documents] == ROWS
    assert all(ids.dtype == np.int32 for ids in documents)
    assert (len(documents), documents.truncated) == (4, 0)


def test_lists_of_one_length(tmp_path):
    documents = loaded(written(tmp_path, {"input_ids": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2))}))
    assert [ids.tolist() for ids in documents] == [[1, 2], [3, 4]]


def test_text_comes_before_ids_unless_asked(tmp_path):
    name = written(tmp_path, {"input_ids": [[1, 2, 3]], "text": ["abcz"]})
    assert [ids.tolist() for ids in loaded(name, Letters())] == [[0, 1, 2, 25]]
    assert [ids.tolist() for ids in loaded(name, Letters(), column="text")] == [[0, 1, 2, 25]]
    assert [ids.tolist() for ids in loaded(name, Letters(), column="input_ids")] == [[1, 2, 3]]
    assert [ids.tolist() for ids in loaded(name, column="input_ids")] == [[1, 2, 3]]


@pytest.mark.parametrize(("max_length", "max_seq_len"), [(3, 100), (100, 2)])
def test_long_documents_are_cut(tmp_path, max_length, max_seq_len):
    name = written(tmp_path, {"input_ids": ROWS})
    documents = loaded(name, max_length=max_length, max_seq_len=max_seq_len)
    assert [ids.tolist() for ids in documents] == [[1, 2, 3], [4], [], [5, 6, 7]]
    assert documents.truncated == 1


def test_all_files_in_order_up_to_a_limit(tmp_path):
    for file in range(3):
        written(tmp_path, {"text": [f"{'abc'[file]}{'abc'[row]}" for row in range(3)]}, f"val-{file}.parquet")
    expected = [[file, row] for file in range(3) for row in range(3)]
    assert [ids.tolist() for ids in loaded(str(tmp_path), Letters())] == expected
    assert [ids.tolist() for ids in loaded(str(tmp_path), Letters(), limit=4)] == expected[:4]
    assert [ids.tolist() for ids in loaded(str(tmp_path), Letters(), limit=99)] == expected


def test_more_rows_than_are_read_at_once(tmp_path):
    rows = [[row % 26] * (2 + row % 3) for row in range(1000)]
    name = written(tmp_path, {"input_ids": rows}, row_group_size=300)
    assert [ids.tolist() for ids in loaded(name)] == rows
    rows[700] = [3, 26]
    with pytest.raises(DataError, match="row 700 has id 26"):
        loaded(written(tmp_path, {"input_ids": rows}, row_group_size=300))


def test_another_file_system():
    memory = fsspec.filesystem("memory")
    with memory.open("/eval/data/val.parquet", "wb") as file:
        pq.write_table(pa.table({"input_ids": ROWS}), file)
    assert [ids.tolist() for ids in loaded("/eval", filesystem=memory)] == ROWS


class FlakyFileSystem(MemoryFileSystem):
    """Every second read fails, as do all after ``broken``."""

    cachable = False
    reads, broken = 0, False

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        return file if mode != "rb" else _FlakyFile(file.getvalue(), self)


class _FlakyFile(io.BytesIO):
    def __init__(self, content, filesystem):
        super().__init__(content)
        self.filesystem = filesystem

    def read(self, size=-1):
        self.filesystem.reads += 1
        if self.filesystem.reads % 2 or self.filesystem.broken:
            raise TimeoutError("late")
        return super().read(size)


def test_remote_outages_are_waited_out():
    rows, waits = np.random.default_rng(0).integers(0, 26, (1000, 200)).tolist(), []
    flaky = FlakyFileSystem()
    with flaky.open("/flaky/data/val.parquet", "wb") as file:
        pq.write_table(pa.table({"input_ids": rows}), file, row_group_size=300, use_dictionary=False)
    assert [ids.tolist() for ids in loaded("/flaky", None, 200, filesystem=flaky, sleep=waits.append)] == rows
    assert waits == [4] * len(waits)
    assert len(waits) >= 2  # the footer, and the rows in as many pieces as arrow likes
    flaky.broken = True
    with pytest.raises(DataError, match=r"val.parquet: cannot be read as parquet \(late\); check the connection"):
        loaded("/flaky", filesystem=flaky, sleep=waits.append)
    flaky.rm("/flaky", recursive=True)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"tokens": [[1, 2]]}, {}, "no column 'text' or 'input_ids' .*its columns are tokens"),
        ({"text": ["ab"]}, {"column": "input_ids"}, r"no column 'input_ids' .*column = input_ids.*; .* are text"),
        ({"text": [7]}, {}, "column 'text' is int64; strings are expected"),
        ({"input_ids": ["ab"]}, {}, "column 'input_ids' is string; lists of integers are expected"),
        ({"text": ["ab", None]}, {}, "row 1 is null"),
        ({"input_ids": [[1, 2], [3], None]}, {}, "row 2 is null"),
        ({"input_ids": [[1, 2], [], [3, None]]}, {}, "row 2 has a null among its ids"),
        ({"input_ids": [[1, 2], [3, 26]]}, {}, r"row 1 has id 26; .* less than model\.vocab_size = 26"),
        ({"input_ids": [[1, -2]]}, {}, "row 0 has id -2"),
        ({"text": ["ab", "{}"]}, {}, r"row 1 has id 26; .*data\.tokenizer\.name"),
        ({"input_ids": [[1], []]}, {}, "split 'val': none of its 2 documents has two tokens"),
        ({"text": pa.array([], pa.string())}, {}, "none of its 0 documents has two tokens"),
    ],
)
def test_bad_data_is_named(tmp_path, columns, options, message):
    with pytest.raises(DataError, match=message) as caught:
        loaded(written(tmp_path, columns), Letters(), **options)
    assert str(tmp_path) in str(caught.value)


def test_text_without_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match=r"set data\.tokenizer\.name, or evaluation\.paloma\.column: input_ids"):
        loaded(written(tmp_path, {"text": ["ab"]}))


def test_a_damaged_file(tmp_path):
    name = written(tmp_path, {"input_ids": ROWS})
    path = tmp_path / "val-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"val-00000-of-00001.parquet: cannot be read as parquet"):
        loaded(name)


def test_no_such_split(tmp_path):
    name = written(tmp_path, {"input_ids": ROWS}, "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        loaded(name)
