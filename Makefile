# Every target needs the environment and makes it first: `make demo` or `make test` can be the first command.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := hf,qlora,triton,plot,bench,peers,dev
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: setup build wheel format check lint types test test-fast test-gpu demo bench bench-gpu clean

setup: .venv/.ready  ## the environment, from pinned versions

.venv/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt 'setuptools>=77' wheel ninja numpy torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup  ## everything that needs no GPU, benchmarks once and small among it
	$(BIN)/python -m pytest tests benchmarks --benchmark-disable

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

demo: setup  ## ORPO on nf4 + LoRA next to plain SFT, in minutes on a CPU
	$(BIN)/python -m examples.demo

bench: setup  ## CPU race against every peer; writes benchmarks/results and docs/benchmarks.md
	$(BIN)/python -m benchmarks.run --device cpu --minutes 15
	$(BIN)/python -m benchmarks.report --readme

bench-gpu: setup
	$(BIN)/python -m benchmarks.run --device cuda --minutes 8.5

clean:
	rm -rf .venv build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache
