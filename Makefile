# make demo: sets everything up, makes a tiny model and a video, exports, asks.   make test: sets everything up, runs the tests.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.vlrt-setup
JOBS ?= 2
PYTHON ?= python3

.PHONY: demo test lint format docs setup reproduce bench peers-setup report gpu wheel-test clean

demo: setup
	$(BIN)/python examples/demo.py

# One thread per worker: workers that each take all cores slow each other down.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the site to build/site.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Trains and compares four ways to reason, and their ablations: 47 minutes on two busy cores of a Xeon; goes on where it was.
reproduce: setup
	$(BIN)/python examples/reproduce.py reproduction

# The quick set and its report: under 10 minutes on two quiet cores; the first time, what it runs is exported too.
# peers-setup makes the environment of OpenVINO GenAI, without which it is reported as absent.
bench: setup
	$(BIN)/python -m pytest benches/

peers-setup:
	sh tools/setup-peers

# Draws report.md and its plots again, from the JSON files alone.
report: setup
	$(BIN)/python -m benches.report

# Needs a GPU and a Python that has torch, triton and transformers already; from the source tree, nothing is installed.
gpu:
	$(PYTHON) -m benches.gpu

# Builds sdist and wheel, installs the wheel elsewhere, runs the tests of the command line with the sources out of reach.
wheel-test: setup
	sh tools/test-wheel $(VENV)

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py tools/setup
	sh tools/setup $(VENV)
	@touch $@

clean:
	rm -rf build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
