# Everything a newcomer needs with Python, make and pip alone.
#   make demo   set up, train the nano preset for two to three minutes, sample, draw pictures
#   make test   set up, run the tests
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN = .venv/bin
RUN ?= runs/demo

.PHONY: help demo test test-slow lint notebooks clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo        set up, train the nano preset, sample, draw pictures (3 to 6 minutes)'
	@echo 'make test        set up, run the tests'
	@echo 'make test-slow   the long tests too'
	@echo 'make lint        ruff and mypy'
	@echo 'make notebooks   build and run notebooks/*.ipynb from their .py'
	@echo 'make clean       remove .venv and runs/demo'

demo: .venv/run.stamp
	$(BIN)/mhcjax train --preset nano --total-steps 600 --run $(RUN)
	$(BIN)/mhcjax sample $(RUN) --prompt "def __init__(self" --tokens 96
	$(BIN)/mhcjax inspect $(RUN)
	@echo 'pictures: $(RUN)/loss.png and $(RUN)/mixing.png'

test: .venv/dev.stamp
	$(BIN)/python -m pytest

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest --slow

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

notebooks: .venv/dev.stamp
	$(BIN)/python tests/test_notebooks.py

clean:
	rm -rf .venv runs/demo

# `--without-pip` and `pip --python` need no ensurepip, which some distributions leave out; a pip
# older than 22.3 does not know --python, and then a plain venv serves.
.venv/bin/python:
	@test -n '$(PYTHON)' || { echo 'mhcjax needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3'; exit 2; }
	@echo 'making .venv with $(PYTHON)'
	@if $(PYTHON) -m pip --python $(PYTHON) --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --without-pip .venv; else $(PYTHON) -m venv .venv; fi

PIP = $$( [ -x $(BIN)/pip ] && echo '$(BIN)/python -m pip' || echo '$(PYTHON) -m pip --python $(BIN)/python' )

.venv/run.stamp: pyproject.toml | .venv/bin/python
	@echo 'installing mhcjax (about 200 MB to download)'
	@$(PIP) install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/dev.stamp: pyproject.toml .venv/run.stamp
	@echo 'installing what the tests need'
	@$(PIP) install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
