# make train, make test: each creates .venv, installs pico-fast and runs. Nothing outside this folder is touched.
# make test WORKERS=8 runs the tests in 8 processes, of one thread each.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := datasets/demo
WORKERS ?= 2

.PHONY: train test aot bench lint clean

train: $(INSTALLED)
	$(PY) -m pico_fast.data.demo_corpus --out $(DEMO)
	$(VENV)/bin/torchrun --standalone --nproc-per-node 1 -m pico_fast.train --config configs/demo.yaml
	$(PY) -m pico_fast.report runs/demo --prompt "def "

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal --timeout 600

aot: $(INSTALLED)
	env -u TRITON_INTERPRET $(PY) -m pico_kernels.aot --check tests/kernels/aot_table.json

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
