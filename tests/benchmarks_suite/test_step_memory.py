"""``python -m benchmarks.step_memory``: a small decoder with Pico's vocabulary."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import step_memory, train_step

ROOT = Path(__file__).parents[2]
TOKENS, SEQUENCE = 512, 64
SMALL = [
    "training.fabric.accelerator=cpu",
    "model.d_model=32",
    "model.n_layers=1",
    "model.activation_hidden_dim=32",
    "model.attention_n_heads=4",
    "model.attention_n_kv_heads=2",
]


def test_the_reference_takes_more_by_a_copy_of_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "memory.json"
    sizes = ["--tokens", str(TOKENS), "--sequence", str(SEQUENCE)]
    assert step_memory.main([*sizes, "--json", str(file), *SMALL]) == 0
    result = json.loads(file.read_text())
    assert (result["implementation"], result["tokens"]) == ("torch", TOKENS)
    assert result["float32_logits_bytes"] == TOKENS * 50304 * 4
    assert result["reference_peak_bytes"] - result["peak_bytes"] == result["saved_bytes"]
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| 512 | torch | ")
    assert row.endswith(" | 0.10 GB |")


def test_less_saved_than_the_logits_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(config_file, overrides, seq_len, tokens, micro_batches, steps):
        loss = overrides[-1].removeprefix(f"{step_memory.LOSS}=")
        return {
            "device": "cpu",
            "precision": "bf16-mixed",
            "rows": tokens // seq_len,
            "vocab_size": 1000,
            "kernels": {"linear_cross_entropy": loss},
            "peak_bytes": 10_000_000 + (3_999_999 if loss == "reference" else 0),
        }

    monkeypatch.setattr(step_memory, "measure_apart", measured)
    assert step_memory.main(["--tokens", "1000", "--sequence", "100", "--loss", "torch"]) == 1
    assert step_memory.main(["--tokens", "900", "--sequence", "100", "--loss", "torch"]) == 0
    with pytest.raises(SystemExit):
        step_memory.main(["--loss", "reference"])
    assert "expected another implementation" in capsys.readouterr().err


def test_peak_memory_counts_what_is_gone_and_not_what_the_parent_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert train_step.peak_resident_bytes() > 150 << 20  # this process has imported torch
    code = (
        "from benchmarks.train_step import peak_resident_bytes\n"
        "block = b'x' * (64 << 20)\n"
        "del block\n"
        "print(peak_resident_bytes())"
    )
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 64 << 20 < peak < 128 << 20
