# Two commands for newcomers: `make train` and `make test`. Everything else serves them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: train test test-all lint install wheel-test lowest clean

train: install
	$(BIN)/sophia-galore prepare-data
	$(BIN)/sophia-galore train --config configs/quickstart.yaml

test: install lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# With what `make test` leaves out, too: more combinations of what is crossed, and the commands of all pages. What is
# marked `by_hand` takes an hour more.
test-all: install lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not by_hand"

lint: install
	$(BIN)/ruff check src tests bench examples
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/mypy

install: $(VENV)/.installed

# The stamp is newer than what decides about the installation only if it was made from just that.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# What needs a package index: the wheel in an empty environment, and the tests with the lowest versions of all packages.
wheel-test:
	PYTHON=$(PYTHON) .ci/wheel

lowest:
	PYTHON=$(PYTHON) .ci/lowest

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
