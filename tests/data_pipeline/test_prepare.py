"""prepare: nothing lost, the same bytes however it runs, every kind of input, and bad input by name."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_fast.data import documents as documents_module
from pico_fast.data.documents import Reading, documents, find_inputs, work_units
from pico_fast.data.packing import Packing, _is_val, gather, shuffled_rows
from pico_fast.data.prepare import main
from pico_fast.data.source import open_rows
from pico_fast.data.tokenizer import load_tokenizer
from pico_fast.data.workers import worker_count

TOKENIZER = str(Path(__file__).parents[1] / "data" / "golden" / "tokenizer")


def some_texts(count, seed=0):
    generator = random.Random(seed)
    words = ["def", "return", "été", "日本", "\n", "    ", "x = 1", "class A:", "🙂", "import os"]
    return [f"{i} " + " ".join(generator.choices(words, k=generator.randint(1, 80))) for i in range(count)]


def run(inputs, out, *options):
    """The command in this process, one worker unless said otherwise; its exit code."""
    inputs = [str(path) for path in inputs]
    defaults = ["--tokenizer", TOKENIZER, "--out", str(out), "--max-seq-len", "31", "--workers", "1"]
    return main([*inputs, *defaults, *map(str, options)])


def contents(out):
    return {file.name: file.read_bytes() for file in sorted((out / "data").iterdir())}


def token_stream(out, split):
    """All rows in the order before the shuffle, as one list of ids."""
    rows = open_rows(str(out), split)
    shuffled = rows.read(0, rows.n_rows)
    stream = np.empty_like(shuffled)
    stream[shuffled_rows(rows.n_rows, 42)] = shuffled
    return stream.reshape(-1).tolist()


def recovered(out, split):
    """The documents of a split that are whole, decoded."""
    tokenizer, found, current = load_tokenizer(TOKENIZER), [], []
    for token in token_stream(out, split):
        if token == tokenizer.eos_id:
            found.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    return found


def assert_holds(out, texts, val_fraction):
    """Every token of every document stands in train or val, in order, but for less than one row at the end of each."""
    tokenizer = load_tokenizer(TOKENIZER)
    packing = Packing(out, Reading(), tokenizer.eos_id, "uint16", val_fraction, 42)
    for split in ("train", "val"):
        mine = [text for text in texts if _is_val(text, packing) == (split == "val")]
        expected = [token for ids in tokenizer.encode(mine) for token in [*ids, tokenizer.eos_id]]
        assert token_stream(out, split) == expected[: len(expected) // 32 * 32]
        found = recovered(out, split)
        assert found == mine[: len(found)]
        assert len(found) > 0.8 * len(mine) > 0
    assert not set(recovered(out, "train")) & set(recovered(out, "val"))


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text, "n": 1}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def small_units(monkeypatch):
    """Units of about 4 kB instead of 1 MB, and reads of 100 bytes, so that small inputs cross every border."""
    original = documents_module.work_units

    def cut(inputs, reading):
        units = []
        for source in inputs:
            units += [[piece] for piece, _ in documents_module._pieces(source, 4000, reading)]
        return units

    monkeypatch.setattr("pico_fast.data.prepare.work_units", cut)
    monkeypatch.setattr(documents_module, "_READ_BYTES", 100)
    return original


def test_nothing_is_lost_from_any_kind_of_input(tmp_path, small_units):
    texts = some_texts(100)
    texts[90] = texts[20]  # a copy stays on its side
    (tmp_path / "txt").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "txt" / f"{number:04d}.txt").write_bytes(text.encode())
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / "large.parquet")
    separated = tmp_path / "all.txt"
    separated.write_bytes("<|endoftext|>".join(texts).encode())
    reference = None
    for number, (source, *options) in enumerate(
        [
            (tmp_path / "txt",),
            (jsonl,),
            (tmp_path / "a.jsonl.gz",),
            (tmp_path / "a.parquet",),
            (tmp_path / "large.parquet",),
            (separated, "--separator", "<|endoftext|>"),
        ]
    ):
        out = tmp_path / f"out{number}"
        assert run([source], out, "--val-fraction", 0.2, "--rows-per-shard", 50, *options) == 0
        assert_holds(out, texts, 0.2)
        reference = reference or contents(out)
        assert contents(out) == reference  # the same documents give the same bytes, however they are stored
        assert not (out / ".parts").exists()


def test_schema_and_shards(tmp_path):
    assert run([write_jsonl(tmp_path / "a.jsonl", some_texts(300))], tmp_path / "out", "--rows-per-shard", 100) == 0
    files = sorted((tmp_path / "out" / "data").glob("train-*"))
    assert files[0].name == f"train-00000-of-{len(files):05d}.parquet"
    tables = [pq.read_table(file) for file in files]
    assert tables[0].schema.field("input_ids").type == pa.list_(pa.int32())
    assert [table.num_rows for table in tables[:-1]] == [100] * (len(files) - 1)
    index = np.concatenate([table["idx"].to_numpy() for table in tables])
    np.testing.assert_array_equal(index, np.arange(len(index)))


def test_several_inputs_stay_in_order_and_count_once(tmp_path):
    texts = some_texts(60)
    first, second = write_jsonl(tmp_path / "z.jsonl", texts[:30]), write_jsonl(tmp_path / "a.jsonl", texts[30:])
    assert run([first, second, tmp_path], tmp_path / "out", "--val-fraction", 0) == 0
    found = recovered(tmp_path / "out", "train")
    assert found == texts[: len(found)]
    assert len(found) > 55


@pytest.mark.slow
def test_same_bytes_for_any_number_of_workers_and_after_a_kill(tmp_path):
    """Three processes killed half way, then finished, against one process alone."""
    texts = some_texts(14_000)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ["--val-fraction", "0.1", "--rows-per-shard", "9000"]
    assert run([source], tmp_path / "one", *options) == 0
    command = [sys.executable, "-m", "pico_fast.data.prepare", str(source), "--tokenizer", TOKENIZER, "--max-seq-len"]
    command += ["31", "--out", str(tmp_path / "three"), "--workers", "3", *options]
    process = subprocess.Popen(command, start_new_session=True)
    parts = tmp_path / "three" / ".parts"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not list(parts.glob("unit-*.json")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(parts.glob("unit-*.json"))
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "14,000 documents" in finished.stdout
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_resume_does_not_repeat_finished_units(tmp_path, monkeypatch, small_units):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(200))
    assert run([source], tmp_path / "whole") == 0
    from pico_fast.data import prepare

    original, calls = prepare.tokenise_unit, []

    def failing(unit, *arguments):
        calls.append(unit)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(unit, *arguments)

    monkeypatch.setattr(prepare, "tokenise_unit", failing)
    assert run([source], tmp_path / "out") == 2
    assert run([source], tmp_path / "out") == 0
    assert calls[:4] == [0, 1, 2, 3]
    assert calls[4:] == list(range(3, calls[-1] + 1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resume_does_not_repeat_finished_shards(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(200))
    options = ["--rows-per-shard", 100]
    assert run([source], tmp_path / "whole", *options) == 0
    from pico_fast.data import prepare

    original, written = prepare.write_shard, []

    def failing(path, *arguments):
        if len(written) == 3 and path not in written:
            written.append(path)
            raise OSError(28, "No space left on device")
        written.append(path)
        original(path, *arguments)

    monkeypatch.setattr(prepare, "write_shard", failing)
    assert run([source], tmp_path / "out", *options) == 2
    assert run([source], tmp_path / "out", *options) == 0
    assert sorted(path.name for path in {*written}) == sorted(contents(tmp_path / "whole"))
    assert len(written) == len({*written}) + 1  # only the one that failed was begun twice
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_die_with_their_parent(tmp_path):
    code = (
        "import os, sys, time\n"
        "from pico_fast.data.workers import run_tasks\n"
        "if __name__ == '__main__':\n"
        "    for pid in run_tasks(os.getpid, [(), ()], 2):\n"
        "        print(pid, flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def test_second_run_is_immediate_and_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    source, out = write_jsonl(tmp_path / "a.jsonl", some_texts(100)), tmp_path / "out"
    assert run([source], out) == 0
    first = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr("pico_fast.data.prepare.tokenise_unit", lambda *_: pytest.fail("tokenised again"))
        assert run([source], out) == 0
    assert "already complete" in capsys.readouterr().out
    assert run([source], out, "--seed", 1, "--val-fraction", 0.5) == 2
    message = capsys.readouterr().err
    assert "val_fraction: 0.01 then, 0.5 now; seed: 42 then, 1 now" in message
    assert "--overwrite" in message
    assert contents(out) == first
    assert run([source], out, "--seed", 1, "--overwrite") == 0
    assert contents(out) != first
    write_jsonl(source, some_texts(101))
    assert run([source], out, "--seed", 1) == 2
    assert "inputs: 1 files" in capsys.readouterr().err


def test_corrected_input_after_a_failed_run(tmp_path, capsys, small_units):
    texts, out = some_texts(100), tmp_path / "out"
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.write_text(source.read_text("utf-8") + '{"text": oops}\n', "utf-8")
    assert run([source], out) == 2
    assert list((out / ".parts").glob("unit-*.json"))  # units were done
    write_jsonl(source, ["corrected", *texts])
    capsys.readouterr()
    assert run([source], out) == 0
    assert "the inputs changed since the unfinished run there; starting again" in capsys.readouterr().err
    assert run([source], tmp_path / "fresh") == 0
    assert contents(out) == contents(tmp_path / "fresh")
    assert not (out / ".parts").exists()


def test_changed_input_after_some_shards_were_written(tmp_path, monkeypatch):
    from pico_fast.data import prepare

    source, out, original, written = (
        write_jsonl(tmp_path / "a.jsonl", some_texts(200)),
        tmp_path / "out",
        prepare.write_shard,
        [],
    )

    def failing(path, *arguments):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        original(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shard", failing)
        assert run([source], out, "--rows-per-shard", 100) == 2
    assert written[0].exists()
    write_jsonl(source, some_texts(201, seed=1))
    assert run([source], out, "--rows-per-shard", 100) == 0
    assert run([source], tmp_path / "fresh", "--rows-per-shard", 100) == 0
    assert contents(out) == contents(tmp_path / "fresh")


def test_unfinished_run_with_other_settings_is_kept(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", some_texts(100)), tmp_path / "out"
    source.write_text(source.read_text("utf-8") + '{"text": oops}\n', "utf-8")
    assert run([source], out) == 2
    write_jsonl(source, some_texts(100))
    record = (out / "prepare.json").read_text()
    assert run([source], out, "--seed", 1) == 2
    assert "seed: 42 then, 1 now" in capsys.readouterr().err
    assert (out / "prepare.json").read_text() == record


def test_foreign_parquet_is_not_mixed_in(tmp_path, capsys):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "train-00000-of-00001.parquet").write_bytes(b"mine")
    assert run([write_jsonl(tmp_path / "a.jsonl", some_texts(50))], tmp_path / "out") == 2
    assert "unknown origin" in capsys.readouterr().err


def test_summary_counts(tmp_path, capsys):
    texts = some_texts(50)
    with_gaps = [*texts[:20], "", *texts[20:]]
    lines = [json.dumps({"text": text}) for text in with_gaps] + [json.dumps({"text": None}), "", '{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", "--skip-undecodable", "--val-fraction", 0) == 0
    output = capsys.readouterr().out
    tokens = sum(len(ids) + 1 for ids in load_tokenizer(TOKENIZER).encode(texts))
    assert f"50 documents (0 for val), {tokens:,} tokens" in output
    assert f"train: {tokens // 32:,} rows in 1 shard(s); {tokens % 32} tokens at the end fill no row" in output
    assert "2 documents without text left out" in output
    assert "1 documents that are not UTF-8 left out" in output
    assert "no val split" in output
    assert str(tmp_path / "out" / "data") in output


def test_include_and_known_suffixes(tmp_path):
    for name in ("a.txt", "b.py", "c.bin", "sub/d.md", ".hidden/e.txt", "sub/.f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    labels = lambda include: [i.label.removeprefix(f"{tmp_path}/") for i in find_inputs([tmp_path], include)]  # noqa: E731
    assert labels([]) == ["a.txt", "sub/d.md"]
    assert labels(["*.py", "sub/*"]) == ["b.py", "sub/d.md"]


def test_long_documents_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pico_fast.data.packing._ENCODE_CHARS", 50)
    texts = ["x = 1\ny = 22\n" * 100, "z" * 1000, "short", "end " * 40]
    assert run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", "--val-fraction", 0) == 0
    found = recovered(tmp_path / "out", "train")
    assert found == texts[: len(found)]
    assert len(found) == 3


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\x1e", codec="utf-8"), max_size=30), max_size=20),
    separator=st.sampled_from(["\x1e", "\x1eab", "\x1e\x1e", "\x1ea\x1e"]),
    cut=st.integers(1, 40),
    read=st.integers(1, 50),
)
def test_cutting_files_into_pieces_changes_nothing(texts, separator, cut, read, tmp_path_factory):
    path = tmp_path_factory.mktemp("d") / "a.txt"
    path.write_bytes(separator.join(texts).encode())
    reading = Reading(separator=separator)
    (source,) = find_inputs([path])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "_READ_BYTES", read)
        pieces = [piece for piece, _ in documents_module._pieces(source, cut, reading)]
        found = list(documents(pieces, reading))
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    expected = content.split(separator)
    if not expected[-1]:
        expected.pop()  # nothing after the last separator is no document
    assert found == expected


def test_units_are_fixed_by_the_inputs(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text("x" * 200_000)
    inputs = find_inputs([tmp_path])
    units = work_units(inputs, Reading())
    assert [piece.source for unit in units for piece in unit] == inputs
    assert len(units) == 6
    assert units == work_units(find_inputs([tmp_path]), Reading())


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), row_len=st.integers(1, 50), data=st.data())
def test_gather_rows_across_files(sizes, row_len, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("d")
    stream = np.arange(sum(sizes), dtype=np.uint16)
    ends = np.cumsum(sizes)
    files = [folder / str(number) for number in range(len(sizes))]
    for file, end, size in zip(files, ends, sizes, strict=True):
        file.write_bytes(stream[end - size : end].tobytes())
    n_rows = len(stream) // row_len
    rows = np.array(data.draw(st.permutations(range(n_rows))), np.int64)[: data.draw(st.integers(0, n_rows))]
    expected = stream[: n_rows * row_len].reshape(n_rows, row_len)[rows]
    np.testing.assert_array_equal(gather(rows, files, ends, row_len, "uint16"), expected)


def make_bad(tmp_path, kind):
    """Input, options and what the error must say."""
    good = write_jsonl(tmp_path / "good.jsonl", some_texts(50))
    if kind == "missing":
        return tmp_path / "nowhere.txt", [], "no such file or folder"
    if kind == "folder without text":
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "a.bin").write_bytes(b"")
        return tmp_path / "f", [], r"no file matches .*\(it has 1 \.bin\); see --include"
    if kind == "undecodable text":
        (tmp_path / "latin.txt").write_bytes(b"caf" + b"\xe9")
        return tmp_path / "latin.txt", [], r"latin\.txt: not UTF-8 text \(byte 3\).*--skip-undecodable"
    if kind == "undecodable line":
        good.write_bytes(good.read_bytes() + b'{"text": "\xe9"}\n')
        return good, [], r"good\.jsonl, line 51: not UTF-8"
    if kind == "not JSON":
        good.write_text(good.read_text() + '{"text": oops}\n')
        return good, [], r"good\.jsonl, line 51: "
    if kind == "JSON array":
        (tmp_path / "a.json").write_text('[{"text": "a"}]')
        return tmp_path / "a.json", [], r"a\.json, line 1: a JSON object expected, list given"
    if kind == "no such key":
        return good, ["--text-column", "body"], r"line 1: no key 'body' \(it has text, n\); see --text-column"
    if kind == "not a string":
        return good, ["--text-column", "n"], r"line 1: 'n' is int, not a string"
    if kind == "no such column":
        pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
        return tmp_path / "a.parquet", [], "no column 'text'; its columns are body; see --text-column"
    if kind == "column of numbers":
        pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
        return tmp_path / "a.parquet", [], "column 'text' is int64, not a string"
    if kind == "damaged parquet":
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        return tmp_path / "a.parquet", [], "not a readable parquet file"
    if kind == "cut gzip":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode() + b"\n")[:3000])
        return tmp_path / "a.jsonl.gz", [], r"a\.jsonl\.gz: cannot be read to its end"
    if kind == "too little":
        (tmp_path / "a.txt").write_text("short")
        return tmp_path / "a.txt", [], r"too little text: \d+ training tokens .* do not fill one row .* = 32"
    if kind == "no text at all":
        (tmp_path / "a.txt").write_text("")
        return tmp_path / "a.txt", [], r"too little text: 0 training tokens \(0 documents"
    if kind == "unknown end token":
        return good, ["--eos", "<eos>"], "has no token '<eos>'"
    if kind == "fraction":
        return good, ["--val-fraction", "1"], "val_fraction 1.0 must be"
    if kind == "length":
        return good, ["--max-seq-len", "0"], "max_seq_len 0"
    if kind == "shard":
        return good, ["--rows-per-shard", "100000000"], "a shard may hold at most"
    if kind == "seed":
        return good, ["--seed", "-1"], "^error: seed -1 must be at least 0 .*\n$"
    if kind == "seed of 65 digits":
        return good, ["--seed", "1" * 65], "less than 2"
    if kind == "workers":
        return good, ["--workers", "0"], "^error: workers 0 must be at least 1\n$"
    if kind == "negative workers":
        return good, ["--workers", "-2"], "workers -2 must be"
    if kind == "separator":
        return good, ["--separator", ""], "separates nothing"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "folder without text", "undecodable text", "undecodable line", "not JSON", "JSON array"),
        *("no such key", "not a string", "no such column", "column of numbers", "damaged parquet", "cut gzip"),
        *("too little", "no text at all", "unknown end token", "fraction", "length", "shard", "separator"),
        *("seed", "seed of 65 digits", "workers", "negative workers"),
    ],
)
def test_bad_input(tmp_path, capsys, kind):
    source, options, message = make_bad(tmp_path, kind)
    assert run([source], tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("options", [["--seed", -1], ["--workers", 0], ["--workers", -1]])
def test_bad_settings_are_refused_before_anything_is_done(tmp_path, options):
    assert run([write_jsonl(tmp_path / "a.jsonl", some_texts(50))], tmp_path / "out", *options) == 2
    assert not (tmp_path / "out").exists()


def test_one_worker_per_usable_core(monkeypatch):
    monkeypatch.setattr("pico_fast.data.workers.usable_cores", lambda: 7)
    assert (worker_count(None), worker_count(3)) == (7, 3)


def test_bad_input_in_a_worker_process(tmp_path, capsys, small_units):
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(100))
    assert run([source, tmp_path / "latin.txt"], tmp_path / "out", "--workers", 2) == 2
    assert "latin.txt: not UTF-8 text" in capsys.readouterr().err


def test_tokenizer_without_eos(tmp_path, capsys):
    import tokenizers

    model = tokenizers.models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    assert run([source], tmp_path / "out", "--tokenizer", tmp_path / "t.json") == 2
    assert "names no end-of-text token; give one of its tokens with --eos" in capsys.readouterr().err
    assert run([source], tmp_path / "out", "--tokenizer", tmp_path / "t.json", "--eos", "<end>") == 0


def test_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pico_fast.data.prepare.tokenise_unit", interrupted)
    assert run([write_jsonl(tmp_path / "a.jsonl", some_texts(50))], tmp_path / "out") == 130
    assert "run the same command again" in capsys.readouterr().err


def test_killed_worker_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr("pico_fast.data.prepare.tokenise_unit", killed)
    assert run([write_jsonl(tmp_path / "a.jsonl", some_texts(50))], tmp_path / "out") == 2
    assert "fewer --workers" in capsys.readouterr().err
