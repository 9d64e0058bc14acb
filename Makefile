# Each target does its own set-up: a virtual environment with a constrained install (see constraints.txt).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench gpu docs wheels release-check release clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt CMakeLists.txt src/largemargin/backends/cpu.cpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab,dev]'
	touch $(READY)

setup: $(READY) ## the virtual environment, with the package in editable mode

demo: $(READY) ## compare losses on handwritten digits, with clean and with 30% wrong labels: under 2 minutes
	$(BIN)/largemargin compare --label-noise 0 0.3 --out runs/demo

test: $(READY) ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m 'not slow'

test-all: $(READY) ## every test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q

lint: $(READY) ## format, lint, types, import rules, workflow files
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet --strict-collection .github

format: $(READY) ## format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY) ## time, memory and accuracy beside torch's cross-entropy: results/bench/, docs/performance.md and the tables of docs/scaling.md; 10 minutes
	$(BIN)/python benchmarks/time_cpu.py
	$(BIN)/python benchmarks/floor_cpu.py
	$(BIN)/python benchmarks/memory_cpu.py
	$(BIN)/python benchmarks/surface.py
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/linear_cpu.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/training_cpu.py
	$(BIN)/python benchmarks/check_ratio.py --commit
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/scaling_page.py

gpu: ## all that needs a GPU, in 8 minutes, by $(PYTHON) as it is, without installing anything: results/gpu/; ARGS="--minutes 5"
	$(PYTHON) benchmarks/gpu_all.py $(ARGS)

docs: $(READY) ## run every code block of the README and docs/, and build the site: build/site/index.html
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheels: ## dist/: the source distribution and both wheels, each installed into a clean environment and used
	.ci/check-wheel dist

release-check: ## refuse a development version, an unclean tree and an unwritten changelog
	.ci/release-check

release: release-check lint test docs wheels ## check all, build dist/ and tag the commit
	git tag --annotate "v$$(.ci/release-check)" --message "largemargin $$(.ci/release-check)"

clean: ## remove what the other targets made, but for runs/
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
