# Everything that a fresh machine with Python 3.11+ and make needs happens here; nothing else has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GUESTS := build/real-guest
FREE := build/free-threaded

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench docs dist clean
.PHONY: real-guest free-threaded test-rules test-machines mutate soak fuzz judges

help:  ## show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -e '.[fast,guest,kds,batch,test]'
	@touch $@

demo: $(STAMP)  ## one attestation end to end: the series' exit first, then today's, then what differs
	$(BIN)/swsnp demo --compare

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check src tests bench examples fuzz
	$(BIN)/ruff format --check src tests bench examples fuzz

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

test: $(STAMP) lint types  ## everything that passes on any host, with branch coverage
	$(MAKE) --no-print-directory -j2 test-rules test-machines
	$(BIN)/python -m tests.mutation --checks

test-rules: $(STAMP)
	$(BIN)/python -m pytest --ignore=tests/property --cov --cov-report=term:skip-covered

test-machines: $(STAMP)
	$(BIN)/python -m pytest -q tests/property

mutate: $(STAMP)  ## remove every check in turn, arms and limits too: some test must fail; writes build/mutation.json
	$(BIN)/python -m tests.mutation --table

soak: $(STAMP)  ## the state machines at random for SWSNP_SOAK_STEPS steps, 2,000,000 unless told
	SWSNP_SOAK_STEPS=$${SWSNP_SOAK_STEPS:-2000000} $(BIN)/python -m pytest -q tests/property

judges: build/judges/.installed  ## verifiers by others, in an environment of their own, for tests/judges

build/judges/.installed: requirements-judges.txt
	$(PYTHON) -m venv build/judges
	build/judges/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-judges.txt
	@touch $@

fuzz: $(STAMP)  ## every reader of foreign bytes, FUZZ_SECONDS each, 60 unless told; findings go to build/fuzz
	$(BIN)/python -m fuzz

real-guest: $(STAMP)  ## Debian's kernels as SNP guests on KVM, in an outer machine where this host's cannot; some minutes
	tools/real-guest-files $(GUESTS)
	rm -rf $(GUESTS)/wheel $(GUESTS)/installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(GUESTS)/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(GUESTS)/installed $(GUESTS)/wheel/*.whl
	REAL_GUEST=$${REAL_GUEST:-yes} PYTHONPATH=$(CURDIR)/$(GUESTS)/installed $(BIN)/python -m pytest -s --durations=3 tests/real_guest

# what vCPU threads run through; the tests' own modules need not say that they can do without the lock
free-threaded: $(FREE)/.installed  ## vCPU threads beside each other: CPython without its lock, built here; some minutes
	$(FREE)/venv/bin/python -X gil=0 -m pytest -q -p no:cacheprovider tests/free_threaded tests/abi tests/conformance \
		$(addprefix tests/unit/,cpu_builtin crypto firmware guest hardware hypervisor_api hypervisor_run plain_kvm vmm) tests/e2e/plain_kvm \
		$(addprefix tests/e2e/test_,hostile_guest.py hostile_host.py machine.py moved_guest.py rotation.py scale.py)

$(FREE)/.installed: pyproject.toml requirements-dev.txt tools/free-threaded-python
	tools/free-threaded-python $(FREE)/python
	$(FREE)/python/bin/python3.14t -m venv --clear $(FREE)/venv
	$(FREE)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -e '.[fast,guest]' pytest hypothesis
	@touch $@

bench: $(STAMP)  ## ratios against the cryptographic floor, measured in one run; writes build/bench.json
	$(BIN)/python -m bench.run

dist: $(STAMP)  ## the wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/dist .

clean:
	rm -rf $(VENV) build .coverage .mypy_cache .pytest_cache .ruff_cache
