# make demo   the whole job once, on the bundled model
# make test   style, types and the test suite
# Each sets up .venv first, with the exact versions of constraints.txt, where that is not done yet.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench clean

demo: .venv/ready
	$(BIN)/ropewalk demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: .venv/ready
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/band_switch.py
	$(BIN)/python benchmarks/prefill.py

# The link is for mypy, which does not follow editable installs.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test]'
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/ropewalk
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
