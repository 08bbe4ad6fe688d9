# Everything runs in .venv, made with python3 (or PYTHON=...) and the versions in constraints.txt.
# Another build of torch, such as CPU only, comes from pip's own settings (PIP_INDEX_URL, ...).

PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
# Processes that share the tests, each of one thread, so that they do not wait for one another. A
# process takes up to 3 GB: make test WORKERS=4 where there are cores and memory for it.
WORKERS ?= 2
SHARED := OMP_NUM_THREADS=1
SHARE := --numprocesses $(WORKERS) --dist worksteal
INSTALLED := .venv/.installed

.PHONY: install demo test test-slow test-lowest check format bench docs clean

install: $(INSTALLED)

# The version is checked here because pip would find out only after it has downloaded torch. torch
# goes first: it is by far the largest, and everything else is resolved against it.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"error: Python 3.11 or later is needed, and $(PYTHON) is older. Fix: name a newer one: \
	make $(MAKECMDGOALS) PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/unmasked demo

test: check
	$(SHARED) $(BIN)/python -m pytest $(SHARE)

# The full zoo, kills at random moments, plans against what runs then used.
test-slow: install
	$(BIN)/python -m pytest -m slow

# The quick tests with the lowest versions that pyproject.toml allows. Old releases have no wheels
# for a new Python: make test-lowest PYTHON=python3.11
test-lowest:
	test -x $(LOWEST)/pip || $(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install packaging
	$(LOWEST)/pip install --no-deps --editable .
	$(LOWEST)/python scripts/lowest.py > .venv-lowest/constraints.txt
	$(LOWEST)/pip install --constraint .venv-lowest/constraints.txt --editable '.[dev]'
	$(SHARED) $(LOWEST)/python -m pytest $(SHARE)

check: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install
	$(BIN)/python -m benchmarks

# The pages as a site, in site/; nothing in it is loaded from elsewhere.
docs: install
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-lowest build dist site src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
