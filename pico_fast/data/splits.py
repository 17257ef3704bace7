"""Which files of a folder belong to which split, by the rules of Hugging Face ``datasets``.

Source: ``datasets.data_files`` (SPLIT_PATTERN_SHARDED, then split names in folder names, then in file names, else all
files are ``train``). Kept here because a local folder must not cost the two seconds that importing ``datasets``
takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARDED = re.compile(r"^data/(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*$")
_SEPARATOR = r"[-._ 0-9]"


def _keyword_in(name: str) -> str | None:
    for split, keywords in _KEYWORDS.items():
        for keyword in keywords:
            if re.search(rf"(?:^|{_SEPARATOR}){keyword}(?:{_SEPARATOR}|$)", name):
                return split
    return None


def _by_shard_pattern(path: str) -> str | None:
    match = _SHARDED.match(path)
    return match["split"] if match else None


def _by_folder(path: str) -> str | None:
    return next((split for part in path.split("/")[:-1] if (split := _keyword_in(part))), None)


def _by_file_name(path: str) -> str | None:
    return _keyword_in(path.rsplit("/", 1)[-1])


def group_by_split(paths: Iterable[str]) -> dict[str, list[str]]:
    """Split name to its files, each list sorted by name.

    Args:
        paths: relative paths with forward slashes; hidden ones and those under ``__`` folders are left out.
    """
    visible = sorted(p for p in paths if not any(part.startswith((".", "__")) for part in p.split("/")))
    for rule in (_by_shard_pattern, _by_folder, _by_file_name):
        groups: dict[str, list[str]] = {}
        for path in visible:
            split = rule(path)
            if split is not None:
                groups.setdefault(split, []).append(path)
        if groups:
            return groups
    return {"train": visible} if visible else {}


def matching_split(wanted: str, available: Iterable[str]) -> str | None:
    """The available split called ``wanted``, or the one that means the same (``val`` and ``validation``), else None."""
    names = list(available)
    if wanted in names:
        return wanted
    same = next((keywords for keywords in _KEYWORDS.values() if wanted in keywords), ())
    return next((name for name in names if name in same), None)
