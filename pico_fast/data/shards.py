"""Finding the parquet files of a split: in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pico_fast.data.errors import DataError
from pico_fast.data.remote import RemoteFile, first_line
from pico_fast.data.splits import group_by_split, matching_split

_CONVERTED = "refs/convert/parquet"  # where the hub keeps its own parquet copy of datasets in other formats


@dataclass(frozen=True)
class Shards:
    """The parquet files of one split, in the order of their rows.

    Attributes:
        name: of the dataset, for messages.
        filesystem: an fsspec file system, or None for the local one.
        paths: as ``filesystem`` wants them.
        labels: the same files as people know them: relative to the dataset.
        revision: the commit of a hub dataset; None for local files.
    """

    name: str
    filesystem: Any
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    revision: str | None = None

    def open(self, index: int, sleep: Callable[[float], object] = time.sleep) -> Any:
        """File ``index`` for arrow to read; remote reads are repeated after transient errors, with ``sleep`` between.

        Raises one of :attr:`read_errors`, as does reading.
        """
        if self.filesystem is None:
            return pa.OSFile(self.paths[index], "rb")
        return RemoteFile(self.filesystem, self.paths[index], sleep)

    @property
    def read_errors(self) -> tuple[type[Exception], ...]:
        """What reading may raise; a remote file system raises what the network library that it is built on raises."""
        return (OSError, pa.ArrowException) if self.filesystem is None else (Exception,)

    def unreadable(self, what: str, error: Exception) -> DataError:
        """The error for the user after one of :attr:`read_errors`; ``what`` names the file and what failed."""
        local = self.filesystem is None
        advice = "it may be cut short or damaged: fetch or write it again" if local else "check the connection"
        return DataError(f"{what} ({first_line(error)}); {advice}")


def find_shards(name: str, split: str = "train", revision: str | None = None, filesystem: Any = None) -> Shards:
    """The parquet files of ``split`` of dataset ``name``.

    Args:
        name: a local folder or parquet file, or the name of a dataset on the hub.
        split: ``val``, ``valid``, ``dev`` and ``validation`` mean the same, as do ``train`` and ``training``, ...
        revision: branch, tag or commit of a hub dataset.
        filesystem: an fsspec file system in which ``name`` is a folder or file, instead of the local disk or the hub.

    Raises DataError: nothing there, no parquet, or no such split.
    """
    if filesystem is not None:
        return _in_filesystem(name, split, filesystem, revision)
    path = Path(name).expanduser()
    if path.is_file():
        return Shards(name, None, (str(path),), (path.name,))
    if path.is_dir():
        return _in_folder(name, split, path)
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(".parquet"):
        raise DataError(f"dataset {name!r}: no such file or folder (looked for {path.absolute()})")
    return _on_hub(name, split, revision)


def _in_folder(name: str, split: str, folder: Path) -> Shards:
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith((".", "__"))]
        files += [Path(parent, file).relative_to(folder).as_posix() for file in names]
    chosen = _choose(name, split, files)
    return Shards(name, None, tuple(str(folder / file) for file in chosen), tuple(chosen))


def _in_filesystem(name: str, split: str, filesystem: Any, revision: str | None) -> Shards:
    root = filesystem._strip_protocol(name).rstrip("/")
    if filesystem.isfile(root):
        return Shards(name, filesystem, (root,), (root.rsplit("/", 1)[-1],), revision)
    found = {path.removeprefix(root).lstrip("/"): path for path in filesystem.find(root)}
    chosen = _choose(name, split, list(found))
    return Shards(name, filesystem, tuple(found[file] for file in chosen), tuple(chosen), revision)


def _choose(name: str, split: str, files: Sequence[str]) -> list[str]:
    groups = group_by_split(file for file in files if file.endswith(".parquet"))
    if not groups:
        suffixes = Counter(os.path.splitext(file)[1] or "no suffix" for file in files)
        there = ", ".join(f"{n} {suffix}" for suffix, n in suffixes.most_common(5)) or "no files at all"
        arrow = "; `datasets.load_from_disk(...).to_parquet(...)` converts .arrow files" if ".arrow" in suffixes else ""
        raise DataError(
            f"dataset {name!r}: no .parquet file in it (it has {there}){arrow}; "
            "`python -m pico_fast.data.prepare` makes parquet from text"
        )
    return groups[_existing(name, split, list(groups))]


def _existing(name: str, split: str, available: Sequence[str]) -> str:
    found = matching_split(split, available)
    if found is None:
        raise DataError(f"dataset {name!r}: no split {split!r}; it has {', '.join(available)}")
    return found


def _on_hub(name: str, split: str, revision: str | None) -> Shards:
    """Files of a hub dataset, resolved by ``datasets`` (which knows the configurations in dataset cards)."""
    files = _hub_files(name, split, revision)
    if not files or not all(file.endswith(".parquet") for file in files):
        if revision is None:
            files = _hub_files(name, split, _CONVERTED, original=files)
        if not files or not all(file.endswith(".parquet") for file in files):
            example = files[0].rsplit("/", 1)[-1] if files else "nothing"
            raise DataError(
                f"dataset {name!r}, split {split!r}: its files are not parquet (such as {example}) at revision "
                f"{revision or 'main'}; convert it with `python -m pico_fast.data.prepare`, or with "
                "`datasets.load_dataset(...).to_parquet(...)`"
            )
    from huggingface_hub import HfFileSystem

    paths = sorted(file.removeprefix("hf://") for file in files)  # datasets/OWNER/NAME@COMMIT/FILE
    commit = paths[0].partition("@")[2].partition("/")[0] or revision
    labels = tuple(path.partition("@")[2].partition("/")[2] or path for path in paths)
    return Shards(name, HfFileSystem(), tuple(paths), labels, commit)


def _hub_files(name: str, split: str, revision: str | None, original: Sequence[str] = ()) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"dataset {name!r}: no such folder here ({Path(name).absolute()}), and hub datasets need the `datasets` "
            "package: `pip install datasets`"
        ) from None
    try:
        builder = datasets.load_dataset_builder(name, revision=revision)
        by_split = builder.config.data_files or {}
    except Exception as error:  # connection, authentication, unknown name, several configurations, scripts
        if original:  # there is no converted copy: the caller says what the dataset has instead
            return list(original)
        raise DataError(
            f"dataset {name!r}: no such folder here ({Path(name).absolute()}), and the hub does not give it: "
            f"{first_line(error)}; check the name, the connection, and HF_TOKEN for private datasets"
        ) from None
    return [str(file) for file in by_split[_existing(name, split, [str(s) for s in by_split])]] if by_split else []
