# Two commands matter: `make demo` and `make test`. Both build .venv by themselves, once.
#
# On a machine with a CUDA device, install the matching torch into .venv yourself (or set PIP_FLAGS=
# to leave out the pins); as it stands the pinned torch is whatever build pip finds for that version.

PYTHON    ?= python3
VENV      ?= .venv
PIP_FLAGS ?= -c constraints.txt
BIN       := $(VENV)/bin
STAMP     := $(VENV)/.installed

DEMO_DECODERS ?= ar,jacobi,sjd,coupled,coupled:maximal,jacobi@sjd2,sjd2,sjd2:ratio
DEMO_PROMPTS  ?= 16
DEMO_DIR      ?= demo

# One process per core with one thread each: threads of several processes would wait for each other.
WORKERS       ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest format clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e ".[dev]"
	touch $@

demo: $(STAMP)  ## compare all decoders on the bundled model: table, plots and pictures in demo/
	$(BIN)/sjd2 bench --model scenes --decoders $(DEMO_DECODERS) --prompts $(DEMO_PROMPTS) --seed 0 --out $(DEMO_DIR)

test: lint types pytest  ## ruff, pyright and the tests

lint: $(STAMP)  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

pytest: $(STAMP)  ## the tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -n $(WORKERS) --dist loadfile

format: $(STAMP)  ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and the demo's output
	rm -rf $(VENV) $(DEMO_DIR) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
