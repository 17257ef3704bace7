"""Every command of the README runs, in the order in which a reader would type them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The published model reads its data from the hub, which a test cannot: the same command, on the demo's data.
OFFLINE = [
    "--dry-run",
    "data.dataset.name=datasets/demo",
    "data.tokenizer.name=datasets/demo/tokenizer",
    "evaluation.paloma.dataset_name=datasets/demo",
]


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if re.match(r"(make|torchrun|python) ", line)]


def test_the_readme_opens_with_the_two_commands_and_then_the_real_thing():
    assert commands()[:2] == ["make train", "make test"]
    assert commands()[2].startswith("torchrun --standalone --nproc-per-node 1 -m pico_fast.train --config configs/")


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """``make train`` and ``make test`` are what CI runs; here the former's steps with two training steps."""
    for name in ("configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    launchers = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    python = launchers["python"]
    run([*python, "-m", "pico_fast.data.demo_corpus", "--out", "datasets/demo"])
    quick = ["training.max_steps=2", "evaluation.paloma.limit=4"]
    run([*python, "-m", "pico_fast.train", "--config", "configs/demo.yaml", *quick])
    ran = 0
    for command in commands():
        launcher, *arguments = shlex.split(command)
        if launcher == "make":
            continue
        if "configs/pico-decoder-tiny.yaml" in arguments:
            arguments += OFFLINE
        run([*launchers[launcher], *arguments])
        ran += 1
    assert ran >= 6
    assert (tmp_path / "runs" / "demo" / "loss.png").stat().st_size > 10_000
    assert list((tmp_path / "datasets" / "mine" / "data").glob("train-*.parquet"))
