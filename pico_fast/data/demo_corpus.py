"""The demo corpus: source text of the Python standard library on this machine, no download.

``python -m pico_fast.data.demo_corpus --out datasets/demo`` trains a byte-level BPE tokenizer on it
(``OUT/tokenizer``) and prepares ``OUT/data/*.parquet``; a second call with the same settings returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.data.prepare import PrepareSettings, prepare
from pico_fast.data.workers import worker_count

EOS, PADDING = "<|endoftext|>", "<|padding|>"  # ids 0 and 1
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "ensurepip"}


def stdlib_files(limit_bytes: int) -> list[Path]:
    """UTF-8 Python sources of the standard library, sorted by path, up to ``limit_bytes``; tests only fill up the rest.

    Raises DataError if this Python has next to no sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(p.relative_to(root).parts) and _is_text(p)]
    library = [p for p in found if "test" not in p.relative_to(root).parts and "tests" not in p.relative_to(root).parts]
    chosen, size = [], 0
    for path in [*library, *(p for p in found if p not in set(library))]:
        if size + path.stat().st_size <= limit_bytes:
            chosen.append(path)
            size += path.stat().st_size
    if size < min(limit_bytes, 1 << 20) // 2:
        raise DataError(
            f"the standard library in {root} has only {size} bytes of source text; prepare your own text with "
            "`python -m pico_fast.data.prepare`"
        )
    return sorted(chosen)


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError):  # the tests of Python's own decoder contain such files on purpose
        return False


def train_tokenizer(files: Sequence[Path], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE on ``files`` and save it as a Hugging Face tokenizer folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8") for path in files), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    special = {"eos_token": EOS, "pad_token": PADDING}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def make(
    out: Path,
    vocab_size: int = 4096,
    max_seq_len: int = 256,
    megabytes: int = 14,
    val_fraction: float = 0.02,
    workers: int | None = None,
) -> None:
    """Make the corpus in ``out``, or find it there; prints what it does.

    The arguments are the command's options. Raises DataError for a value out of bounds.
    """
    started = time.monotonic()
    workers = worker_count(workers)
    files = stdlib_files(megabytes << 20)
    size = sum(path.stat().st_size for path in files)
    settings = {
        "vocab_size": vocab_size,
        "max_seq_len": max_seq_len,
        "val_fraction": val_fraction,
        "corpus": hashlib.sha256("".join(f"{p} {p.stat().st_size}\n" for p in files).encode()).hexdigest()[:16],
    }
    stamp = out / "demo_corpus.json"
    made = (out / "tokenizer" / "tokenizer.json").is_file() and any((out / "data").glob("train-*.parquet"))
    if made and stamp.is_file() and stamp.read_text() == json.dumps(settings):
        print(f"demo corpus: already in {out}")
        return
    prepare_settings = PrepareSettings(
        inputs=tuple(str(path) for path in files),
        tokenizer=str(out / "tokenizer"),
        out=str(out),
        max_seq_len=max_seq_len,
        val_fraction=val_fraction,
    )
    print(f"demo corpus: {len(files):,} files of the Python standard library, {size / 1e6:.1f} MB of text")
    stamp.unlink(missing_ok=True)
    train_tokenizer(files, vocab_size, out / "tokenizer")
    print(
        f"tokenizer: byte-level BPE of {vocab_size:,} tokens in {out / 'tokenizer'} "
        f"({time.monotonic() - started:.0f} s)"
    )
    summary = prepare(prepare_settings, workers=workers, overwrite=True)
    stamp.write_text(json.dumps(settings))
    print(f"{summary} ({time.monotonic() - started:.0f} s)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pico_fast.data.demo_corpus", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("datasets/demo"), help="output folder (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the BPE (%(default)s)")
    parser.add_argument("--max-seq-len", type=int, default=256, help="rows are one id longer (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=14, help="of text at most (%(default)s)")
    parser.add_argument("--val-fraction", type=float, default=0.02, help="share of the documents (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per usable core)")
    arguments = parser.parse_args(argv)
    if arguments.vocab_size < 258:
        parser.error(f"--vocab-size {arguments.vocab_size}: 256 bytes and two special tokens need at least 258")
    try:
        make(**vars(arguments))
    except (DataError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
