# Every target sets itself up in .venv, from a fresh clone too; the second time that takes no time.
#   make test    the tests, against the installed package      make demo   trace facts in the built-in world
#   make bench   the benchmarks                                make lint   style of Python and C++
#   make build   the native module in the source tree          make clean  remove what was built
#   make docs    the documentation as a site, out/site/index.html (its search needs `python -m http.server -d out/site`)
#   make walkthrough  what a newcomer does from a fresh clone, in order, with times (WALK_FLAGS)
#   make campaign     10,000 malformed inputs and 200 kills; docs/reliability.md (CAMPAIGN_FLAGS, CAMPAIGN_OUT)
#   make versions     tests of models, sweep and tracing on the oldest transformers supported and on the newest
#   make real    the tables and figures of real models (hours; goes on where it was; REAL_WORK, REAL_FLAGS; docs/real-models.md)
#   make constraints  write down the versions that .venv has, after tests passed on them
#   make gpu     on a machine with a GPU: build, test there, benchmark (GPU_OUT, GPU_PYTHON, GPU_FLAGS)
# PYTHON chooses the interpreter for a new .venv; KNOWEDIT_CUDA=AUTO|ON|OFF is explained in CMakeLists.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# The versions that tests passed on; Python 3.10, which some of them are too new for, takes what there is.
INSTALL = $(PIP) install --quiet $(shell $(BIN)/python -c \
    "import sys; print('-c constraints.txt' * (sys.version_info >= (3, 11)))")
# Not `python -m pytest`, which puts this folder first on the path: Python 3.10 knows no PYTHONSAFEPATH.
PYTEST := PYTHONSAFEPATH=1 KNOWEDIT_TEST_INSTALLED=1 $(BIN)/pytest
SOURCES := $(shell find knowedit_ext csrc -type f -not -name '*.pyc' -not -name '*.so') \
           setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard README.md) LICENSE
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Prints a list of requirements kept in pyproject.toml, so that versions are written down once.
TOML = import importlib, sys; toml = importlib.import_module('tomllib' if sys.version_info > (3, 11) else 'pip._vendor.tomli')
REQUIREMENTS = $(BIN)/python -c "$(TOML); print(*toml.load(open('pyproject.toml', 'rb'))$(1), sep='\n')"

.PHONY: demo test docs walkthrough campaign versions constraints bench real gpu gpu-check gpu-measure lint build clean

demo: $(VENV)/.installed
	$(BIN)/knowedit demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal python_tests

walkthrough:
	PYTHONPATH=python_tests $(PYTHON) -m walkthrough $(WALK_FLAGS)

CAMPAIGN_OUT ?= out/campaign

campaign: $(VENV)/.installed
	HYPOTHESIS_EXAMPLES=500 OMP_NUM_THREADS=1 $(PYTEST) -q python_tests/campaign/test_generated.py
	PYTHONSAFEPATH=1 PYTHONPATH=python_tests $(BIN)/python -m campaign --out $(CAMPAIGN_OUT) $(CAMPAIGN_FLAGS)

versions: $(VENV)/.installed
	.ci/transformers oldest
	.ci/transformers newest

REAL_WORK ?= out/real

real: $(VENV)/.installed
	$(BIN)/python benchmarks/real.py --work $(REAL_WORK) $(REAL_FLAGS)

# Upgrade what is pinned first: rm -rf .venv, empty constraints.txt, make test.
constraints: $(VENV)/.installed $(VENV)/.lint $(VENV)/.build $(VENV)/.docs
	$(PIP) freeze --exclude torch --exclude knowedit_ext | grep '==' > $@.txt

bench: $(VENV)/.installed
	$(PYTEST) benchmarks
	$(BIN)/python benchmarks/run.py

# No network and no set-up: what is there must do. The interpreter of .venv if there is one, else PYTHON.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_OUT ?= out/gpu

gpu:
	$(MAKE) gpu-check; checked=$$?; $(MAKE) gpu-measure && exit $$checked

gpu-check gpu-measure: gpu-%:
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/gpu.py $* $(GPU_OUT)/$* $(GPU_FLAGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

docs: $(VENV)/.installed $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

build: $(VENV)/.build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py build_ext --inplace

clean:
	rm -rf build dist *.egg-info knowedit_ext/_C*.so .pytest_cache .ruff_cache .benchmarks $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit('knowedit needs Python 3.10 or newer, \
	and $(PYTHON) is %d.%d: make PYTHON=python3.12 ...' % v)"
	$(PYTHON) -m venv $(VENV)
	touch $@

# An installed torch that will do stays, CUDA build or not; there is never a second one.
$(VENV)/.torch: | $(VENV)/.created
	$(BIN)/python -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 9)" 2>/dev/null \
	    || $(PIP) install torch==2.13.0
	touch $@

# build/lib would carry deleted modules into the wheel.
$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	@echo "Into $(VENV): some minutes, and more with nvcc on PATH (KNOWEDIT_CUDA=OFF leaves the CUDA kernels out)."
	rm -rf build/lib* build/bdist*
	$(INSTALL) ".[test]"
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.created
	$(call REQUIREMENTS,['project']['optional-dependencies']['dev']) | xargs $(INSTALL)
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.created
	$(call REQUIREMENTS,['project']['optional-dependencies']['docs']) | xargs $(INSTALL)
	touch $@

$(VENV)/.build: pyproject.toml | $(VENV)/.created
	$(call REQUIREMENTS,['build-system']['requires']) | xargs $(INSTALL)
	touch $@
