# Two commands on a fresh machine: `make dev` runs everything, `make test` tests everything.
.DEFAULT_GOAL := help
.PHONY: help dev test check bench bench-quick bench-phases bench-prove bench-callgrind bench-endurance lock clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := .bench/bin/python
# A `uv` on the path that cannot run here (a version-manager shim, say) counts as absent.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)
COMPILE = $(UV) pip compile --quiet --universal --generate-hashes --no-header --no-annotate --upgrade --python-version 3.13

help: ## Show what can be made.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev: $(STAMP) ## Run the proxy and a real agent; print how to call them. PORT= and AGENT_PORT= choose ports.
	@exec $(BIN)/agentflow-proxy dev

test: $(STAMP) .images/.installed .successor/.installed ## Run every test.
	$(BIN)/pytest

check: $(STAMP) ## Lint, types, import contracts, dependencies, Dockerfiles.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/hadolint deploy/*.Dockerfile

bench: .bench/.installed $(STAMP) ## Measure every contender; results in build/bench/.
	$(BENCH) -m benchmarks.run

bench-quick: .bench/.installed $(STAMP) ## Compare the working tree with COMMIT= (HEAD) within 2 minutes.
	$(BENCH) -m benchmarks.quick $(or $(COMMIT),HEAD)

bench-phases: $(STAMP) ## Measure what each phase of an invoke costs.
	$(BIN)/python -m benchmarks.phases

bench-prove: .bench/.installed $(STAMP) ## Prove that contenders check tokens and count callers.
	$(BENCH) -m benchmarks.prove

bench-endurance: $(STAMP) ## Measure memory, leaks and drain; the table of docs/streaming.md.
	$(BIN)/python -m benchmarks.endurance

bench-callgrind: .bench/.installed $(STAMP) ## Count user-space instructions of ours, under valgrind.
	$(BENCH) -m benchmarks.callgrind

lock: | $(UV) ## Pin every requirement anew, with hashes.
	$(COMPILE) pyproject.toml -o requirements/proxy.txt
	$(COMPILE) --group agent -o requirements/agent.txt
	$(COMPILE) pyproject.toml --group dev -o requirements/dev.txt
	$(COMPILE) --group bench -o requirements/bench.txt
	$(COMPILE) --group build -o requirements/build.txt
	$(COMPILE) --group uv -o requirements/uv.txt
	$(COMPILE) --group successor -o requirements/successor.txt

clean: ## Remove everything that was made here, secrets of `make dev` included.
	rm -rf $(VENV) .bench .images .successor .uv .dev .agentflow .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.bench/.installed: requirements/bench.txt .python-version | $(UV)
	$(UV) venv --quiet --clear .bench
	$(UV) pip sync --quiet --python $(BENCH) --require-hashes requirements/bench.txt
	@touch $@

.successor/.installed: requirements/successor.txt .python-version | $(UV)
	$(UV) venv --quiet --clear .successor
	$(UV) pip sync --quiet --python .successor/bin/python --require-hashes requirements/successor.txt
	@touch $@

# What the images hold, for the tests that run their very commands.
.images/.installed: requirements/proxy.txt requirements/agent.txt .python-version $(STAMP) $(wildcard proxy/*.py proxy/*/* proxy/*/*/* agent_service/*)
	rm -rf .images && mkdir .images
	$(UV) build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir .images
	for image in proxy agent; do \
		$(UV) venv --quiet .images/$$image && \
		$(UV) pip sync --quiet --python .images/$$image/bin/python --require-hashes requirements/$$image.txt && \
		$(UV) pip install --quiet --python .images/$$image/bin/python --no-deps --no-index .images/*.whl || exit 1; \
	done
	@touch $@

.uv/bin/uv: requirements/uv.txt
	python3 -m venv --clear .uv
	.uv/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements/uv.txt

$(STAMP): requirements/dev.txt pyproject.toml .python-version | $(UV)
	$(UV) venv --quiet --clear $(VENV)
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
