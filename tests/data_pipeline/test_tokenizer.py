"""Tokenizers: loading by every kind of name, ids, saving, and what is said when something is missing."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from pico_fast.data.tokenizer import TokenizerError, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "tokenizer"
TEXTS = ["def f(x):\n    return x ** 2\n", "", "naïve 日本語 🙂", " leading space"]


def test_folder_and_file_agree_with_the_library():
    library = tokenizers.Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    for name in (GOLDEN, GOLDEN / "tokenizer.json"):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer.encode(TEXTS) == [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert tokenizer.eos_id == 0
        assert tokenizer.vocab_size == library.get_vocab_size()
        assert tokenizer.token_to_id("<|padding|>") == 1


def test_decode_inverts_encode_and_skips_special_tokens():
    tokenizer = load_tokenizer(GOLDEN)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.decode(np.array([*ids, 0], np.int32)) == text
        assert tokenizer.decode([*ids, 0], skip_special_tokens=False) == text + "<|endoftext|>"


def test_saved_files_load_with_transformers(tmp_path):
    from transformers import AutoTokenizer

    lone = tmp_path / "lone.json"  # a JSON file without configuration: the end-of-text token is recognised
    shutil.copy(GOLDEN / "tokenizer.json", lone)
    for number, name in enumerate([GOLDEN, lone]):
        folder = tmp_path / str(number)
        tokenizer = load_tokenizer(name)
        tokenizer.save(folder)
        tokenizer.save(folder)  # over itself
        assert {file.name for file in folder.iterdir()} == {
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
        }
        loaded = AutoTokenizer.from_pretrained(str(folder))
        assert loaded.eos_token == "<|endoftext|>"
        assert loaded(TEXTS, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXTS)
        assert load_tokenizer(folder).encode(TEXTS) == tokenizer.encode(TEXTS)
        assert load_tokenizer(folder).fingerprint() == tokenizer.fingerprint()


def test_transformers_backed_tokenizer(tmp_path, monkeypatch):
    import transformers

    library = transformers.AutoTokenizer.from_pretrained(str(GOLDEN))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **kwargs: library)
    tokenizer = load_tokenizer("owner/name")
    assert tokenizer.encode(TEXTS) == load_tokenizer(GOLDEN).encode(TEXTS)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, load_tokenizer(GOLDEN).vocab_size)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(TEXTS) == tokenizer.encode(TEXTS)


def test_truncation_in_the_file_is_ignored(tmp_path):
    library = tokenizers.Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "t.json"))
    text = "a text of more than three tokens"
    assert load_tokenizer(tmp_path / "t.json").encode([text]) == load_tokenizer(GOLDEN).encode([text])


def test_eos_from_configuration_written_as_object(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "t")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "<|padding|>"}}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "t").eos_id == 1


def test_tokenizer_without_eos(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 5}, unk_token="a")).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.eos_id is None
    assert tokenizer.vocab_size == 6  # ids have holes: every id must be less


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/tokenizer.json", "a/b/c"])
def test_absent_paths_are_not_looked_up_on_the_hub(name, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(TokenizerError, match="no tokenizer file or folder"):
        load_tokenizer(name)


def test_unreachable_name_says_what_to_do(monkeypatch):
    import transformers

    def offline(*_, **__):
        raise OSError("We couldn't connect\nmore lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer("owner/name")
    assert "owner/name" in str(caught.value)
    assert "We couldn't connect;" in str(caught.value)
    assert "HF_TOKEN" in caught.value.what_to_do


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"t\.json is not a tokenizers JSON file"):
        load_tokenizer(tmp_path / "t.json")
    shutil.copytree(GOLDEN, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not a JSON object"):
        load_tokenizer(tmp_path / "t")


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(TokenizerError("what", "do this")))
    assert (str(error), error.what_to_do) == ("what; do this", "do this")
