# make train, make test: each creates .venv, installs pico-fast and runs. Nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := datasets/demo

.PHONY: train test bench lint clean

train: $(INSTALLED)
	$(PY) -m pico_fast.data.demo_corpus --out $(DEMO)
	$(VENV)/bin/torchrun --standalone --nproc-per-node 1 -m pico_fast.train --config configs/demo.yaml
	$(PY) -m pico_fast.report runs/demo --prompt "def "

test: $(INSTALLED)
	$(PY) -m pytest

bench: $(INSTALLED)
	$(PY) -m benchmarks

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else \
	  "pico-fast needs Python 3.10 to 3.13, this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) runs/demo build *.egg-info
