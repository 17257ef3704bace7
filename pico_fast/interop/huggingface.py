"""Checkpoints in the Hugging Face format of pico-train: written at every save, read to start a run from one.

A folder holds ``config.json``, ``model.safetensors`` (float32, every name with the prefix ``pico_decoder.``),
``pico_decoder.py`` (the model's code, a copy of :mod:`pico_fast.interop.pico_decoder`) and the tokenizer's files.
transformers loads it with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. transformers itself
is not imported here: it takes seconds to import, and JSON and safetensors are all that is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pico_fast.config import ModelConfig
from pico_fast.config_io import ConfigError, load_config

PREFIX = "pico_decoder."
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
CODE_FILE = "pico_decoder.py"
MODEL_CLASS = "PicoDecoderHF"
CONFIG_CLASS = "PicoDecoderHFConfig"


class CheckpointFormatError(Exception):
    """A folder holds no Pico decoder; the message names the file, what is wrong with it and what was expected."""


class ExportableTokenizer(Protocol):
    """What an export needs of :class:`pico_fast.data.tokenizer.Tokenizer`."""

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a document."""

    def save(self, folder: Path) -> None:
        """Write the Hugging Face tokenizer files into ``folder``."""


def config_dict(config: ModelConfig) -> dict[str, Any]:
    """The content of ``config.json``: every field of ``config`` and what transformers' auto classes need."""
    module = CODE_FILE.removesuffix(".py")
    model_class = f"{module}.{MODEL_CLASS}"
    return {
        "architectures": [MODEL_CLASS],
        "auto_map": {
            "AutoConfig": f"{module}.{CONFIG_CLASS}",
            "AutoModel": model_class,
            "AutoModelForCausalLM": model_class,
        },
        "dtype": "float32",
        **asdict(config),
    }


def export_model(
    folder: str | Path,
    model_state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: ExportableTokenizer | None = None,
) -> None:
    """Write a checkpoint that transformers loads into ``folder``, which is created if it is missing.

    ``model_state`` has the decoder's own names (``layers.0.attention.q_proj.weight``, ...), on any device and in any
    floating dtype; float32 tensors on the CPU are written from where they lie, others are copied first. With a
    tokenizer, its files are written too and ``generation_config.json`` lets ``generate`` stop at the end of a document.

    Neither atomic nor flushed to the disk: :func:`pico_fast.checkpoint.save.save_checkpoint` sees to that. Raises
    OSError or, from the library that writes the weights, SafetensorError where a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG_FILE, config_dict(config))
    weights = {
        PREFIX + name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in model_state.items()
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copyfile(Path(__file__).with_name(CODE_FILE), folder / CODE_FILE)
    if tokenizer is not None:
        tokenizer.save(folder)
        if tokenizer.eos_id is not None:
            eos = tokenizer.eos_id
            _write_json(folder / GENERATION_CONFIG_FILE, {"eos_token_id": eos, "pad_token_id": eos})


def import_model(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and weights of a checkpoint that pico-fast or pico-train wrote.

    Returns the ModelConfig and a state with the decoder's own names, on the CPU, in the dtypes of the file; the model's
    ``load_state_dict`` compares names and shapes. Keys of ``config.json`` that belong to transformers are passed over.
    Raises CheckpointFormatError, with file and expectation, for a missing or unreadable file, another architecture,
    missing or impossible settings, and weights without the prefix ``pico_decoder.``.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointFormatError(f"{path}: cannot be read as safetensors ({error})") from None
    foreign = [name for name in stored if not name.startswith(PREFIX)]
    if foreign or not stored:
        found = f"{foreign[0]!r} and {len(foreign) - 1} more do not" if foreign else "there are none"
        raise CheckpointFormatError(f"{path}: all weights must be named {PREFIX}*, {found}")
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}


def _read_config(path: Path) -> ModelConfig:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(stored, dict):
        raise CheckpointFormatError(f"{path}: a JSON object expected, {type(stored).__name__} found")
    names = [field.name for field in fields(ModelConfig)]
    if missing := [name for name in names if name not in stored]:
        raise CheckpointFormatError(f"{path}: not the configuration of a Pico decoder, {', '.join(missing)} missing")
    try:  # JSON is YAML: the checks of types and values are those of a run's own configuration
        return load_config(overrides=[f"model.{name}={json.dumps(stored[name])}" for name in names]).model
    except ConfigError as error:
        raise CheckpointFormatError(f"{path}: {'; '.join(error.problems)}") from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
