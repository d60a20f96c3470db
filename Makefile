# The two commands of the README are `make generate PROMPT="..."` and `make test`; both set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= A lighthouse keeper turns to us and says <S>the storm is coming<E>. Audio: wind, waves and a distant bell
OUT ?= clip.mp4
GOLDEN ?= tests/golden
TORCH ?= torch==2.13.0

.PHONY: setup protos generate test parity lint clean
.DEFAULT_GOAL := setup

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e ".[dev]"
	@touch $@

ovi/.generated: $(VENV)/.installed $(shell find protos -name '*.proto')
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  $(shell find protos -name "*.proto")
	@find ovi -type d -exec touch {}/__init__.py \;
	@touch $@

setup: $(VENV)/.installed ovi/.generated  ## environment and stubs

protos: ovi/.generated

generate: setup  ## a clip from PROMPT into OUT
	$(BIN)/ovi generate "$(PROMPT)" -o "$(OUT)" $(ARGS)

test: setup  ## every test
	$(BIN)/python -m pytest $(ARGS)

parity: setup  ## golden vectors of GOLDEN, one line a comparison
	$(BIN)/python -m tests.parity.compare "$(GOLDEN)"

lint: setup  ## style, types, import directions, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && $(CURDIR)/$(BIN)/buf lint

clean:
	rm -rf $(VENV) ovi build *.egg-info
