# Two commands on a fresh machine: `make dev` runs everything, `make test` tests everything.
.DEFAULT_GOAL := help
.PHONY: help dev test check lock clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A `uv` on the path that cannot run here (a version-manager shim, say) counts as absent.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)
COMPILE = $(UV) pip compile --quiet --universal --generate-hashes --no-header --no-annotate --upgrade --python-version 3.13

help: ## Show what can be made.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(STAMP) ## Run the proxy and a real agent; print how to call them. PORT= and AGENT_PORT= choose ports.
	@exec $(BIN)/agentflow-proxy dev

test: $(STAMP) ## Run every test.
	$(BIN)/pytest

check: $(STAMP) ## Lint, types, import contracts, dependencies.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

lock: | $(UV) ## Pin every requirement anew, with hashes.
	$(COMPILE) pyproject.toml -o requirements/proxy.txt
	$(COMPILE) --group agent -o requirements/agent.txt
	$(COMPILE) pyproject.toml --group dev -o requirements/dev.txt

clean: ## Remove everything that was made here, secrets of `make dev` included.
	rm -rf $(VENV) .uv .dev .agentflow .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv

$(STAMP): requirements/dev.txt pyproject.toml .python-version | $(UV)
	$(UV) venv --quiet --clear $(VENV)
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@
