"""Make a dataset for training from text: ``python -m pico_fast.data.prepare INPUT... --tokenizer NAME --out FOLDER``.

Documents are tokenised, each followed by the end-of-text token, packed into rows of ``max_seq_len + 1`` ids, shuffled
by row and written as parquet in pico's schema (``data/train-00000-of-00010.parquet``, ``data/val-...``). Documents
are divided into ``train`` and ``val`` by a hash of their text. The same inputs and settings give the same bytes, with
any number of workers and after any interruption: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pico_fast.data.documents import Input, Piece, Reading, find_inputs, work_units
from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.data.packing import (
    SPLITS,
    Counts,
    Packing,
    gather,
    shuffled_rows,
    token_file,
    tokenise_unit,
    unit_done,
    write_shard,
    written_whole,
)
from pico_fast.data.tokenizer import Tokenizer, load_tokenizer
from pico_fast.data.workers import run_tasks, worker_count

_RECORD = "prepare.json"  # in the output folder: the settings it was made with and, once complete, the summary


@dataclass(frozen=True)
class PrepareSettings:
    """What is made of what; see the command's ``--help``."""

    inputs: tuple[str, ...]
    tokenizer: str
    out: str
    max_seq_len: int = 2048
    text_column: str = "text"
    val_fraction: float = 0.01
    seed: int = 42
    rows_per_shard: int = 20480
    eos: str | None = None
    include: tuple[str, ...] = ()
    separator: str | None = None
    skip_undecodable: bool = False

    def __post_init__(self) -> None:
        """Raises DataError for values out of bounds."""
        if self.max_seq_len < 1 or self.rows_per_shard < 1:
            raise DataError(
                f"max_seq_len {self.max_seq_len} and rows_per_shard {self.rows_per_shard} must be at least 1"
            )
        if self.rows_per_shard * (self.max_seq_len + 1) >= 2**31:
            raise DataError(
                f"rows_per_shard {self.rows_per_shard} of max_seq_len {self.max_seq_len}: a shard may hold at most "
                "2**31 ids; give fewer rows"
            )
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"val_fraction {self.val_fraction} must be at least 0 and less than 1")
        if not 0 <= self.seed < 2**64:
            raise DataError(f"seed {self.seed} must be at least 0 and less than 2**64")
        if self.separator == "":
            raise DataError("separator: an empty string separates nothing")


@dataclass(frozen=True)
class Summary:
    """What was made.

    Attributes:
        counts: of documents and tokens.
        rows, shards, dropped_tokens: by split; dropped are the tokens at the end that fill no row.
        folder: where the parquet files are.
        fresh: False if an earlier run had made it.
    """

    counts: Counts
    rows: dict[str, int]
    shards: dict[str, int]
    dropped_tokens: dict[str, int]
    folder: str
    fresh: bool = True

    def __str__(self) -> str:
        c = self.counts
        lines = [
            f"{c.documents:,} documents ({c.val_documents:,} for val), {c.train_tokens + c.val_tokens:,} tokens",
            *(
                f"{split}: {self.rows[split]:,} rows in {self.shards[split]:,} shard(s); "
                f"{self.dropped_tokens[split]:,} tokens at the end fill no row"
                for split in SPLITS
            ),
        ]
        if c.without_text:
            lines.append(f"{c.without_text:,} documents without text left out")
        if c.undecodable:
            lines.append(f"{c.undecodable:,} documents that are not UTF-8 left out")
        if not self.rows["val"]:
            lines.append("no val split: too few documents fell into it; a larger --val-fraction makes one")
        return "\n".join([*lines, f"{'written to' if self.fresh else 'already complete in'} {self.folder}"])


def prepare(
    settings: PrepareSettings, *, workers: int | None = None, overwrite: bool = False, progress: bool = True
) -> Summary:
    """Make the dataset, or go on with one that was interrupted, or find it complete.

    What an unfinished run left is discarded if the inputs changed since, and the settings did not.

    Args:
        workers: processes; None: one per usable core.
        overwrite: replace what another run with other settings left in the output folder.
        progress: show bars, if standard error is a terminal.

    Raises DataError, TokenizerError: bad settings or input, or an output folder with something else in it.
    """
    workers = worker_count(workers)
    out = Path(settings.out)
    tokenizer = load_tokenizer(settings.tokenizer)
    eos_id = _eos_id(tokenizer, settings.eos)
    reading = Reading(settings.text_column, settings.separator, settings.skip_undecodable)
    inputs = find_inputs(settings.inputs, settings.include, exclude_under=out)
    record = _record(settings, inputs, tokenizer, eos_id)
    complete = _enter(out, record, overwrite)
    if complete is not None:
        return complete
    dtype = "uint16" if max(tokenizer.vocab_size, eos_id + 1) <= 2**16 else "uint32"
    packing = Packing(out / ".parts", reading, eos_id, dtype, settings.val_fraction, settings.seed)
    per_unit = _tokenise(work_units(inputs, reading), packing, tokenizer, workers, progress)
    summary = _write(per_unit, packing, settings, out, workers, progress)
    _save_record(out, {**record, "summary": asdict(summary)})
    shutil.rmtree(packing.parts)
    return summary


def _eos_id(tokenizer: Tokenizer, token: str | None) -> int:
    eos_id = tokenizer.eos_id if token is None else tokenizer.token_to_id(token)
    if eos_id is None and token is None:
        raise TokenizerError(
            f"tokenizer {tokenizer.name!r} names no end-of-text token", "give one of its tokens with --eos"
        )
    if eos_id is None:
        raise TokenizerError(
            f"tokenizer {tokenizer.name!r} has no token {token!r}", "give one of its tokens with --eos"
        )
    return eos_id


def _record(settings: PrepareSettings, inputs: Sequence[Input], tokenizer: Tokenizer, eos_id: int) -> dict[str, Any]:
    """All that decides the bytes of the output, plus names for people."""
    digest = hashlib.sha256(json.dumps([(i.label, i.size, i.mtime_ns) for i in inputs]).encode()).hexdigest()[:16]
    values = asdict(settings)
    for name in ("inputs", "tokenizer", "out", "eos", "include"):  # their meaning is in the values below
        del values[name]
    return {
        "settings": {
            "inputs": f"{len(inputs)} files, {sum(i.size for i in inputs)} bytes, digest {digest}",
            "tokenizer": f"{settings.tokenizer} (vocabulary {tokenizer.vocab_size}, {tokenizer.fingerprint()})",
            "eos_id": eos_id,
            **values,
        },
        "summary": None,
    }


def _enter(out: Path, record: dict[str, Any], overwrite: bool) -> Summary | None:
    """Make the output folder ready; the summary if it is complete already."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    files = [file for split in SPLITS for file in (out / "data").glob(f"{split}-?????-of-?????.parquet")]
    if overwrite:
        _discard(out, files)
    elif (out / _RECORD).exists():
        earlier = _read_record(out)
        before, now = earlier["settings"], record["settings"]
        differing = {
            key: f"{key}: {before.get(key)} then, {now[key]} now" for key in now if before.get(key) != now[key]
        }
        if earlier["summary"] is None and list(differing) == ["inputs"]:
            print(f"{out}: the inputs changed since the unfinished run there; starting again", file=sys.stderr)
            _discard(out, files)
        elif differing:
            raise DataError(
                f"{out} was made with other settings ({'; '.join(differing.values())}); give another --out, or "
                "--overwrite"
            )
        elif earlier["summary"] is not None and len(files) == sum(earlier["summary"]["shards"].values()):
            values = {**earlier["summary"], "fresh": False}
            return Summary(**{**values, "counts": Counts(**values["counts"])})
    elif files:
        raise DataError(f"{out / 'data'} holds parquet files of unknown origin; give another --out, or --overwrite")
    _save_record(out, record)
    (out / ".parts").mkdir(exist_ok=True)
    return None


def _discard(out: Path, files: Sequence[Path]) -> None:
    """Remove what earlier runs left; the record goes last, for without it ``files`` would be of unknown origin."""
    if (out / ".parts").exists():
        shutil.rmtree(out / ".parts")  # an error is no light matter: the next run would take stale parts for its own
    for file in [*files, out / _RECORD]:
        file.unlink(missing_ok=True)


def _read_record(out: Path) -> dict[str, Any]:
    try:
        record = json.loads((out / _RECORD).read_text(encoding="utf-8"))
        return {"settings": dict(record["settings"]), "summary": record["summary"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / _RECORD} is damaged ({error}); give another --out, or --overwrite") from None


def _save_record(out: Path, record: dict[str, Any]) -> None:
    with written_whole(out / _RECORD) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _tokenise(
    units: Sequence[Sequence[Piece]], packing: Packing, tokenizer: Tokenizer, workers: int, progress: bool
) -> list[Counts]:
    """Counts of every unit, in order; units that an earlier run finished are taken from there."""
    done = {unit: counts for unit in range(len(units)) if (counts := unit_done(packing.parts, unit)) is not None}
    key = tokenizer.name, tokenizer.fingerprint()
    tasks = [(unit, pieces, packing, *key) for unit, pieces in enumerate(units) if unit not in done]
    with _bar("tokenise", "unit", len(units), len(done), progress) as bar:
        for unit, counts in run_tasks(_tokenise_one, tasks, workers):
            done[unit] = counts
            bar.update()
    return [done[unit] for unit in range(len(units))]


@functools.lru_cache(maxsize=1)  # once per worker process
def _loaded(name: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(name)
    if tokenizer.fingerprint() != fingerprint:
        raise TokenizerError(f"tokenizer {name!r} changed while it was in use", "start again with --overwrite")
    return tokenizer


def _tokenise_one(
    unit: int, pieces: Sequence[Piece], packing: Packing, name: str, fingerprint: str
) -> tuple[int, Counts]:
    return unit, tokenise_unit(unit, pieces, packing, _loaded(name, fingerprint))


def _write(
    per_unit: Sequence[Counts], packing: Packing, settings: PrepareSettings, out: Path, workers: int, progress: bool
) -> Summary:
    """Shuffle the rows and write the shards that are not there yet."""
    row_len = settings.max_seq_len + 1
    rows, shards, dropped, tasks = {}, {}, {}, []
    total = Counts()
    for counts in per_unit:
        total.add(counts)
    for split in SPLITS:
        tokens = [getattr(counts, f"{split}_tokens") for counts in per_unit]
        ends = np.cumsum(tokens, dtype=np.int64)
        rows[split], dropped[split] = divmod(sum(tokens), row_len)
        shards[split] = -(-rows[split] // settings.rows_per_shard)
        files = [token_file(packing.parts, split, unit) for unit in range(len(per_unit))]
        order = shuffled_rows(rows[split], settings.seed)
        for shard in range(shards[split]):
            path = out / "data" / f"{split}-{shard:05d}-of-{shards[split]:05d}.parquet"
            first = shard * settings.rows_per_shard
            if not path.exists():
                chosen = order[first : first + settings.rows_per_shard]
                tasks.append((path, chosen, files, ends, row_len, packing.dtype, first))
    if not rows["train"]:
        raise DataError(
            f"too little text: {total.train_tokens:,} training tokens ({total.documents:,} documents, "
            f"{total.val_documents:,} of them for val) do not fill one row of max_seq_len + 1 = {row_len}"
        )
    with _bar("write", "shard", sum(shards.values()), sum(shards.values()) - len(tasks), progress) as bar:
        for _ in run_tasks(_write_one, tasks, workers):
            bar.update()
    return Summary(total, rows, shards, dropped, str(out / "data"))


def _write_one(
    path: Path, rows: np.ndarray, files: Sequence[Path], ends: np.ndarray, row_len: int, dtype: str, first: int
) -> None:
    write_shard(path, gather(rows, files, ends, row_len, dtype), first)


def _bar(what: str, unit: str, total: int, done: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=what, unit=unit, total=total, initial=done, disable=None if progress else True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pico_fast.data.prepare",
        description="Tokenise, pack, shuffle and split text into parquet for training.",
    )
    default = PrepareSettings
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="text, JSON lines (.gz) or parquet: files or folders"
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizers JSON file, folder, or Hugging Face name")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument(
        "--max-seq-len", type=int, default=default.max_seq_len, help="a row is one id longer (%(default)s)"
    )
    parser.add_argument("--text-column", default=default.text_column, help="JSON key or parquet column (%(default)s)")
    parser.add_argument(
        "--val-fraction", type=float, default=default.val_fraction, help="share of the documents (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of shuffle and split (%(default)s)")
    parser.add_argument("--rows-per-shard", type=int, default=default.rows_per_shard, help="(%(default)s)")
    parser.add_argument("--eos", help="end-of-text token, if the tokenizer names none or another is wanted")
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="which files in folders, e.g. '*.py'; repeatable"
    )
    parser.add_argument(
        "--separator",
        help="string between documents of a text file, such as '<|endoftext|>' or $'\\n\\n' (default: a file is one)",
    )
    parser.add_argument("--skip-undecodable", action="store_true", help="leave out what is not UTF-8, and count it")
    parser.add_argument("--workers", type=int, help="processes (default: one per usable core)")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset in the output folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = vars(_arguments(argv))
    workers, overwrite = arguments.pop("workers"), arguments.pop("overwrite")
    arguments.update(inputs=tuple(arguments["inputs"]), include=tuple(arguments["include"]))
    try:
        print(prepare(PrepareSettings(**arguments), workers=workers, overwrite=overwrite))
    except (DataError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; what is done is kept: run the same command again to go on", file=sys.stderr)
        return 2
    except BrokenExecutor:
        print(
            "error: a worker process was killed, perhaps for want of memory; what is done is kept: run the same "
            "command again, with fewer --workers",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
