"""Fixtures shared by all tests."""

import pico_fast  # noqa: F401, I001 (first: it sets what OpenMP reads when torch is imported)

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

# Triton decides when it is imported whether its functions are interpreted, and test modules import it at collection
# (tests/interop, through transformers): before tests/kernels/conftest.py would be asked. A subprocess that needs the
# real compiler (the ahead-of-time suite) drops the variable.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, and no limit of milliseconds on an example: the machine may be busy.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

THREADS = torch.get_num_threads()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that the workers of ``make test`` end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the original pico-train's data and numbers (golden.json, train, val, tokenizer)."""
    return Path(__file__).parent / "data" / "golden"


@pytest.fixture(autouse=True)
def _as_if_first() -> None:
    """What an earlier test leaves behind, the trainer's number of threads for one, does not reach the next."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a dataset of predictable rows and writes a config that trains a very small decoder on it in a second.

    ``small_run(run_name="a", max_steps=8, **{"section.key": value})`` returns the YAML file; runs go to
    ``tmp_path/runs``.
    """
    vocab, length = 64, 16
    rng = np.random.default_rng(0)
    starts = rng.integers(0, vocab, (96, 1))
    rows = ((starts + np.arange(length + 1) * (1 + starts % 3)) % vocab).astype(np.int32)
    for split, chosen in (("train", rows[:80]), ("val", rows[80:])):
        for shard, part in enumerate(np.array_split(chosen, 2)):
            path = tmp_path / "dataset" / "data" / f"{split}-{shard:05d}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"input_ids": list(part)}), path, row_group_size=16)

    def write(run_name: str = "run", max_steps: int = 8, **settings: object) -> Path:
        config: dict = {
            "data": {"dataset": {"name": str(tmp_path / "dataset")}, "dataloader": {"batch_size": 8}},
            "model": {
                "d_model": 32,
                "n_layers": 2,
                "vocab_size": vocab,
                "max_seq_len": length,
                "attention_n_heads": 4,
                "attention_n_kv_heads": 2,
                "activation_hidden_dim": 48,
            },
            "training": {
                "fabric": {"precision": "32-true", "accelerator": "cpu"},
                "optimization": {"lr": 0.01, "lr_warmup_steps": 3, "gradient_accumulation_steps": 2},
                "max_steps": max_steps,
            },
            "evaluation": {"paloma": {"dataset_name": str(tmp_path / "dataset"), "batch_size": 4}},
            "monitoring": {"logging": {"log_every_n_steps": 1}},
            "checkpointing": {"run_name": run_name, "runs_dir": str(tmp_path / "runs"), "save_every_n_steps": 4},
            "runtime": {"threads": 1},
        }
        config["data"]["tokenizer"] = {"name": str(tmp_path / "no-tokenizer")}
        for key, value in settings.items():
            *sections, last = key.split(".")
            node = config
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = value
        path = tmp_path / f"{run_name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
