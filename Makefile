# Everything is set up on first use: a .venv here, and Debian packages where this is root.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint format setup clean

demo: setup            ## three backends, a balancer, real clients, every move (ARGS=--stay keeps it running)
	@$(BIN)/python -m backend.demo $(ARGS)

test: setup            ## all tests (ARGS="-k reset" for some)
	@$(BIN)/python -m pytest $(ARGS)

bench: setup           ## the tables of docs/performance.md (ARGS="decision memory" for some parts)
	@$(BIN)/python -m bench $(ARGS)

lint: setup            ## what a reviewer would run
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run .ci/setup

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup:
	@PYTHON="$(PYTHON)" sh .ci/setup

clean:
	rm -rf .venv build dist *.egg-info bench/build bench/results .pytest_cache .mypy_cache .ruff_cache .hypothesis
