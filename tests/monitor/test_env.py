import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pico_fast.env import EnvFileError, SecretFilter, load_env, redact


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    saved = dict(os.environ)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in set(os.environ) - set(saved):
        del os.environ[name]


def test_reads_the_known_names_only(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "export HF_TOKEN=hf_abc$def\nWANDB_API_KEY='k e y'\nLD_PRELOAD=evil.so\n# no\nHF_HUB_CACHE=\n"
    )
    assert load_env(tmp_path) == ["HF_TOKEN", "WANDB_API_KEY"]
    assert os.environ["HF_TOKEN"] == "hf_abc$def"
    assert os.environ["WANDB_API_KEY"] == "k e y"
    assert os.environ.get("LD_PRELOAD") != "evil.so"


def test_never_overrides_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "from the shell")
    (tmp_path / ".env").write_text("HF_TOKEN=from-the-file\nWANDB_PROJECT=p\n")
    assert load_env(tmp_path) == ["WANDB_PROJECT"]
    assert os.environ["HF_TOKEN"] == "from the shell"


def test_no_file_is_no_error(tmp_path: Path) -> None:
    assert load_env(tmp_path) == []


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xff\xfe\n")
    with pytest.raises(EnvFileError, match=r"\.env cannot be read"):
        load_env(tmp_path)


def logged(**record: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(SecretFilter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.error(**record)  # type: ignore[arg-type]
    return stream.getvalue()


SECRETS = {
    "HF_TOKEN": "hf_x1",
    "WANDB_API_KEY": "0123456789abcdef",
    "MY_service_key": "longenough",
    "DB_SECRET": "s3cr3t-value",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("value", SECRETS.values())
def test_secrets_are_redacted_everywhere_in_a_record(value: str) -> None:
    assert value not in logged(msg=f"in the message {value}")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(SecretFilter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.error("as argument %s and in %r", value, {"header": value})
    try:
        raise ValueError(f"in the exception {value}")
    except ValueError:
        logger.exception("failed", stack_info=True)
    text = stream.getvalue()
    assert value not in text
    assert "as argument *** and in {'header': '***'}" in text
    assert "ValueError: in the exception ***" in text
    assert "Traceback" in text


@pytest.mark.usefixtures("secrets")
def test_other_text_stays() -> None:
    assert redact("TOKENIZERS_PARALLELISM=false") == "TOKENIZERS_PARALLELISM=false"


def test_a_secret_within_a_longer_one_leaves_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh")
    monkeypatch.setenv("OTHER_KEY", "abcdefgh-and-more")
    assert redact("abcdefgh-and-more") == "***"


def test_wrong_format_arguments_do_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_one")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(SecretFilter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.error("%d steps", "hf_secret_one")
    assert "%d steps" in stream.getvalue()
    assert "hf_secret_one" not in stream.getvalue()
