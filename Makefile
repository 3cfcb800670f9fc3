# `make` alone lists what there is. Everything runs in .venv, made on first use; no root, Python >= 3.11.

PYTHON ?= python3
BIN := .venv/bin
# two workers, one thread each: tests start processes of their own, and every thread more would only wait
WORKERS ?= 2

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: .venv/installed ## create .venv with everything: runtime, PyTorch, test tools

# torch first and alone: pip then takes the wheel of the pinned version instead of weighing all of them
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, got " + sys.version.split()[0] + ": make PYTHON=python3.11 venv")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check "torch==2.13.*"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

.PHONY: engines
engines: .venv/engines ## ExecuTorch, with the small library it runs through, and ONNX Runtime Training in a venv of its own

# without their dependencies: ExecuTorch names many that neither its export nor a device needs
.venv/engines: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps "executorch==1.5.1" "torchao>=0.18,<0.19" \
	  ruamel.yaml flatbuffers tabulate
	$(BIN)/spafl device build-executorch
	$(BIN)/spafl device install-ort-training
	@touch $@

.PHONY: demo
demo: venv ## server, 8 devices, 15 rounds, compact models and a report, on this machine
	$(BIN)/spafl demo

.PHONY: check
check: venv ## lint, format, types, and the walls between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: test
test: check ## check, then every test; those of engines that cannot be installed here are skipped
	@$(MAKE) --no-print-directory engines || echo "some engine cannot be installed here: its tests will be skipped"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: test-arm64
test-arm64: venv ## the device on ARM64, emulated, against x86-64; on Debian or Ubuntu, without root
	@$(MAKE) --no-print-directory engines || echo "some engine cannot be installed here: its tests will be skipped"
	$(BIN)/python -m tests.arm64.sysroot .arm64
	SPAFL_ARM64=.arm64 OMP_NUM_THREADS=1 $(BIN)/pytest tests/arm64 -n $(WORKERS) --dist loadfile -o timeout=900

.PHONY: bench
bench: engines ## every benchmark; fails if one misses its bars
	@failed=0; for name in train_step inference compaction wire engines parity; do \
	  $(BIN)/python benchmarks/$$name.py --check || failed=1; \
	done; exit $$failed

.PHONY: clean
clean: ## remove .venv, caches and the demo's folder
	rm -rf .venv .arm64 demo build dist *.egg-info benchmarks/.bundles
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
