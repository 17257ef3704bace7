"""The demo corpus: real text, a tokenizer that decodes it back, and a cache."""

from pico_fast.data.demo_corpus import main, stdlib_files
from pico_fast.data.source import open_rows
from pico_fast.data.tokenizer import load_tokenizer


def test_demo_corpus(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--megabytes", "1", "--vocab-size", "400", "--max-seq-len", "64"]
    arguments += ["--val-fraction", "0.3"]
    assert main([*arguments, "--workers", "1"]) == 0
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.token_to_id("<|padding|>")) == (400, 0, 1)
    for split in ("train", "val"):
        rows = open_rows(str(tmp_path), split, row_len=65, vocab_size=400)
        assert rows.n_rows > 10
    assert "import" in "".join(tokenizer.decode(row) for row in rows.read(0, rows.n_rows))
    assert "files of the Python standard library" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert main(arguments) == 0
    assert "already in" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert main([*arguments, "--vocab-size", "300", "--workers", "1"]) == 0
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size == 300


def test_only_the_standard_library():
    files = stdlib_files(14 << 20)
    assert not any("site-packages" in path.parts for path in files)
    assert sum(path.stat().st_size for path in files) <= 14 << 20
    assert any(path.name == "argparse.py" for path in files)


def test_bad_options_are_refused_before_anything_is_done(tmp_path, capsys):
    for options in (["--workers", "0"], ["--val-fraction", "1"]):
        assert main(["--out", str(tmp_path / "out"), "--megabytes", "1", *options]) == 2
        assert not (tmp_path / "out").exists()
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: workers 0 must be at least 1"
    assert errors[1].startswith("error: val_fraction 1.0")
