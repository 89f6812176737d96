# make serve   serve the demo model on 127.0.0.1:8000 (MODEL=..., ARGS="--kv-format k8v8 ...")
# make serve MODEL=smollm2   serve a small chat model, from the Hugging Face hub or out of a package
# make test    run the tests        make lint   ruff and mypy
# make test-fast   only the quick ones: no server, no engine, no GPU kernel in the interpreter
# make test-smoke   the few tests that every supported vLLM must pass
# make lock    resolve the lock files anew        make clean   remove .venv and caches
#
# The first serve, test or lint creates .venv from a lock file; later ones don't touch the network.
# VLLM=0.33 does all of this with another supported vLLM, in an environment of its own. Where there is no CPU build of the
# torch that it is locked to, TORCH=2.13.0 takes another.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
TESTS ?= tests
JOBS ?= 2
DEFAULT_VLLM := 0.32
VLLM ?= $(DEFAULT_VLLM)
TORCH ?=

OTHER_VLLM := $(filter-out $(DEFAULT_VLLM),$(VLLM))
VENV := .venv$(addprefix -,$(OTHER_VLLM))
BIN := $(VENV)/bin
HARDWARE := $(if $(shell command -v nvidia-smi),cuda,cpu)
LOCKS := docker/lock
# Of the vLLM that is asked for
LOCK := $(LOCKS)$(addprefix /,$(OTHER_VLLM))
# pip shows what it downloads. Python compiles a module when it is first imported, most of them never.
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --no-deps --no-compile
# Of pip's warnings, all but those of index folders that lack a package: other places have it, or pip fails.
SHELL := /bin/bash
NO_NOISE := 2> >(grep --line-buffered -v -e "^WARNING: Location .* is ignored" -e "^WARNING: Running pip as" >&2)

# Tests start hundreds of processes. Without Python's bytecode on disk each of them would compile the modules anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest

.PHONY: serve test test-fast test-smoke lint lock clean

serve: $(VENV)/serve.done $(if $(filter smollm2,$(MODEL)),$(VENV)/smollm2.done)
	@$(BIN)/fraqtl-serve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: $(VENV)/test.done
	$(PYTEST) -n $(JOBS) --dist loadfile $(TESTS)

test-fast: $(VENV)/test.done
	$(PYTEST) -n $(JOBS) --dist loadfile -m "not (slow or e2e or interpreter or mutation)" $(TESTS)

test-smoke: $(VENV)/test.done
	$(PYTEST) -n $(JOBS) --dist loadfile -m smoke $(TESTS)

lint: $(VENV)/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lock:
	$(PYTHON) $(LOCKS)/make_lock.py

clean:
	rm -rf .venv .venv-* build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -exec rm -rf {} +

$(VENV)/serve.done: $(LOCK)/$(HARDWARE).txt pyproject.toml
	@echo "Installing vLLM and what it needs into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@sed 's/^torch==.*/$(if $(TORCH),torch==$(TORCH),&)/' $(LOCK)/$(HARDWARE).txt > $(VENV)/lock.txt
	@$(PIP_INSTALL) --requirement $(VENV)/lock.txt $(NO_NOISE)
	@$(PIP_INSTALL) --quiet --no-build-isolation --editable . $(NO_NOISE)
	@$(BIN)/python -c 'import torch' || { echo "torch can't be imported. Without an NVIDIA GPU this needs \
	the CPU build of torch: name an index that has it in PIP_EXTRA_INDEX_URL, then make clean"; exit 1; }
	@$(BIN)/python -m fraqtl_serve.cli.prepare
	@touch $@

$(VENV)/smollm2.done: $(VENV)/serve.done $(LOCKS)/smollm2.txt
	@echo "Installing SmolLM2"
	@$(PIP_INSTALL) --requirement $(LOCKS)/smollm2.txt $(NO_NOISE)
	@touch $@

$(VENV)/test.done: $(VENV)/serve.done $(LOCK)/test.txt $(LOCKS)/smollm2.txt
	@echo "Installing what the tests need"
	@$(PIP_INSTALL) --requirement $(LOCK)/test.txt $(NO_NOISE)
	@$(PIP_INSTALL) --requirement $(LOCKS)/smollm2.txt $(NO_NOISE) \
	|| echo "SmolLM2's package can't be had: its tests will be skipped"
	@touch $@
