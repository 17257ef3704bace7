"""Docstrings are text: no quote marks of the source in them, where a tool wrapped them as if they were strings."""

import ast
from pathlib import Path

import pytest

import pico_fast.data

FILES = sorted(Path(pico_fast.data.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_stray_quote_marks(file):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        for line in (text or "").splitlines():
            assert not line.endswith(' "'), f"{getattr(node, 'name', file.name)}: {line}"
            assert line.count('"') % 2 == 0, f"{getattr(node, 'name', file.name)}: {line}"
