"""Fixtures of the checkpoint tests."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from pico_fast.checkpoint.layout import RunLayout
from tests.checkpoint.faulty_disk import Scenario


@pytest.fixture
def folder(tmp_path):
    """A folder in memory if there is one: thousands of small files come and go, and a busy disk is slow at that."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def fresh(folder):
    """Makes run directories in the state before the operation, by copying one."""
    counter = itertools.count()

    def make(scenario: Scenario) -> RunLayout:
        template = folder / "template"
        if not template.exists():
            scenario.prepare(template)
        root = folder / f"run{next(counter)}"
        shutil.copytree(template, root, symlinks=True)
        return RunLayout(root)

    return make
