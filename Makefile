# lrtune: every target works as the first command on a fresh clone.

STUDY  ?= studies/digits.toml
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup tune resume report dashboard test test-slow test-data lint docs bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  STUDY=studies/x.toml chooses the study (default $(STUDY)), PYTHON=python3.12 the interpreter"

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "lrtune needs Python 3.11 to 3.13, got %d.%d. Choose one: make PYTHON=python3.12 ..." % v)'
	@echo "Making $(VENV) (once, a few minutes) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

setup: $(READY) ## make .venv with lrtune and everything the tests need

tune: $(READY) ## tune STUDY, or resume it
	@$(BIN)/lrtune tune $(STUDY)

resume: tune ## the same as tune: a study resumes by itself

report: $(READY) ## rebuild the report of STUDY from its storage
	@$(BIN)/lrtune report $(STUDY)

dashboard: $(READY) ## open the Optuna dashboard on STUDY, at http://127.0.0.1:8080/
	@$(BIN)/lrtune dashboard $(STUDY)

test: $(READY) ## run the quick tests
	@$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(READY) ## run the tests that kill processes, start servers, or tune whole studies
	@$(BIN)/python -m pytest -m "slow and not data" -n 2

test-data: $(READY) ## run the tests on the public data in the folder that LRTUNE_DATA names
	@$(BIN)/python -m pytest -m data

lint: $(READY) ## ruff, a strict type checker, a look for secrets and for packages with known faults
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/detect-secrets-hook $$(git ls-files)
	@found=$$($(BIN)/pip-audit -r requirements.txt --no-deps --disable-pip --progress-spinner off 2>&1) || \
	  if echo "$$found" | grep -q "known vulnerabilit"; then echo "$$found"; exit 1; fi; \
	  if echo "$$found" | grep -qi "could not be audited\|connection\|resolve"; then \
	  echo "pip-audit: advisories cannot be looked up from here, so the packages were not audited"; fi

docs: $(READY) ## make the reference pages of docs/ from the code
	@$(BIN)/python -m pipeline.reference

bench: $(READY) ## measure lrtune against model.fit and a plain Optuna script
	@$(BIN)/python -m benchmarks.epoch
	@$(BIN)/python -m benchmarks.engine
	@$(BIN)/python -m benchmarks.new_seeds
	@$(BIN)/python -m benchmarks.memory
	@$(BIN)/python -m benchmarks.folds
	@$(BIN)/python -m benchmarks.study

clean: ## remove the environment; results and storage stay
	@rm -rf $(VENV)
