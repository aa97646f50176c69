# `make demo` and `make test` set up everything on a machine that has Python 3.11 or later, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With fewer of TensorFlow's notes on processors and missing GPUs.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test test-thorough test-oldest lint format types docs docs-test bench zoo wheel check-wheel tutorials clean

# Three sets of packages, each noted by a file that is newer than pyproject.toml while the set is up to date.
DEMO := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("keras_kd needs Python 3.11 or later; PYTHON=... chooses one" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(DEMO)

$(DOCS): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(DEMO)

demo: $(DEMO)  ## teacher, student alone, student distilled, LiteRT file: a table and a picture in runs/demo
	$(BIN)/keras-kd demo

test: $(DEV)  ## all tests, the slow ones and those of the examples too, on all cores
	$(BIN)/python -m pytest -n auto --dist worksteal

test-thorough: $(DEV)  ## more random networks and architectures of the same tests, for minutes
	$(BIN)/python -m pytest -n auto --dist worksteal -m thorough

test-oldest: $(BIN)/python  ## tests with the lower bounds of pyproject.toml, in .venv-oldest: many minutes
	$(BIN)/python tools/check_oldest.py

lint: $(DEV)  ## style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(DEV)  ## formats the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(DEV)  ## the type checker
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation site in build/site; a warning, a broken link or a missing name is an error
	$(BIN)/python -m tools.website.build

docs-test: $(DEV)  ## the examples in docstrings, in the README and in docs
	$(BIN)/python -m pytest tests/test_docstrings.py tests/test_readme.py tests/test_docs_code.py

tutorials: $(DEV)  ## executes the tutorials and writes their notebooks
	$(BIN)/python tools/build_tutorials.py

bench: $(DEMO)  ## the benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/distiller.py
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/recorded.py
	$(BIN)/python benchmarks/comparison.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/pruning.py --quality
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/quantization.py --quality
	$(BIN)/python benchmarks/quantization.py --keras
	$(BIN)/python benchmarks/analysis.py

zoo: $(DEMO)  ## every loss on Fashion-MNIST, 3 seeds: about half an hour; goes on where it was stopped
	$(BIN)/python benchmarks/zoo.py

wheel: $(DEV)  ## wheel and sdist in dist/
	$(BIN)/python -m build --quiet

check-wheel: wheel  ## both files, each installed into an empty environment with all that it declares, do a small job there
	$(BIN)/python tools/check_packages.py dist --download

clean:  ## removes what was made
	rm -rf $(VENV) .venv-oldest build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
