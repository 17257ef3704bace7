"""One small interface over Hugging Face tokenizers.

A ``tokenizers`` JSON file or a folder with ``tokenizer.json`` is read with the ``tokenizers`` library alone; anything
else goes through ``transformers.AutoTokenizer``, which takes seconds to import.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pico_fast.data.errors import TokenizerError

__all__ = ["Tokenizer", "TokenizerError", "load_tokenizer"]

_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# End-of-text tokens of the published tokenizers, asked for only where no configuration names one.
_COMMON_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        name: what it was loaded from.
        vocab_size: the smallest number greater than every id, added tokens included.
        eos_id: id of the end-of-text token, or None.
    """

    def __init__(self, name: str, fast: Any, slow: Any, eos_token: str | None, files: Sequence[Path] = ()):
        self.name = name
        self._fast, self._slow, self._files = fast, slow, tuple(files)
        vocabulary = fast.get_vocab(with_added_tokens=True) if fast is not None else slow.get_vocab()
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.eos_id: int | None = vocabulary.get(eos_token) if eos_token is not None else None
        self._eos_token = eos_token if self.eos_id is not None else None
        self._vocabulary_hash = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
        if fast is not None:  # a tokenizer.json may ask for truncation: it would silently cut documents
            fast.no_truncation()
            fast.no_padding()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; no special tokens are added."""
        if self._fast is not None:
            return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids: list[list[int]] = self._slow(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids`` (list, array or tensor of integers)."""
        backend = self._fast if self._fast is not None else self._slow
        return str(backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """Id of the token spelt ``token``, or None."""
        vocabulary = self._fast.get_vocab() if self._fast is not None else self._slow.get_vocab()
        found: int | None = vocabulary.get(token)
        return found

    def fingerprint(self) -> str:
        """Short string that changes with what :meth:`encode` returns."""
        text = self._fast.to_str() if self._fast is not None else self._vocabulary_hash
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write Hugging Face tokenizer files into ``folder``, for ``AutoTokenizer.from_pretrained(folder)``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._slow is not None:
            self._slow.save_pretrained(str(folder))
            return
        for file in self._files:
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        if not (folder / "tokenizer.json").exists():
            self._fast.save(str(folder / "tokenizer.json"))
        if not any(file.name == "tokenizer_config.json" for file in self._files):
            special = {"eos_token": self._eos_token} if self._eos_token is not None else {}
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
            _write_json(folder / "tokenizer_config.json", config)
            _write_json(folder / "special_tokens_map.json", special)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer called ``name``: a ``tokenizers`` JSON file, a folder with tokenizer files, or a Hugging Face name.

    The end-of-text token is the ``eos_token`` of ``tokenizer_config.json`` or ``special_tokens_map.json`` beside the
    tokenizer; without those files, the one well-known end-of-text token in the vocabulary.

    Raises TokenizerError that says what to do.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return _load_json(str(name), path / "tokenizer.json")
    if path.is_file():
        return _load_json(str(name), path)
    if not path.exists() and _is_path(str(name)):
        raise TokenizerError(
            f"no tokenizer file or folder {str(name)!r}",
            "give a tokenizers JSON file, a folder with tokenizer.json, or a Hugging Face name such as "
            "allenai/OLMo-7B-0724-hf",
        )
    return _load_with_transformers(str(name))


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(".json")


def _load_json(name: str, file: Path) -> Tokenizer:
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{file} is not a tokenizers JSON file ({error})", "give the tokenizer.json that `tokenizers` wrote"
        ) from None
    configs = [file.parent / config for config in _CONFIG_FILES if (file.parent / config).is_file()]
    # A tokenizer's own files belong to it only under their standard name; x.json may share a folder with anything.
    if file.name != "tokenizer.json":
        configs = []
    eos_token = next((eos for config in configs if (eos := _eos_in(config)) is not None), None)
    if eos_token is None:
        known = [token for token in _COMMON_EOS if fast.token_to_id(token) is not None]
        eos_token = known[0] if len(known) == 1 else None
    files = [file, *configs] if file.name == "tokenizer.json" else []
    return Tokenizer(name, fast, None, eos_token, files)


def _eos_in(config: Path) -> str | None:
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError, OSError) as error:
        raise TokenizerError(f"{config} is not a JSON object ({error})", "save the tokenizer again") from None
    if isinstance(token, dict):  # written by transformers as an AddedToken
        token = token.get("content")
    return token if isinstance(token, str) else None


def _load_with_transformers(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError offline, ValueError for unknown classes, ImportError for sentencepiece
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(
            f"tokenizer {name!r} cannot be loaded: {first_line}",
            "check the name and the connection (HF_TOKEN for private ones; HF_HUB_OFFLINE=1 to use only what is "
            "already in the cache), or give a folder with tokenizer.json",
        ) from None
    # pico's OLMo tokenizers and every other fast one: transformers only wraps a `tokenizers` object
    fast = getattr(loaded, "backend_tokenizer", None)
    return Tokenizer(name, fast, loaded, loaded.eos_token)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
