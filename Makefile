# Slipway: `make up` trains, gates and serves a model on this machine; `make down` removes it. Needs Python 3.11+, nothing else.
STACK ?= local
PYTHON ?= python3
EXTRAS ?= [trainer,serving]
DEV := [trainer,serving,dev]
BIN := .venv/bin
# uv reads no pip configuration: hand it the index that pip was given, if any.
INSTALL = $(BIN)/uv pip install --python $(BIN)/python $${PIP_INDEX_URL:+--default-index "$$PIP_INDEX_URL"} -c constraints.txt --compile-bytecode --quiet
# $(call quietly,WHAT,COMMANDS): one line for both, with a dot every two seconds; the dots end with this shell, however it ends.
quietly = printf '%s ' '$(1)' >&2; (while sleep 2 && kill -0 $$$$ 2>/dev/null; do printf . >&2; done) & dots=$$!; \
	{ $(2); }; code=$$?; kill $$dots; echo >&2; exit $$code

.PHONY: help up down clean test e2e bench lint format constraints
.DEFAULT_GOAL := help

help: ## Show this help
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

up: .venv/installed ## Train, evaluate, gate, publish and serve the stack STACK (default: local) on this machine
	@$(BIN)/slipway local up -s $(STACK)

down: .venv/installed ## Stop everything that `up` started; keeps datasets, checkpoints and the registry
	@$(BIN)/slipway local down -s $(STACK)

clean: .venv/installed ## `down`, and remove datasets, checkpoints and the registry of STACK too
	@$(BIN)/slipway local down -s $(STACK) --volumes

test: .venv/dev lint ## Set up, check style, types and imports, run all tests
	@$(BIN)/pytest -n 2 --dist loadfile

e2e: .venv/dev ## Run the stories of a real Kubernetes on this machine (Debian, root, Go; or Docker; or a kubeconfig)
	@$(BIN)/pytest tests/e2e

lint: .venv/dev ## Style, types, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --level error
	@$(BIN)/lint-imports --no-cache

format: .venv/dev ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/dev ## Run the benchmarks side by side with their peers; rows go to build/bench/NAME.json
	@$(BIN)/python -m tests.bench

constraints: .venv/dev ## Pin the newest versions of everything
	@$(BIN)/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
		--no-header --no-annotate --no-emit-index-url -o constraints.txt

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Slipway needs Python 3.11 or newer. Fix: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up .venv (once)" >&2
	@$(PYTHON) -m venv .venv || { echo "error: Python has no venv module. Fix: apt-get install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/uv
	@$(call quietly,Installing packages (once),$(INSTALL) -e '.$(EXTRAS)')
	@touch $@

.venv/dev: .venv/installed
	@$(call quietly,Installing what tests need (once),$(INSTALL) -e '.$(DEV)')
	@touch $@
