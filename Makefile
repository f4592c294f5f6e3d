# On a bare machine with Python 3.11, gcc and make, each target sets up what it needs, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/first
# two processes of one thread are faster than one of two: the models of the tests are tiny
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: run test test-worlds check style index docs bench clean

run: $(VENV)/ready  ## tune the sandbox model and write the report
	$(BIN)/salience tune --out $(OUT)

# a file's slow tests share what they set up, so they stay in one process
test: $(VENV)/ready  ## the fast tests, then the slow ones
	$(TESTS)
	$(TESTS) -m slow --dist loadfile

test-worlds: $(VENV)/ready  ## train the sandbox's models whole and test what they have learnt (ten minutes)
	$(TESTS) -m world

check: $(VENV)/ready  ## format, lint, types, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/build.py --check

style: $(VENV)/ready  ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

index: $(VENV)/ready  ## regenerate the tables of methods in README and docs
	$(BIN)/python docs/build.py

docs: index  ## the documentation as one folder of HTML pages, site/
	$(BIN)/python docs/build.py --site site

bench: $(VENV)/ready  ## rerun every paper's claim on this machine
	$(BIN)/salience bench --all --out benchmarks/results/claims

# torch first and pinned: a plain `torch` would pull gigabytes of CUDA onto a machine without a GPU
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache
