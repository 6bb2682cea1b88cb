# Every target makes .venv by itself; a second call finds it made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export RAY_USAGE_STATS_ENABLED := 0
# Threads that spin while they wait are many times slower when the cores are shared.
export OMP_WAIT_POLICY := passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test check bench soak clean

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(VENV)/runtime ## the package and what it needs, in .venv

demo: $(VENV)/runtime ## answer questions about the images that come with the package
	$(BIN)/lavaflow demo

test: $(VENV)/dev ## all tests
	$(BIN)/python -m pytest --numprocesses 2

check: $(VENV)/dev ## format, lint, types, and which package may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev ## speed, exactness and accuracy with the embedded model; prints JSON
	$(BIN)/lavaflow bench vqa
	$(BIN)/lavaflow bench caption
	$(BIN)/python -m benchmarks.exactness
	$(BIN)/python -m benchmarks.choices
	$(BIN)/python -m benchmarks.easy_vqa
	$(BIN)/python -m benchmarks.embedded_domain
	$(BIN)/python -m benchmarks.preprocess
	$(BIN)/python -m benchmarks.quantization

soak: $(VENV)/dev ## runs that are killed at random, for an hour; prints JSON
	$(BIN)/python -m tests.soak

clean: ## remove .venv and what the tools leave behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache lavaflow-demo

# Stamps: they are newer than what they were installed from.
$(VENV)/python-made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/runtime: $(VENV)/python-made pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/python-made pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/runtime
