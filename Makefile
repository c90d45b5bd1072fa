# Everything a fresh machine needs: Python 3.11 and make.
#   make demo            watch a real server decode faster
#   make test            the test suite

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3, \
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
MODEL ?= nano
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help set-up demo test test-all test-v2 lint format docs clean

help:  ## what can be made
	@grep -E '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## */|/' | \
		awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

set-up:  ## create .venv and install into it (every target does this first)
	$(if $(strip $(PYTHON)),,$(error No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3.11))
	@"$(strip $(PYTHON))" tools/set_up.py --extras cpu,dev

demo: set-up  ## plain decoding, vLLM's ngram and ours, served and compared (MODEL=nano, small, or a folder)
	@$(BIN)/vllm-spec demo --model "$(MODEL)"

# One thread per process: spinning OpenMP threads of several processes starve each other.
test test-all test-v2: export OMP_NUM_THREADS := 1
test test-all test-v2: export VLLM_CPU_OMP_THREADS_BIND := nobind
test test-all test-v2: export VLLM_CPU_KVCACHE_SPACE := 1
# A file stays with one process: its engines are shared by its tests. Files in the order of
# `testpaths`, those with engines first.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: set-up  ## the test suite without the slow ones
	$(BIN)/pytest -m "not slow" $(SPREAD)

test-all: set-up  ## every test
	$(BIN)/pytest $(SPREAD)

# Triton is interpreted from the start of a process or not at all.
test-v2: export VLLM_SPEC_TEST_V2 := 1
test-v2: set-up  ## every test of model runner V2, on the CPU in Triton's interpreter
	$(BIN)/pytest integration_tests/v2 -n auto --maxprocesses 4

lint: set-up  ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: set-up  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs:  ## build the documentation into ./site
	$(if $(strip $(PYTHON)),,$(error No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3.11))
	@"$(strip $(PYTHON))" tools/set_up.py --extras cpu,dev,docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what was built, not .venv
	rm -rf build dist site demo_output .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
