# make demo   profile, optimize and prove the embedded models; leaves actkit-report/index.html
# make test   the tests          make lint   ruff, mypy, import-linter
# make zoo    train the embedded models again (about an hour on two cores)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint zoo clean

demo: .venv/.installed
	$(BIN)/actkit optimize swiglu --out actkit-report --overwrite

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

zoo: .venv/.installed
	$(BIN)/python scripts/train_zoo.py

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[report,zoo,dev]"
	touch $@

clean:
	rm -rf .venv actkit-report
