# `make` lists what there is. Everything runs in .venv, made on first use.

PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Three at a time: on two cores one of them often waits for a program it has started.
pytest := $(bin)/python -m pytest -n 3 --dist worksteal --durations 20
# Most of the time of small tests is spent in compiling; the slow ones are optimized.
unoptimized := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-latest check clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

install: $(VENV)/.dev ## the library and all that tests and checks need

demo: $(VENV)/.base ## train a model on handwritten digits, compress it, show what it costs
	rm -rf runs/demo
	$(bin)/python scripts/compress.py --output runs/demo

test: $(VENV)/.dev ## the tests, but for the slow ones
	$(unoptimized) $(pytest) -m "not slow and not gpu"

test-slow: $(VENV)/.dev ## the tests that take longer than five seconds each
	$(pytest) -m "slow and not gpu"

test-latest: ## the same tests on the newest JAX, where a Python >= 3.12 is found
	@python=$$(PYTHON_LATEST="$(PYTHON_LATEST)" .ci/find-python "$(PYTHON)") || exit $$?; \
	if [ -z "$$python" ]; then \
		echo "test-latest: not run, no working Python >= 3.12 here; name one with PYTHON=."; \
	else \
		echo "test-latest: $$python"; \
		$(MAKE) --no-print-directory VENV=.venv-latest PYTHON="$$python" test; \
	fi

check: $(VENV)/.dev ## lint, format, types and import layers
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyrefly check --python-interpreter-path $(bin)/python
	PYTHONPATH=. $(bin)/lint-imports --no-cache --no-logo

clean: ## removes the virtual environments, the caches and the runs
	rm -rf .venv .venv-latest runs build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is made last, so an interrupted installation starts again. hatchling comes
# from constraints.txt as well, hence no build isolation.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxeff needs Python >= 3.11; name one with PYTHON=."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv."; exit 2; }
	$(pip) hatchling editables
	$(pip) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(pip) --no-build-isolation -e ".[dev]"
	@touch $@
