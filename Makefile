# valohai-dagster: everything a checkout can do. Needs Python >= 3.10 and a package index; see `make help`.
#
# The virtual environment lies in the checkout. Stamp files remember which pyproject.toml it was made from, so that
# the second `make` of anything starts at once.

SHELL       := /bin/sh
.DEFAULT_GOAL := help

PYTHON      ?= python3
VENV        ?= .venv
BIN         := $(VENV)/bin
PORT        ?= 3000
PYTEST_ARGS ?=
BENCH_ARGS  ?=
WORKERS     ?= 2
LAST_TESTS  ?= test-end-to-end
OLDEST_VENV ?= .venv-oldest
BENCH_VENV  ?= .venv-bench

MANIFESTS   := pyproject.toml agent/pyproject.toml
RUN_STAMP   := $(VENV)/.valohai-run
DEV_STAMP   := $(VENV)/.valohai-dev
OLDEST_STAMP := $(OLDEST_VENV)/.valohai-oldest
BENCH_STAMP := $(BENCH_VENV)/.valohai-bench
OLDEST_PINS := deploy/oldest-dagster.txt
OLDEST_TESTS := tests/contract/plugin tests/integration/plugin/driver

export DAGSTER_DISABLE_TELEMETRY ?= yes

.PHONY: help setup setup-dev setup-servers demo up down test test-end-to-end test-oldest lint format docs bench-capacity bench-dispatch bench-fleet bench-recovery bench-transfer agent agent-lock clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':.*  ## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(RUN_STAMP)  ## Make the virtual environment

setup-dev: $(DEV_STAMP)  ## The same with everything that tests and lint need

setup-servers:  ## Install the object stores that tests talk to (S3, GCS, Azure Blob, Swift)
	@sh tests/servers/install.sh "$(PYTHON)"

demo: $(RUN_STAMP)  ## Run the example project on the embedded default and print a summary
	@$(BIN)/valohai-dagster demo

up: $(RUN_STAMP)  ## Start the UI with everything behind it (PORT=3000)
	@$(BIN)/valohai-dagster up --port $(PORT)

down: $(RUN_STAMP)  ## Stop the embedded services of this checkout
	@$(BIN)/valohai-dagster down

test: $(DEV_STAMP)  ## Pass the whole suite: lint, then tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory setup-servers || echo 'Without these servers the tests of remote stores are skipped.'
	$(BIN)/python -m pytest tests/unit tests/contract tests/integration -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory -j2 $(LAST_TESTS)

test-end-to-end: $(DEV_STAMP)  ## The last part of the suite alone: from the outermost doors
	$(BIN)/python -m pytest tests/e2e $(PYTEST_ARGS)

test-oldest: $(OLDEST_STAMP)  ## What leans on Dagster's inner parts, on the oldest Dagster that is supported
	$(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS) -n $(WORKERS) --dist worksteal -m 'not slow' $(PYTEST_ARGS)

lint: $(DEV_STAMP)  ## Formatting, lint, types and the floors of the architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

format: $(DEV_STAMP)  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(RUN_STAMP)  ## Write the generated pages (docs/settings.md)
	$(BIN)/python -m valohai_dagster.settings_docs

agent: $(RUN_STAMP)  ## Make the agent as one file for worker machines, dist/valohai-agent.pyz
	@$(BIN)/valohai-dagster agents build dist/valohai-agent.pyz

agent-lock:  ## Pin newer dependencies of that file (needs uv)
	uv pip compile -q --upgrade --universal --generate-hashes --python-version 3.10 --no-header --no-annotate --extra ssh \
		agent/pyproject.toml -o valohai_dagster/capacity/bootstrap/agent-requirements.txt

bench-capacity: $(DEV_STAMP)  ## 1,000 simulated worlds: machines leaked, work lost, cost beside an ideal planner (BENCH_ARGS)
	@$(BIN)/python -W ignore -m bench.capacity $(BENCH_ARGS)

bench-dispatch: $(RUN_STAMP)  ## Time from launch to first output line, against Dagster's default launcher
	@$(BIN)/python -m bench.dispatch $(BENCH_ARGS)

bench-fleet: $(DEV_STAMP)  ## Thousands of executions at once: memory, CPU, throughput and lag (BENCH_ARGS)
	@$(BIN)/python -W ignore -m bench.fleet $(BENCH_ARGS)

bench-recovery: $(DEV_STAMP)  ## Conductors, Redis and Postgres killed under load: what is lost, what happens twice (BENCH_ARGS)
	@$(BIN)/python -W ignore -m bench.recovery $(BENCH_ARGS)

bench-transfer: $(RUN_STAMP) $(BENCH_STAMP)  ## Downloads and uploads beside aws, obstore, s5cmd and rclone; needs nginx (BENCH_ARGS)
	@$(BIN)/python -W ignore -m bench.transfer --peers $(BENCH_VENV)/bin $(BENCH_ARGS)

clean:  ## Stop what runs and remove everything that make made
	-@if [ -x $(BIN)/valohai-dagster ]; then $(BIN)/valohai-dagster down; fi
	rm -rf $(VENV) $(OLDEST_VENV) $(BENCH_VENV) .servers .valohai .demo .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +

# -- environment ----------------------------------------------------------------------------------------------------

$(BIN)/python:
	@sh deploy/make-venv.sh create "$(PYTHON)" "$(VENV)"

$(RUN_STAMP): $(MANIFESTS) | $(BIN)/python
	@sh deploy/make-venv.sh install "$(VENV)" -e ./agent -e '.[embedded]'
	@touch $@

$(DEV_STAMP): $(MANIFESTS) | $(BIN)/python
	@sh deploy/make-venv.sh install "$(VENV)" -e ./agent -e '.[embedded,observability,postgres,ssh,aws,gcp,azure,openstack,swift]' --group dev
	@touch $@ $(RUN_STAMP)

$(OLDEST_VENV)/bin/python:
	@sh deploy/make-venv.sh create "$(PYTHON)" "$(OLDEST_VENV)"

$(OLDEST_STAMP): $(MANIFESTS) $(OLDEST_PINS) | $(OLDEST_VENV)/bin/python
	@sh deploy/make-venv.sh install "$(OLDEST_VENV)" -c $(OLDEST_PINS) -e ./agent -e '.[embedded,postgres,aws]' --group test-runner
	@touch $@

$(BENCH_VENV)/bin/python:
	@sh deploy/make-venv.sh create "$(PYTHON)" "$(BENCH_VENV)"

$(BENCH_STAMP): $(MANIFESTS) | $(BENCH_VENV)/bin/python
	@sh deploy/make-venv.sh install "$(BENCH_VENV)" --group bench
	@touch $@
