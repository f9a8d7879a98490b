# Everything is set up on first use: a .venv here, and Debian packages where this is root.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test interop bench lint format build wheel setup tools adapters clean

ENGINE ?= udp

demo: build            ## three backends, a balancer, real clients, every move (ENGINE=xdp; ARGS=--stay keeps it running)
	@$(BIN)/python -m backend.demo --engine $(ENGINE) $(ARGS)

test: build tools adapters ## all tests (ARGS="-k reset" for some)
	@$(BIN)/python -m pytest $(ARGS)

interop: build adapters ## every client at every server, the table of docs/interop.md (ARGS="--servers quinn" for some)
	@$(BIN)/python -m tests.interop $(ARGS)

bench: build           ## the tables of docs/performance.md (ARGS="decision memory" for some parts)
	@$(BIN)/python -m bench $(ARGS)

lint: setup            ## what a reviewer would run
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run .ci/setup .ci/tools .ci/adapters .ci/build-bpf backend/adapters/*/build.sh tests/adapters/*/build.sh deploy/container/lock deploy/compose/prepare deploy/debian/build deploy/debian/postinst deploy/debian/prerm
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

adapters: setup        ## servers of other makes, made routable
	@sh .ci/adapters

clean:
	rm -rf .venv build dist *.egg-info bench/build bench/results lb/xdp/*.bpf.o .pytest_cache .mypy_cache .ruff_cache .hypothesis
