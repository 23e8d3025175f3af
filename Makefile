# Every target needs the environment and makes it first: `make demo` or `make test` can be the first command.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := hf,qlora,triton,plot,bench,peers,dev,dist,docs
# Another build: `make setup TORCH='torch==2.13.0 --index-url ...'`
TORCH ?= torch==2.13.0
TORCH_VERSION ?= 2.13.0
FILES ?= $(wildcard dist/*.whl dist/*.tar.gz)
# Where others use the processor: `make bench BENCH='--threads 1 --clock cpu'`
BENCH ?=
# Two tests at a time on two cores; at most four, for the memory they take. `make test WORKERS=`: one.
WORKERS ?= -n auto --maxprocesses 4 --dist worksteal
# Other trainers, each in an environment over .venv.
INTEGRATIONS ?= trl19 trackers llamafactory axolotl unsloth
FAST := tests/csrc tests/engine tests/ops tests/kernels/test_launches.py tests/kernels/test_workspace.py tests/test_architecture.py \
	tests/test_guard.py tests/test_layout.py tests/test_loss.py tests/test_options.py tests/test_reference.py
SAN_ENV = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)"
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: setup build dist wheels try release-check format check docs test test-fast test-integrations test-gpu \
	kernels-report gpu-session demo bench bench-gpu clean

setup: .venv/.ready  ## the environment, from pinned versions

.venv/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt 'setuptools>=77' wheel ninja numpy $(TORCH)
	# PyPI's torch for Linux brings the one Triton that it works with; a CPU build brings none.
	$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/pip install -q triton==3.9.0
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

setup-%: .venv-%/.ready ;  ## an environment of its own: trl19, axolotl, llamafactory, unsloth, trackers, race

.PRECIOUS: .venv-%/.ready
.venv-%/.ready: constraints/%.txt .venv/.ready
	$(BIN)/python -m tests.environments.overlay $*

build: setup  ## C++ in place; SAN=1: with address and undefined-behaviour sanitizers, and its tests
	ORPO_KERNELS_EXTENSION=required $(BIN)/python setup.py -q build_ext --inplace --force
ifeq ($(SAN),1)
	$(SAN_ENV) $(BIN)/python -m pytest tests/csrc tests/engine/tiles -m "not slow" -p no:cacheprovider
endif

dist: setup  ## in dist/: source, wheel without C++, wheel for this machine; each installed anew and used
	$(BIN)/python -m tools.dist

wheels: setup  ## in dist/: what is published; the Linux wheel is built in a container (docker)
	$(BIN)/python -m tools.dist --publish

release-check:  ## TAG=v1.2.3: version.py, CHANGELOG.md and CITATION.cff agree
	$(PYTHON) -m tools.release $(TAG)

try:  ## FILES, as make dist tries them: PYTHON=python3.12 TORCH_VERSION=2.15.0
	$(PYTHON) -m tools.dist --try $(FILES) --python $(PYTHON) --torch $(TORCH_VERSION)

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*

	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

docs: setup  ## the documentation site, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # -q would not count warnings

test: setup  ## everything that needs no GPU, benchmarks once and small among it; a test per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests benchmarks --benchmark-disable --durations=20 $(WORKERS)

test-fast: setup  ## on every change: ops, engine, C++ and launches, a minute or two on two cores; slow tests left out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST) -m "not slow and not gpu" $(WORKERS)

test-integrations: setup  ## adapters in TRL, Liger, and in the environments of INTEGRATIONS, which it makes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_trl.py tests/integrations/test_liger.py \
		tests/integrations/test_documented.py $(WORKERS)
	$(BIN)/python -m tests.environments.check $(INTEGRATIONS)

test-integration-%: setup  ## of one of INTEGRATIONS
	$(BIN)/python -m tests.environments.check $*

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

kernels-report: setup  ## every Triton kernel compiled for ten GPUs: registers, spills, memory
	$(BIN)/python -m tests.kernels.compile_report

gpu-session: setup  ## all there is to do on a rented GPU, in nine minutes
	$(BIN)/python -m tests.gpu.session --out runs/gpu

demo: setup  ## ORPO on nf4 + LoRA next to plain SFT, in minutes on a CPU
	$(BIN)/python -m examples.demo

bench: setup-race  ## CPU race against every peer, 15 minutes of it; again: goes on. Writes docs/benchmarks.md
	.venv-race/bin/python -m benchmarks.run --device cpu --minutes 15 $(BENCH)
	$(BIN)/python -m benchmarks.report --readme

bench-gpu: setup
	$(BIN)/python -m benchmarks.run --device cuda --minutes 8.5

clean:
	rm -rf .venv .venv-* build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache
