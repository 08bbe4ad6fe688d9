# Everything runs in .venv, made with python3 (or PYTHON=...) and the versions in constraints.txt.
# Another build of torch, such as CPU only, comes from pip's own settings (PIP_INDEX_URL, ...).

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test test-slow check format bench clean

install: $(INSTALLED)

# torch goes first: it is by far the largest, and everything else is resolved against it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/unmasked demo

test: check
	$(BIN)/python -m pytest

# The full zoo, kills at random moments, plans against what runs then used.
test-slow: install
	$(BIN)/python -m pytest -m slow

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

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
