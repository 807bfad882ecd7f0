# Every target makes .venv when it is missing or stale; no other command is needed first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON := python3.11
UV := uv==0.13.9
READY := .venv/.ready

# Stages call `python`; it must be the one that holds the locked packages.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export GX_ANALYTICS_ENABLED := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# DVC keeps an experiment (`make quick`) as a commit, which needs a name; where git knows none, this one.
ifeq ($(shell git config user.email 2>/dev/null),)
export GIT_AUTHOR_NAME ?= popen
export GIT_AUTHOR_EMAIL ?= popen@localhost
export GIT_COMMITTER_NAME ?= popen
export GIT_COMMITTER_EMAIL ?= popen@localhost
endif

.PHONY: help repro quick test test-all lint format clean ui up down lock samples

help:
	@echo "make repro    train, align, benchmark and report (only what changed)"
	@echo "make quick    the same in little, with a fifth of SFT: a first look on a slow machine"
	@echo "make test     the tests, but for those that kill servers or train in several processes"
	@echo "make test-all all tests"
	@echo "make lint     ruff and mypy"
	@echo "make format   put the code into ruff's format"
	@echo "make ui       MLflow's pages on http://127.0.0.1:5000"
	@echo "make up       start Prefect's server and worker and MLflow's pages; print their addresses"
	@echo "make down     stop what make up started"
	@echo "make samples  draw the default data set in samples/ anew"
	@echo "make lock     resolve requirements.lock anew from pyproject.toml"
	@echo "make clean    remove caches, checkpoints and built results (not MLflow's records, DVC's cache, a judge's answers)"

repro: $(READY)
	dvc repro

# Into params.yaml goes what conf/scale/quick.yaml says; git checkout params.yaml takes it back.
quick: $(READY)
	dvc exp run -S scale=quick

# One thread a worker, and one worker more than cores, four at most: much of the time servers are waited for.
PYTEST := OMP_NUM_THREADS=1 pytest -n $$(( $$(nproc) < 4 ? $$(nproc) + 1 : 4 )) --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

format: $(READY)
	ruff check --fix .
	ruff format .

ui: $(READY)
	@case "$${MLFLOW_TRACKING_URI:-}" in \
	    http*) echo "MLFLOW_TRACKING_URI names a server of MLflow's: its pages are there" ;; \
	    *) mlflow ui --host 127.0.0.1 --port 5000 \
	        --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" ;; esac

up: $(READY)
	python -m flows.services up

down: $(READY)
	python -m flows.services down

samples: $(READY)
	rm -rf samples
	popen scenes samples

lock: $(READY)
	uv pip compile pyproject.toml --extra dev --python-version 3.11 --upgrade \
	    --no-emit-index-url --no-annotate --no-header -o requirements.lock

clean:
	@! ls .popen/service-* >/dev/null 2>&1 || { echo "error: services run: make down first" >&2; exit 1; }
	rm -rf artifacts reports .popen build *.egg-info \
	    .pytest_cache .mypy_cache .ruff_cache .hypothesis
	# what a judge has answered was paid for
	find .checkpoints -mindepth 1 -maxdepth 1 ! -name judge -exec rm -rf {} + 2>/dev/null || true
	find popen flows tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# uv reads none of pip's settings, so where only pip knows the way to a registry, pip installs.
# Compiling at install saves each of the pipeline's processes seconds at its first import.
$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on the PATH." \
	    "Install Python 3.11 (for example: apt install python3.11 python3.11-venv) and run make again." >&2; exit 1; }
	@test -x .venv/bin/pip || $(PYTHON) -m venv --clear .venv || { echo "error: $(PYTHON) cannot make .venv." \
	    "Install its venv module (for example: apt install python3.11-venv) and run make again." >&2; exit 1; }
	.venv/bin/pip install --quiet --disable-pip-version-check "$(UV)"
	uv pip sync --python .venv/bin/python --compile-bytecode requirements.lock \
	    || .venv/bin/pip install --disable-pip-version-check -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
