"""Every flipped bit and every truncation is found, and the command says so."""

import random
import subprocess
import sys

import pytest
import torch

from pico_fast.checkpoint import verify
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.manifest import BLOCK_BYTES
from pico_fast.checkpoint.save import save_checkpoint
from pico_fast.config_io import load_config, to_yaml

FILES = ["state/rank_00000.safetensors", "state/manifest.json", "config.json", "model.safetensors"]


@pytest.fixture
def layout(tmp_path):
    layout = RunLayout(tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model/a": torch.randn(700_000, generator=generator),
        "model/b": torch.randn(70, 1000, generator=generator),
    }

    def export(folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(2 * BLOCK_BYTES + 5))

    save_checkpoint(layout, 1, tensors=tensors, meta={"row": 3}, write_extra=export)
    return layout


def flip(path, position, bit):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("name", FILES)
def test_one_bit_in_any_block(layout, name):
    path = layout.step_dir(1) / name
    size = path.stat().st_size
    chance = random.Random(name)
    edges = {0, size - 1, *range(BLOCK_BYTES, size, BLOCK_BYTES), *range(BLOCK_BYTES - 1, size, BLOCK_BYTES)}
    inside = {chance.randrange(start, min(start + BLOCK_BYTES, size)) for start in range(0, size, BLOCK_BYTES)}
    for position in sorted(edges | inside):
        bit = chance.randrange(8)
        flip(path, position, bit)
        verdict = verify_step(layout, 1)
        assert not verdict.good
        assert name in "".join([*verdict.state, *verdict.exports])
        assert bool(verdict.state) == name.startswith("state/")
        if name == FILES[0]:
            start = position // BLOCK_BYTES * BLOCK_BYTES
            assert f"bytes {start} to {min(start + BLOCK_BYTES, size) - 1}" in verdict.state[0]
        flip(path, position, bit)
    assert verify_step(layout, 1).good


@pytest.mark.parametrize("name", FILES)
def test_any_other_length(layout, name):
    path = layout.step_dir(1) / name
    whole = path.read_bytes()
    for content in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        assert not verify_step(layout, 1).good
    path.unlink()
    assert any("missing" in text for text in [*verify_step(layout, 1).state, *verify_step(layout, 1).exports])


def test_exports_can_be_left_out(layout):
    (layout.step_dir(1) / "config.json").unlink()
    assert verify_step(layout, 1, exports=False).good
    assert not verify_step(layout, 1).good


def test_the_command(layout, capsys):
    assert verify.main([str(layout.root)]) == 0
    assert capsys.readouterr().out == "step_1  good  3 files, 5.2 MB\n"
    save_checkpoint(layout, 20, tensors={"model/a": torch.ones(3)}, meta={})
    flip(layout.state_dir(1) / "rank_00000.safetensors", 2_000_000, 3)
    assert verify.main([str(layout.root)]) == 1
    bad, good = capsys.readouterr().out.splitlines()
    assert bad.startswith("step_1  BAD  state/rank_00000.safetensors: the checksum of bytes 1048576 to 2097151")
    assert good.startswith("step_20  good  1 files")


def test_the_command_runs_as_documented(layout):
    command = [sys.executable, "-W", "error", "-m", "pico_fast.checkpoint.verify", str(layout.root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_reads_folder_names_from_the_run(tmp_path, capsys):
    config = load_config(
        None, [f"checkpointing.runs_dir={tmp_path}", "checkpointing.run_name=r", "checkpointing.checkpoints_dir=ckpt"]
    )
    layout = RunLayout.from_config(config.checkpointing)
    save_checkpoint(layout, 1, tensors={"model/a": torch.ones(3)}, meta={})
    layout.training_config.write_text(to_yaml(config))
    assert verify.main([str(layout.root)]) == 0
    assert "step_1  good" in capsys.readouterr().out


def test_the_command_without_a_checkpoint(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
    (tmp_path / "training_config.yaml").write_text("modle: {}")
    assert verify.main([str(tmp_path)]) == 2
    assert "modle" in capsys.readouterr().err


def test_a_tensor_that_is_not_the_manifests_is_found_on_load(layout, monkeypatch):
    # the block checksums agree here: only the tensor's own hash can tell
    import pico_fast.checkpoint.load as load

    verdict = verify_step(layout, 1)
    swapped = [entry.__class__(**{**vars(entry), "xxh3_128": "0" * 32}) for entry in verdict.manifest.tensors]
    manifest = verdict.manifest.__class__(**{**vars(verdict.manifest), "tensors": swapped})
    monkeypatch.setattr(load, "verify_step", lambda *_: verdict.__class__(1, manifest))
    with pytest.raises(Exception, match="another checksum than in the manifest"):
        latest_good(layout)
