# make run    sets everything up and runs the default job        ARGS="..." adds settings
# make test   sets everything up and runs all tests            ARGS="..." goes to pytest
VENV ?= .venv
PY ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PYTHON := $(VENV)/bin/python
# A machine with an NVIDIA GPU gets the CUDA stack; GADCORE_STACK=cpu or cuda decides by hand.
GADCORE_STACK ?= $(if $(shell command -v nvidia-smi && nvidia-smi -L 2>/dev/null | grep GPU),cuda,cpu)
# Who asks for the CPU stack by name means the CPU, whatever the machine has besides.
ifeq ($(GADCORE_STACK)-$(filter-out file,$(origin GADCORE_STACK)),cpu-$(origin GADCORE_STACK))
export CUDA_VISIBLE_DEVICES :=
endif
# Files of tests beside each other: most tests keep one core busy. PARALLEL= runs them one after the other.
PARALLEL ?= -n 2 --dist loadfile
PACKAGES := $(VENV)/.packages-$(GADCORE_STACK)
READY := $(VENV)/.ready-$(GADCORE_STACK)

.PHONY: run test test-triton test-rehearsal test-without-native packages setup doctor lint lock lock-check clean cuda kernels-aot bench gpu-test gpu-bench
run: $(READY)
	$(PYTHON) -m gadcore.run $(ARGS)

test: $(READY)
	$(PYTHON) -m pytest $(PARALLEL) $(ARGS)
	$(MAKE) --no-print-directory test-triton
	$(MAKE) --no-print-directory test-rehearsal

# Triton's interpreter needs a process of its own; more than one OpenBLAS thread makes its small products 700 times slower.
# GRID= runs every case of the grid, of which a third is taken otherwise.
GRID ?= -m "not by_hand"
test-triton: $(READY)
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL) $(if $(GRID),$(GRID),-m "by_hand or not by_hand") tests/triton tests/kernels/test_grid.py

# The engine on a stand-in for a GPU. Fails as well where a line that runs on a GPU alone was not executed. SAMPLE= runs
# every family and mode, which takes four times as long.
SAMPLE ?= -m "not slow"
test-rehearsal: $(READY)
	rm -rf build/rehearsal
	REHEARSAL_COVERAGE=build/rehearsal TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL) $(SAMPLE) tests/rehearsal
	$(PYTHON) -m bench.offline.cuda_lines build/rehearsal/.coverage.*

# Everything that computes must hold without what only makes a CPU faster as well.
COMPUTES := $(addprefix tests/unit/,checkpoint cpu data evaluate measure memory models rollout train) tests/exactness
test-without-native: $(READY)
	GADCORE_NO_NATIVE=1 $(PYTHON) -m pytest $(PARALLEL) -m "not slow" $(COMPUTES) $(ARGS)

setup: $(READY)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Compiles every Triton kernel for sm_80, sm_90 and sm_100 (no GPU needed) and fails where one spills or does not fit.
kernels-aot: $(READY)
	$(PYTHON) -m bench aot $(ARGS)

# gadcore/_cuda.so, for every target that nvcc knows; fails where a kernel spills.
cuda: $(READY)
	$(PYTHON) csrc/cuda/build.py --report bench/results/cuda.json

# Timings on the CPU, then memory traffic under the interpreter, then docs/measured/kernels.md from all results.
bench: $(READY)
	$(PYTHON) -m bench kernels $(ARGS)
	$(PYTHON) -m bench traffic
	$(PYTHON) -m bench tables

# What is here, what is missing, and what mends it.
doctor: $(READY)
	$(PYTHON) -m gadcore.run doctor $(ARGS)

gpu-test: $(READY)
	$(PYTHON) -m pytest -m gpu $(ARGS)

# About nine minutes on a GPU; --rehearse walks through the same stages without one.
gpu-bench: $(READY)
	$(PYTHON) -m bench gpu $(ARGS)

packages: $(PACKAGES)

# The lock's packages, apart from what is built: sources change more often.
$(PACKAGES): requirements/$(GADCORE_STACK).lock requirements/install.py
	@$(PY) -c 'import sys; sys.exit("gadcore needs Python 3.11 to 3.13, $(PY) is %d.%d: set PY=/path/to/python3.11" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	test -x $(PYTHON) || $(PY) -m venv $(VENV)
	@$(PYTHON) requirements/install.py $(GADCORE_STACK)
	touch $@

# Compiled once here: where PYTHONDONTWRITEBYTECODE is set, every start would compile everything again. Its exit code says
# nothing: torch carries a file in the syntax of a newer Python.
$(READY): $(PACKAGES) setup.py pyproject.toml $(wildcard csrc/cpu/* csrc/cuda/*)
	@echo "gadcore: compiling csrc/, then the packages' Python: about a minute, and longer where cores are busy"
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
ifeq ($(GADCORE_STACK),cuda)
	-$(PYTHON) csrc/cuda/build.py
endif
	PYTHONDONTWRITEBYTECODE= $(PYTHON) -m compileall -qq -j 0 $(VENV)/lib gadcore kernels || true
	touch $@

# For maintainers: pins both environments anew (needs uv; PIP_FIND_LINKS or an index with torch's CPU build), and looks for
# a wheel of every pin for every platform and Python. torch's CPU build is looked up as the release that it is of.
RESOLVE := MACOSX_DEPLOYMENT_TARGET=14.0 uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header
lock:
	$(RESOLVE) $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) --excludes requirements/cpu.excludes requirements/cpu.in -o requirements/cpu.lock
	$(RESOLVE) --excludes requirements/cuda.excludes requirements/cuda.in -o requirements/cuda.lock
	$(MAKE) --no-print-directory lock-check

lock-check:
	@$(call look_up,cpu,x86_64-manylinux_2_31 aarch64-manylinux_2_31 aarch64-apple-darwin)
	@$(call look_up,cuda,x86_64-manylinux_2_31 aarch64-manylinux_2_35)

define look_up
for platform in $(2); do for python in 3.11 3.12 3.13; do \
		echo "requirements/$(1).lock on $$platform, Python $$python"; \
		sed 's/+cpu//' requirements/$(1).lock | MACOSX_DEPLOYMENT_TARGET=14.0 uv pip install --quiet --dry-run --no-deps --only-binary :all: --python-platform $$platform --python-version $$python --target build/lock-check -r - || exit 2; \
	done; done
endef

clean:
	rm -rf $(VENV) build *.egg-info gadcore/_native.so gadcore/_cuda.so
