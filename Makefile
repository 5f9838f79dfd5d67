PYTHON ?= python3
BIN := .venv/bin
# Ray's own switches for a quiet, private test cluster; one thread per process, because the tests compare bits.
TEST_ENV := RAY_AUTH_MODE=disabled RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_USAGE_STATS_ENABLED=0 \
	RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2 OMP_NUM_THREADS=1

# Which of the slow tests; CI leaves out the longest.
SLOW := slow and not gpu

.PHONY: demo test test-slow test-gpu lint format docs clean

demo: .venv/installed  ## forget a digit, on a local Ray
	$(BIN)/python jobs/demo.py

test: .venv/installed-test  ## quick tests, one Ray session
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: .venv/installed-test  ## end to end, several processes, faults
	$(TEST_ENV) $(BIN)/python -m pytest -m "$(SLOW)"

test-gpu: .venv/installed-test  ## on a machine with a CUDA device
	$(TEST_ENV) $(BIN)/python -m pytest -m gpu

lint: .venv/installed-test  ## lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-docs  ## the documentation, in site/; a broken link or reference is an error
	$(BIN)/mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "imu_ray needs Python 3.10 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache
