# make setup       environment into .venv
# make quickstart  a size x context x heads grid, its tables, laws and pictures, in runs/quickstart
# make test        the fast tests, with what `make setup` brings; what needs more is skipped, and counted at the end
# make test-slow   the slow tests and those that need more, in .venv-aot; make lint the style
# make test-thorough   what costs most: every case of every kernel, all compilers, statistics, PyTorch, SkyPilot
# make aot         .venv-aot: .venv's packages, compilers for TPUs and GPUs that are not there, and others that some tests need
# make sky         .venv-sky: SkyPilot, which reads the tasks that are written for it
# make torch       .venv-torch: PyTorch and transformers, which training is compared with
# make debian      Chromium and Slurm, of Debian or Ubuntu: as root
# make first-light-check   compiles every program of benchmarks.first_light for an H100 and an H200
# make first-light-pack    what a GPU machine without network lacks for it, and the command to run there

PYTHON := .venv/bin/python
# In the order of their names: else files of few tests come last, and the longest tests are in files of few.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: setup aot sky torch debian quickstart test test-slow test-thorough lint bench first-light-check first-light-pack clean

setup: .venv/.installed
aot: .venv-aot/.installed
sky: .venv-sky/.installed
torch: .venv-torch/.installed

# uv finds or brings a Python 3.12; without it, a python3.12 or python3 on the PATH that is new enough.
define environment
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --seed $(@D); \
	else \
	  for python in python3.12 python3.13 python3.14 python3 python; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "gqa_jax needs Python 3.12 or newer, and there is none on the PATH: install python3.12, or uv" >&2; exit 1; \
	  fi; \
	  echo "$(@D): $$("$$found" --version)"; \
	  "$$found" -m venv $(@D) || { echo "install the venv module of Python (Debian: python3.12-venv), or uv" >&2; exit 1; }; \
	fi
endef

.venv/.installed: pyproject.toml constraints.txt
	$(environment)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv-aot/.installed: pyproject.toml constraints.txt
	$(environment)
	.venv-aot/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,aot,peers,datasets,readers]'
	@touch $@

.venv-sky/.installed: Makefile
	$(environment)
	.venv-sky/bin/python -m pip install --quiet 'skypilot==0.14.1'
	@touch $@

# python3, of 3.11 or newer: PyTorch's builds lag behind Python's.
.venv-torch/.installed: Makefile
	python3 -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet torch==2.13.0 transformers==5.24.0 numpy
	@touch $@

debian: tests/debian.txt
	apt-get update
	sed 's/#.*//' tests/debian.txt | DEBIAN_FRONTEND=noninteractive xargs apt-get install --yes --no-install-recommends

quickstart: setup
	JAX_PLATFORMS=cpu $(PYTHON) -m launch run configs/grids/quickstart.py

# A worker per CPU, a file of tests at a time each. Most of the time of what runs in JAX is compilation: without LLVM's
# optimizations the kernels' tests take a third less. Not in the slow lane, which looks at what compilers for accelerators make.
test: setup
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" $(PYTHON) $(PYTEST)

# The test that kills processes for two minutes comes last, alone.
test-slow: aot
	.venv-aot/bin/python $(PYTEST) -m '(slow or needs) and not thorough' --ignore tests/test_chaos.py --durations 20
	.venv-aot/bin/python -m pytest -m slow tests/test_chaos.py

# Before a release, and before a change of what they are about lands: attention, laws, what is compiled, what is compared.
test-thorough: aot
	.venv-aot/bin/python $(PYTEST) -m thorough --durations 20

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: setup torch
	$(PYTHON) benchmarks/data.py
	$(PYTHON) -m benchmarks.train --torch_python .venv-torch/bin/python
	$(PYTHON) -m benchmarks.attention
	$(PYTHON) -m benchmarks.launch
	$(PYTHON) -m benchmarks.laws

first-light-check: aot
	rm -rf runs/first-light-check
	for card in h100 h200; do \
	  .venv-aot/bin/python -m benchmarks.first_light --compile_only $$card --check --out runs/first-light-check/$$card || exit 1; \
	done

first-light-pack: setup
	$(PYTHON) -m benchmarks.first_light_pack gather

clean:
	rm -rf .venv .venv-aot .venv-sky .venv-torch build .first-light *.egg-info
