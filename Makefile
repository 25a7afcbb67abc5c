# The two commands a newcomer needs are `make train` and `make test`; each installs what it needs into .venv.
# TORCH may name another build of the pinned version, for example
#   make train TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install train k2 test test-slow gpu-bench check checks lint format types contract docs pictures wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# torch comes first and is pinned again in constraints.txt, so that nothing after it pulls another build.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

install: $(VENV)/.dev ## make .venv with everything the developer tools need

train: $(VENV)/.run ## train a small K2 on four processes, on the standard library's sources (minutes on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/k2train train experiment=laptop world=processes $(ARGS)

k2: $(VENV)/.run ## run K2's 16 x 16 layout, 256 ranks as threads of one process, for a few steps
	@OMP_NUM_THREADS=1 $(BIN)/k2train train experiment=k2_threads $(ARGS)

test: $(VENV)/.dev ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.dev ## run the tests that take more than a minute each
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow $(ARGS)

gpu-bench: $(VENV)/.dev ## measure one GPU beside the plan, 8 minutes at most (ARGS="--sections 1,4 --json gpu.json")
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .

format: $(VENV)/.dev ## rewrite the sources in the house format
	@$(BIN)/ruff format .

types: $(VENV)/.dev
	@$(BIN)/mypy

contract: $(VENV)/.dev
	@$(BIN)/lint-imports --no-logo

checks: lint types contract
	@$(BIN)/ruff format --check .

check: checks test ## lint, format, types, import contract and tests

# --quiet would hide warnings from --strict.
docs: $(VENV)/.docs ## build the documentation site into build/docs/site; a warning is an error
	@$(BIN)/python tools/site_pages.py build/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file build/docs/mkdocs.yml
	@echo build/docs/site/index.html

pictures: $(VENV)/.run ## draw the pictures of README.md and docs/ again
	@$(BIN)/python -m k2train.schedule.figures docs/pictures
	@$(BIN)/python tools/rooms.py docs/pictures/rooms.svg

wheel: $(VENV)/.dev ## build the wheel into dist/
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean: ## remove what the targets made, runs and corpora excepted
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
