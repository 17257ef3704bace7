"""Row-group sizes of a hub dataset's shards, kept on disk, since a commit never changes.

Resuming at row 100 million of ten thousand shards needs five thousand footers; the hub limits how many requests one may
make. A run that resumes where it read before asks for none of them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path


class FooterCache:
    """Rows of each row group by file: JSON lines, only ever appended to, so that several processes can share the file.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._known: dict[str, tuple[int, ...]] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path is not None else []
        except (OSError, UnicodeDecodeError):
            lines = []
        for line in lines:
            self._remember(line)

    def _remember(self, line: str) -> None:
        try:
            label, sizes = json.loads(line)
            self._known[str(label)] = tuple(int(size) for size in sizes)
        except (ValueError, TypeError):  # a line that a kill cut short: that footer is read again
            return

    @classmethod
    def for_commit(cls, dataset: str, commit: str, column: str) -> FooterCache:
        """The cache of one commit of a hub dataset, in the Hugging Face home folder."""
        from huggingface_hub.constants import HF_HOME

        key = hashlib.sha256(f"{dataset}\n{commit}\n{column}".encode()).hexdigest()[:32]
        return cls(Path(HF_HOME) / "pico_fast" / f"footers-{key}.jsonl")

    def __contains__(self, label: str) -> bool:
        return label in self._known

    def __getitem__(self, label: str) -> tuple[int, ...]:
        """Rows of each row group of a file."""
        return self._known[label]

    def add(self, found: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Keep what was read. A disk that cannot be written costs only the saving."""
        new = {label: sizes for label, sizes in found if label not in self._known}
        self._known.update(new)
        if self._path is None or not new:
            return
        text = "".join(json.dumps([label, sizes]) + "\n" for label, sizes in new.items())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError:
            return
