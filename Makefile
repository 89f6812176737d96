# make serve   serve the demo model on 127.0.0.1:8000 (MODEL=..., ARGS="--kv-format k8v8 ...")
# make test    run the tests        make lint   ruff and mypy
# make lock    resolve the lock files anew        make clean   remove .venv and caches
#
# The first serve, test or lint creates .venv from a lock file; later ones don't touch the network.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
TESTS ?= tests
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
HARDWARE := $(if $(shell command -v nvidia-smi),cuda,cpu)
LOCKS := docker/lock

.PHONY: serve test lint lock clean

serve: $(VENV)/serve.done
	$(BIN)/fraqtl-serve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

lint: $(VENV)/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lock:
	$(PYTHON) $(LOCKS)/make_lock.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

$(VENV)/serve.done: $(LOCKS)/$(HARDWARE).txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --requirement $(LOCKS)/$(HARDWARE).txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch' || { echo "torch can't be imported. Without an NVIDIA GPU this needs \
	the CPU build of torch: name an index that has it in PIP_EXTRA_INDEX_URL, then make clean"; exit 1; }
	touch $@

$(VENV)/test.done: $(VENV)/serve.done $(LOCKS)/test.txt
	$(BIN)/pip install --quiet --no-deps --requirement $(LOCKS)/test.txt
	touch $@
