# make setup       environment into .venv
# make quickstart  a size x context x heads grid, its tables, laws and pictures, in runs/quickstart
# make test        the fast tests; make test-slow the others; make lint the style
# make aot         compilers for TPUs and GPUs that are not there, which some tests need
# make first-light-pack   what a GPU machine without network lacks for benchmarks.first_light, and the command to run there

PYTHON := .venv/bin/python
STAMP := .venv/.installed

.PHONY: setup aot quickstart test test-slow lint bench first-light-pack clean

setup: $(STAMP)

# uv finds or brings a Python 3.12; without it, a python3.12 or python3 on the PATH that is new enough.
$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --seed .venv; \
	else \
	  for python in python3.12 python3.13 python3.14 python3 python; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "gqa_jax needs Python 3.12 or newer, and there is none on the PATH: install python3.12, or uv" >&2; exit 1; \
	  fi; \
	  echo "using $$("$$found" --version)"; \
	  "$$found" -m venv .venv || { echo "install the venv module of Python (Debian: python3.12-venv), or uv" >&2; exit 1; }; \
	fi
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

aot: setup
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev,aot]'

quickstart: setup
	JAX_PLATFORMS=cpu $(PYTHON) -m launch run configs/grids/quickstart.py

# A worker per CPU, a file of tests at a time each.
test: setup
	$(PYTHON) -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: setup
	$(PYTHON) -m pytest -m slow --durations 10

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: setup
	$(PYTHON) benchmarks/data.py
	$(PYTHON) -m benchmarks.train
	$(PYTHON) -m benchmarks.attention
	$(PYTHON) -m benchmarks.launch
	$(PYTHON) -m benchmarks.laws

first-light-pack: setup
	$(PYTHON) -m benchmarks.first_light_pack gather

clean:
	rm -rf .venv build .first-light *.egg-info
