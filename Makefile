# From a fresh machine: `make train` trains a 4-token model, `make test` runs every test.
# Both set up .venv first, once; a later call finds it ready. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BUILD ?= build/native
ARGS ?=
PYTEST = python -m pytest -n 2 --dist worksteal
# Not exported to all recipes: `env` must find the base interpreter, not the one that it made.
USE = export PATH="$(CURDIR)/$(VENV)/bin:$$PATH";

NATIVE_SOURCES = $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu tests/native/*.h tests/native/*.cpp \
  tests/native/emulator/*.h tests/native/emulator/*.cpp tests/native/emulator/include/*.h examples/cpp/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help env train quick test native sanitize lint format types bench decode-demo fuzz clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." passes options on to mtp train, pytest, the benchmarks'

env: ## .venv with the extension built in place (every command below does this first)
	@command -v $(PYTHON) >/dev/null || { echo "mtp_ext: no '$(PYTHON)': install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "mtp_ext: '$(PYTHON)' is too old: install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) .ci/environment.py $(EXTRAS)

train: env ## train the n=4 model on the standard library's source; ARGS="--help" tells its options
	@$(USE) mtp train $(ARGS)

quick: EXTRAS = test
quick: env ## pytest without what is marked slow, and without the native tests: under a minute on two cores
	@$(USE) $(PYTEST) -m "not slow" $(ARGS)

test: EXTRAS = test
test: env ## all tests: pytest, then the native ones; ARGS="-k name" selects in pytest
	@$(USE) $(PYTEST) $(ARGS)
	@$(MAKE) --no-print-directory native

native: EXTRAS = test
native: env ## build csrc/ without torch, warnings as errors, and run its tests
	@$(USE) .ci/native.sh $(BUILD) $(CMAKE_ARGS)

sanitize: ## the native tests under AddressSanitizer and UBSan
	@$(MAKE) --no-print-directory native BUILD=build/sanitize \
	  CMAKE_ARGS="-DMTP_EXT_SANITIZE=address,undefined -DMTP_EXT_OPS=OFF -DMTP_EXT_CUDA=OFF"

lint: EXTRAS = dev test
lint: env ## ruff and clang-format, both only looking
	@$(USE) ruff check . && ruff format --check .
	@$(USE) clang-format --dry-run -Werror $(NATIVE_SOURCES) && echo "clang-format: $(words $(NATIVE_SOURCES)) files are clean"

format: EXTRAS = dev test
format: env ## ruff and clang-format, rewriting
	@$(USE) ruff check --fix . && ruff format . && clang-format -i $(NATIVE_SOURCES)

types: EXTRAS = dev test
types: env ## mypy, strict
	@$(USE) mypy

bench: EXTRAS = bench
bench: env ## every benchmark; ARGS="--quick --device cpu" for a look
	@$(USE) for file in benchmarks/suites/[a-z]*.py; do python -m "benchmarks.suites.$$(basename "$$file" .py)" $(ARGS) || exit 1; done

decode-demo: env ## train two small models, decode unseen packages with drafts: 45 minutes; ARGS="--minutes 2" for a look
	@$(USE) python -m benchmarks.studies.decode_demo $(ARGS)

fuzz: EXTRAS = test
fuzz: env ## the property tests with many more examples
	@$(USE) $(PYTEST) -m hypothesis --hypothesis-profile=fuzz --timeout=0 $(ARGS)

clean: ## remove what was built, and the tools' caches
	rm -rf build dist python/*.egg-info python/mtp_ext/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
