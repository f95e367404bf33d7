# make demo   fine-tune a real model on real text, on this machine, with nothing but PyPI
# make test   the tests;  make check   lint, types, pages;  make soak   the long tests of reliability, hours
# make docs   the documentation's site, in site/;  make dist   wheel and sdist, checked in an environment of their own

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test soak check format docs dist env clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo/prepare.py --output demo
	$(BIN)/zotune train --config examples/demo/demo.yaml --overwrite

# worksteal: a module's tests stay together, so that what they share is made once, and neither process ends long before the other.
# Containers often forbid Python to keep what it compiled: all modules would be compiled again in every process that tests start.
test: $(VENV)/installed-dev
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist worksteal

# Counts: ZOTUNE_SOAK_KILLS, _CALLS_EVERY, _CALLS_FROM, _RACES, _FUZZ, _SEED, _AT_ONCE (docs/reliability.md).
soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/reliability -m soak -s

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/check.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build
	rm -rf dist && $(BIN)/python -m build --quiet
	rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && fresh/bin/zotune --version && fresh/bin/zotune list && fresh/bin/python ../examples/loop.py

env: $(VENV)/installed-dev

# torch first and pinned: asked for by a range, some resolvers fetch gigabytes of CUDA libraries.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist site
