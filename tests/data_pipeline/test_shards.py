"""Which files belong to which split, locally and as the hub gives them."""

import sys
import types

import pytest

from pico_fast.data.shards import find_shards
from pico_fast.data.source import DataError
from pico_fast.data.splits import group_by_split


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return str(folder)


TRAIN_0, TRAIN_1, VAL = (
    f"data/{name}.parquet" for name in ("train-00000-of-00002", "train-00001-of-00002", "val-00000-of-00001")
)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([TRAIN_1, TRAIN_0, VAL], {"train": [TRAIN_0, TRAIN_1], "val": [VAL]}),
        ([TRAIN_0, "test.parquet"], {"train": [TRAIN_0]}),
        (["train2.parquet", "train.parquet"], {"train": ["train.parquet", "train2.parquet"]}),
        (["train.parquet", "val.parquet"], {"train": ["train.parquet"], "validation": ["val.parquet"]}),
        (["train/0.parquet", "train/a/1.parquet"], {"train": ["train/0.parquet", "train/a/1.parquet"]}),
        (["train/test.parquet", "dev/0.parquet"], {"train": ["train/test.parquet"], "validation": ["dev/0.parquet"]}),
        (["b.parquet", "a.parquet"], {"train": ["a.parquet", "b.parquet"]}),
        (["trainer.parquet", "contest.parquet"], {"train": ["contest.parquet", "trainer.parquet"]}),
        (["my-test_set.parquet"], {"test": ["my-test_set.parquet"]}),
        ([".hidden/train.parquet", ".parts/x.parquet", "__tmp/y.parquet", "a.parquet"], {"train": ["a.parquet"]}),
        ([], {}),
    ],
)
def test_group_by_split(files, expected):
    assert group_by_split(files) == expected


def test_same_answer_as_datasets(tmp_path):
    data_files = pytest.importorskip("datasets.data_files")
    layouts = [
        ["data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet", "other/test.parquet"],
        ["train/0.parquet", "dev/0.parquet", "train/sub/1.parquet"],
        ["train.parquet", "train2.parquet", "my-val.parquet", "eval_1.parquet"],
        ["contest.parquet", "trainer.parquet"],
    ]
    for number, layout in enumerate(layouts):
        folder = tmp_path / str(number)
        touch(folder, *layout)
        patterns = data_files.get_data_patterns(str(folder))
        theirs = data_files.DataFilesDict.from_patterns(patterns, base_path=str(folder))
        expected = {str(split): [file.split(f"/{number}/", 1)[1] for file in files] for split, files in theirs.items()}
        assert group_by_split(layout) == {split: sorted(files) for split, files in expected.items()}


def test_names_that_mean_the_same_split(tmp_path):
    name = touch(tmp_path, "data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet")
    for split in ("val", "validation", "dev"):
        assert find_shards(name, split).labels == ("data/val-00000-of-00001.parquet",)


def test_absent_split_names_what_there_is(tmp_path):
    name = touch(tmp_path, "train.parquet", "val.parquet")
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        find_shards(name, "test")


def test_one_file_is_any_split(tmp_path):
    touch(tmp_path, "rows.parquet")
    assert find_shards(str(tmp_path / "rows.parquet"), "val").labels == ("rows.parquet",)


def test_folder_without_parquet_says_what_is_in_it(tmp_path):
    with pytest.raises(DataError, match="no files at all"):
        find_shards(str(tmp_path))
    touch(tmp_path, "a.arrow", "b.arrow", "state.json")
    with pytest.raises(DataError, match=r"no \.parquet file in it \(it has 2 \.arrow, 1 \.json\).*load_from_disk"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "rows.parquet"])
def test_absent_paths_are_not_looked_up_on_the_hub(name):
    with pytest.raises(DataError, match="no such file or folder"):
        find_shards(name)


class Hub:
    """Stands in for ``datasets.load_dataset_builder``: revision to data files, or an exception."""

    def __init__(self, monkeypatch, revisions):
        self.revisions, self.asked = revisions, []
        module = types.ModuleType("datasets")
        module.load_dataset_builder = self.load
        monkeypatch.setitem(sys.modules, "datasets", module)

    def load(self, name, revision=None):
        self.asked.append(revision)
        files = self.revisions[revision]
        if isinstance(files, Exception):
            raise files
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=files))


def test_hub_files_commit_and_labels(monkeypatch):
    base = "hf://datasets/owner/name@0123abcd/data"
    Hub(monkeypatch, {"v1": {"train": [f"{base}/train-1.parquet", f"{base}/train-0.parquet"], "val": []}})
    shards = find_shards("owner/name", "train", revision="v1")
    assert shards.revision == "0123abcd"
    assert shards.labels == ("data/train-0.parquet", "data/train-1.parquet")
    assert shards.paths[0] == "datasets/owner/name@0123abcd/data/train-0.parquet"


def test_hub_dataset_in_another_format_uses_the_converted_copy(monkeypatch):
    json = {"train": ["hf://datasets/owner/name@0123/train.jsonl"]}
    converted = {"train": ["hf://datasets/owner/name@4567/default/train/0000.parquet"]}
    hub = Hub(monkeypatch, {None: json, "refs/convert/parquet": converted})
    assert find_shards("owner/name").labels == ("default/train/0000.parquet",)
    assert hub.asked == [None, "refs/convert/parquet"]


def test_hub_dataset_without_parquet_says_so(monkeypatch):
    json = {"train": ["hf://datasets/owner/name@0123/train.jsonl"]}
    Hub(monkeypatch, {None: json, "v1": json, "refs/convert/parquet": OSError("no such revision")})
    for revision in (None, "v1"):
        with pytest.raises(DataError, match=r"not parquet \(such as train.jsonl\)"):
            find_shards("owner/name", revision=revision)


def test_unreachable_hub_names_both_places(monkeypatch):
    Hub(monkeypatch, {None: ConnectionError("Couldn't reach the hub\nlong trace")})
    with pytest.raises(DataError, match=r"no such folder here .*Couldn't reach the hub; check the name.*HF_TOKEN"):
        find_shards("owner/name")


def test_missing_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        find_shards("owner/name")
