"""The user's ``.env`` file, and keeping the secrets in it out of everything we write."""

from __future__ import annotations

import logging
import os
import re
import traceback
from pathlib import Path

from pico_fast.config import Config
from pico_fast.config_io import to_yaml

#: Names read from ``.env``: the two secrets pico-train's users keep there, and the settings of the same two libraries.
ENV_NAMES = frozenset(
    {
        "HF_TOKEN",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "HF_DATASETS_CACHE",
        "HF_DATASETS_OFFLINE",
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_DIR",
        "WANDB_ENTITY",
        "WANDB_PROJECT",
    }
)

_ALWAYS_SECRET = frozenset({"HF_TOKEN", "WANDB_API_KEY"})
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_SHORTEST_SECRET = 8  # "TOKENIZERS_PARALLELISM=false" is no secret


class EnvFileError(Exception):
    """The ``.env`` file cannot be read, or a secret is where it would be written down."""


def load_env(folder: str | Path = ".") -> list[str]:
    """Set the variables of ``folder/.env`` that are in :data:`ENV_NAMES`; returns the names that were set.

    A variable of the environment is never overridden; other names in the file belong to other tools and are left alone.
    Call this before ``huggingface_hub`` or ``datasets`` is imported: they read HF_HOME and the like once. Raises
    EnvFileError.
    """
    from dotenv import dotenv_values

    path = Path(folder) / ".env"
    if not path.is_file():
        return []
    try:
        values = dotenv_values(path, interpolate=False)  # a "$" in a key is a "$"
    except (OSError, UnicodeDecodeError) as error:
        raise EnvFileError(f"{path} cannot be read: {error}; make it readable UTF-8 text or remove it") from None
    chosen = {name: value for name, value in values.items() if name in ENV_NAMES and value and name not in os.environ}
    os.environ.update(chosen)
    return sorted(chosen)


def secret_values() -> list[str]:
    """Values of the environment that must not be written anywhere, longest first.

    HF_TOKEN and WANDB_API_KEY, and every variable with TOKEN, KEY, SECRET or PASSWORD in its name and at least 8
    characters.
    """
    found = {
        value
        for name, value in os.environ.items()
        if value and (name in _ALWAYS_SECRET or (_SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET))
    }
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """``text`` with every value of :func:`secret_values` replaced by ``***``."""
    for value in secret_values():
        text = text.replace(value, "***")
    return text


def refuse_secrets(config: Config) -> None:
    """Raise EnvFileError if HF_TOKEN or WANDB_API_KEY stands in the configuration, which is written to many files."""
    text = to_yaml(config)
    for name in sorted(_ALWAYS_SECRET):
        if os.environ.get(name) and os.environ[name] in text:
            raise EnvFileError(f"the value of {name} stands in the configuration; remove it, the environment is enough")


class SecretFilter(logging.Filter):
    """Redacts message, arguments, exception and stack text of every record; lets all records pass.

    Put it on handlers: filters of a logger do not see the records of its children.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite ``record`` in place."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # wrong arguments must not stop a training
            message = f"{record.msg} {record.args!r}"
        record.msg, record.args = redact(message), None
        if record.exc_info:
            # Formatters print exc_text as it stands; without exc_info none of them formats the exception anew.
            record.exc_text = record.exc_text or "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            record.exc_info = None
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True
