# Everything is set up on first use: a .venv here, and Debian packages where this is root.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint format build wheel setup tools clean

ENGINE ?= udp

demo: build            ## three backends, a balancer, real clients, every move (ENGINE=xdp; ARGS=--stay keeps it running)
	@$(BIN)/python -m backend.demo --engine $(ENGINE) $(ARGS)

test: build tools      ## all tests (ARGS="-k reset" for some)
	@$(BIN)/python -m pytest $(ARGS)

bench: build           ## the tables of docs/performance.md (ARGS="decision memory" for some parts)
	@$(BIN)/python -m bench $(ARGS)

lint: setup            ## what a reviewer would run
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run .ci/setup .ci/tools .ci/build-bpf deploy/container/lock deploy/compose/prepare deploy/debian/build deploy/debian/postinst deploy/debian/prerm
	@$(BIN)/hadolint deploy/container/Dockerfile

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

build: setup           ## the xdp engine's program
	@sh .ci/build-bpf

wheel: build           ## a wheel with the program in it, in dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

setup:
	@PYTHON="$(PYTHON)" sh .ci/setup

tools: setup           ## what only tests use
	@sh .ci/tools

clean:
	rm -rf .venv build dist *.egg-info bench/build bench/results lb/xdp/*.bpf.o .pytest_cache .mypy_cache .ruff_cache .hypothesis
