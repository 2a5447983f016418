# Needs Python 3.11 or later, make and a package index. Every target sets itself up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
DEMO := out/demo

.PHONY: install demo demo-model test checks format clean
.DEFAULT_GOAL := install

install: $(STAMP)

# torch goes first and by its exact version, so that nothing else decides which build is fetched
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "realloc needs Python 3.11 or later, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy
	$(PIP) -e '.[dev]'
	@touch $@

# Measures this machine, plans PPO for four ranks on it, and runs the plan.
demo: $(STAMP)
	$(BIN)/realloc profile --quick --ranks 4 --experiment experiments/demo/experiment.yaml -o $(DEMO)/profile.yaml
	$(BIN)/realloc search experiments/demo/experiment.yaml --device $(DEMO)/profile.yaml -o $(DEMO)/plan.yaml
	$(BIN)/realloc run $(DEMO)/plan.yaml --out $(DEMO)/run --overwrite

# Makes experiments/demo/model and prompts.jsonl anew: a language model trained from scratch.
demo-model: $(STAMP)
	$(BIN)/python -m experiments.toy out/toy --seed 1
	$(BIN)/realloc search experiments/demo/sft.yaml -o out/toy/plan.yaml
	$(BIN)/realloc run out/toy/plan.yaml --out out/toy/run --overwrite
	rm -rf experiments/demo/model
	cp -r out/toy/run/models/actor experiments/demo/model
	cp out/toy/prompts.jsonl out/toy/pairs.jsonl experiments/demo/

test: $(STAMP)
	$(BIN)/python -m pytest

checks: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
