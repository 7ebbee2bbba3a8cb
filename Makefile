# Sealwright's workshop: each target does its own set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
APT := bubblewrap libseccomp2 erofs-utils cryptsetup-bin
APT_TESTS := docker-registry postgresql skopeo softhsm2
JOBS ?= 2

TORCH := 2.13.0
EXTRAS := demo,tracking,edge,dev,fuzz
SLICE ?= 0/1
SECONDS ?= 20

.PHONY: help setup demo image demo-vm demo-vm-edge test coverage test-long vectors kits fuzz gpu-sdk lint format bench bench-peers docs lock clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Make the virtual environment with pinned packages; system packages by apt where it may.

$(VENV)/.ready: pyproject.toml constraints.txt
	@appliance/setup.sh $(APT)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,tracking,edge,dev]'
	@touch $@

demo: setup ## Run one attested federated job and its attacks, end to end.
	@$(VENV)/bin/seal demo

image: setup ## Build the FL image for the virtual platform into build/image (needs root).
	@appliance/setup.sh mmdebstrap bubblewrap
	@test -f build/keys/builder.pem || $(VENV)/bin/seal image keys build/keys
	$(VENV)/bin/seal image build cvm_image/recipes/fl.toml -o build/image --keys build/keys --variant virtual

demo-vm: image ## The federated job of `make demo` with its guests booted as machines from build/image.
	@$(VENV)/bin/seal demo --vm build/image --out build/demo-vm

demo-vm-edge: image ## Devices train through a booted server, inner node and gateway; a gateway on a bare host is refused.
	@$(VENV)/bin/seal demo --edge --vm build/image --out build/demo-vm-edge

test: setup ## Run the tests in parallel.
	-@appliance/setup.sh $(APT_TESTS)
	$(PY) -m pytest -n $(JOBS) -m 'not long'

coverage: setup ## The same, telling which lines the tests' own processes did not run.
	-@appliance/setup.sh $(APT_TESTS)
	$(PY) -m pytest -n $(JOBS) -m 'not long' --cov --cov-report=term:skip-covered

test-long: setup ## Run the tests that take more than seconds (SLICE=1/7: the second seventh of their files).
	-@appliance/setup.sh mmdebstrap nfs-ganesha nfs-ganesha-vfs $(APT_TESTS)
	$(PY) -m pytest -n $(JOBS) -m long --slice $(SLICE)

vectors: setup ## Make the virtual platform's evidence and the device kits' vectors anew, in tests/.
	$(PY) -m attestation.virtual.vectors tests/vectors/virtual
	$(PY) -m fl.edge.kits.vectors tests/fl/edge/vectors

kits: setup ## Build the device kits' cores in a Debian tree of their own, and test them (needs root).
	@appliance/setup.sh mmdebstrap bubblewrap
	fl/edge/kits/build.sh android
	fl/edge/kits/build.sh ios
	$(PY) -m pytest -n $(JOBS) -m long tests/fl/test_device_kits.py

fuzz: setup ## Fuzz every reader of hostile input, SECONDS (20) each; what breaks one is kept in build/fuzz.
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt atheris
	$(PY) tests/fuzz/run.py --seconds $(SECONDS)

gpu-sdk: ## Make the environment of NVIDIA's attestation SDK, which collects GPU evidence, in build/gpu-sdk.
	$(PYTHON) -m venv build/gpu-sdk
	build/gpu-sdk/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints-gpu-sdk.txt nv-attestation-sdk

lint: setup ## Format check, lint, types, layers.
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup ## Rewrite the code in the house's format.
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: setup ## Measure speed, beside the machine's own limits.
	$(PY) -m benchmarks

bench-peers: ## Make the environments of NVIDIA FLARE and Flower, beside which `make bench` then measures, in build/peers.
	$(PYTHON) -m venv build/peers/nvflare
	build/peers/nvflare/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) nvflare==2.9.0
	$(PYTHON) -m venv build/peers/flower
	build/peers/flower/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) \
		--requirement benchmarks/peers/flower-requirements.txt
	build/peers/flower/bin/python -m pip install --quiet --disable-pip-version-check --no-deps flwr==1.42.0

docs: setup ## Build the documentation into build/site, strictly.
	$(VENV)/bin/mkdocs build --quiet --strict --site-dir build/site

lock: setup ## Renew constraints.txt by one joint resolve of everything.
	@mkdir -p build
	$(PY) -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed --report build/resolve.json \
		torch==$(TORCH) --editable '.[$(EXTRAS)]'
	$(PY) -c 'import json; parts = [one["metadata"] for one in json.load(open("build/resolve.json"))["install"]]; \
		lines = sorted("%s==%s" % (one["name"].lower().replace("_", "-"), one["version"].split("+")[0]) for one in parts); \
		print("# One joint resolve of everything that the project and its extras use; `make lock` renews it.", *lines, sep="\n")' \
		> build/constraints.txt
	@grep -v '^sealwright==' build/constraints.txt > constraints.txt

clean: ## Remove what was built.
	rm -rf build .venv .mypy_cache .ruff_cache .import_linter_cache *.egg-info
