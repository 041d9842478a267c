# One target per habit; each does whatever set-up is still missing, so any of them can be the first one typed.
#   make setup   install everything needed to run, then say what this machine has
#   make align   the whole method on the default model and data; make align CONFIG=FILE.yaml ARGS="key=value ..."
#   make evaluate   one policy, on held-out rows and public benchmarks; make evaluate ARGS="policy=FOLDER key=value ..."
#   make compare   what the weights buy: SFT, SPIN, LD-Align by every kind of weights, hours; make compare COMPARE=FILE.yaml ARGS="..."
#   make tour    one pair through the whole method with its numbers, a minute (docs/tour.md); make tour ARGS="policy=toy"
#   make report RUN=FOLDER   a run folder's report again
#   make test    the tests (CPU only; GPU tests are skipped with a reason); ARGS="-k name" to choose
#   make test-slow   the long ones: every write point, a hundred kills; some hours; ARGS="-k T1_" for the kills, minutes
#   make reliability   the tests of the fault matrix, long ones too, and docs/reliability.md made of their results
#   make gpu-check   what can be known of the GPU path without a GPU: every kernel compiled by every Triton that
#                    a supported torch brings, and the other tests marked gpu_check, long ones too; an hour of a core
#   make lint    ruff and mypy
#   make docs    the pages as a site, site/index.html; needs no network once its packages are there
#   make bench   the benchmarks, the peers' environments made first; make bench ARGS="--only step" for one of them
#   make profile   where the time of a training step and of a generation goes: table, figure, traces for Perfetto
#   make fuzz    every reader of files against 10,000 damaged and hostile inputs; ARGS="--count 300" for fewer
#   make mutate  which small changes of the code no test notices, docs/mutation.md; make mutate MODULES="objective" MUTANTS=600
#   make test-options   every pair of choices of the keys that select code, in runs of two steps of the real model
#   make gpu     on a CUDA machine, without a network: build the extension, run every GPU test and benchmark, one table
#   make check-env   what this machine has, and which backend each operation will use
# PYTHON=python3.12 chooses the interpreter, GPUS=2 the number of processes of `make align`.
# Where PYTHON already has a torch that sees a GPU, that torch is used; else requirements/torch.txt is installed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup check-env align tour evaluate compare report test test-slow gpu-check reliability fuzz mutate test-options lint docs bench profile gpu

VENV := .venv
DOCS := .venv-docs
CONFIG ?= configs/smollm2-135m.yaml
COMPARE ?= configs/compare-wordings.yaml
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -q

# A name on the PATH may be a launcher of a version that is not installed: only trying it tells.
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.13 python3,\
	$(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))

SEES_GPU := import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); \
	assert torch.cuda.is_available() and (2, 11) <= v < (2, 14)

setup check-env: $(VENV)/.product
	@$(PY) -m ldalign.run.environment

# One process on the CPU or on one GPU, one per GPU where there are several.
align: $(VENV)/.product
	@exec $(VENV)/bin/ldalign align --ranks $(or $(GPUS),auto) --config $(CONFIG) $(ARGS)

# One pair through the whole method, told in docs/tour.md.
tour: $(VENV)/.product
	@$(PY) train/tour.py $(ARGS)

evaluate: $(VENV)/.eval
	@$(PY) train/evaluate.py $(ARGS)

# With lm-eval, as a comparison may ask for benchmarks.
compare: $(VENV)/.eval
	@$(PY) train/compare.py --config $(COMPARE) $(ARGS)

report: $(VENV)/.product
	@[ -n "$(RUN)" ] || { echo "make report: give the run folder: make report RUN=runs/smollm2-135m" >&2; exit 2; }
	@$(PY) train/report.py run=$(RUN) $(ARGS)

# Tests run side by side, one process a core; ARGS="-n 0" for one after the other, as a debugger needs.
# PYTHONSAFEPATH keeps the repository's root off the import path, where kernels/ would hide a package of that name.
# Hundreds of tests start processes: each would compile the package anew where nothing may write bytecode.
PYTEST := PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE= \
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(VENV)/.dev
	@$(PYTEST) $(ARGS)

test-slow: $(VENV)/.dev
	@$(PYTEST) --long -m long $(ARGS)

# A Triton that is not the environment's is put before it on the import path of the process that compiles.
TRITONS := $(patsubst requirements/%.txt,.venv-%/.made,$(wildcard requirements/triton-*.txt))

gpu-check: $(VENV)/.dev $(TRITONS)
	@$(PYTEST) --long -m gpu_check $(ARGS)

reliability: $(VENV)/.dev
	@status=0; $(PYTEST) --long --junitxml=$(VENV)/reliability.xml \
		$$($(PY) tests/support/reliability.py --files) $(ARGS) || status=$$?; \
	$(PY) tests/support/reliability.py $(VENV)/reliability.xml; exit $$status

fuzz: $(VENV)/.dev
	@PYTHONSAFEPATH=1 $(PY) tests/support/fuzz.py $(ARGS)

# Goes on where it was stopped; the threads of every test are one, as the mutants' tests run side by side.
MUTANTS ?= 100
mutate: $(VENV)/.dev
	@PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(PY) tests/support/mutate.py --mutants $(MUTANTS) \
		$(if $(MODULES),--modules $(MODULES)) $(ARGS)

test-options: $(VENV)/.dev
	@PYTHONSAFEPATH=1 $(PY) tests/support/option_matrix.py $(ARGS)

# mypy cannot follow the mapping kernels/ -> ldalign.kernels: show it a folder of links laid out as installed.
lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@rm -rf $(VENV)/typed && mkdir -p $(VENV)/typed/ldalign
	@ln -s $(CURDIR)/ldalign/* $(CURDIR)/kernels $(CURDIR)/train $(VENV)/typed/ldalign/
	MYPYPATH=$(VENV)/typed $(VENV)/bin/mypy -p ldalign | sed -E 's#^$(VENV)/typed/(ldalign/(kernels|train)/)?#\2/#; s#^/##'

docs: $(DOCS)/.made
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build
	@echo "make: site/index.html"

bench: $(VENV)/.bench
	@$(PY) bench/run.py $(ARGS)

profile: $(VENV)/.product
	@$(PY) bench/profile_train.py $(ARGS)

# With the packages that stand there: nothing is fetched.
gpu: $(VENV)/.made
	@$(PIP) install --no-index --no-build-isolation --no-deps -e .
	@$(PY) bench/gpu.py $(ARGS)

# ---- set-up: each stamp is newer than the files it was made from ------------------------------------------------------

$(VENV)/.made:
	@[ -n "$(PYTHON)" ] || { echo "make: ldalign needs Python 3.11 or newer with the venv module (on Debian: apt install" \
		"python3-venv); install one or name it: make PYTHON=/path/to/python3" >&2; exit 3; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); ldalign needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 3; }
	@rm -rf $(VENV)
	@if $(PYTHON) -c '$(SEES_GPU)' >/dev/null 2>&1; then \
		echo "make: using the torch of $(PYTHON), which sees a GPU"; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
		: "the packages of PYTHON are not the system's if it is in a virtual environment itself; a .pth shows them"; \
		$(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
			> "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_python.pth"; \
	else $(PYTHON) -m venv $(VENV); fi
	@touch $@

$(VENV)/.torch: $(VENV)/.made requirements/torch.txt
	@if $(PY) -c '$(SEES_GPU)' >/dev/null 2>&1; then :; else \
		echo "make: installing torch"; $(PIP) install -r requirements/torch.txt; fi
	@touch $@

# The extension is built here too: its sources are what the stamp depends on.
$(VENV)/.product: $(VENV)/.torch requirements/product.txt pyproject.toml setup.py $(filter-out %.md,$(wildcard csrc/* csrc/cuda/*))
	@echo "make: installing what ldalign runs with"
	@$(PIP) install -r requirements/product.txt
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.product requirements/dev.txt requirements/eval.txt
	@echo "make: installing what tests and linting need"
	@$(PIP) install -r requirements/dev.txt
	@touch $@

$(VENV)/.eval: $(VENV)/.product requirements/eval.txt
	@echo "make: installing what benchmarks need"
	@$(PIP) install -r requirements/eval.txt
	@touch $@

# Its packages' own needs are torch and triton, which are there.
$(VENV)/.bench: $(VENV)/.dev requirements/bench.txt
	@$(PIP) install --no-deps -r requirements/bench.txt
	@touch $@

.venv-triton-%/.made: requirements/triton-%.txt | $(VENV)/.made
	@echo "make: installing Triton $* into $(@D)"
	@rm -rf $(@D)
	@$(PIP) install --no-deps --target $(@D) -r $<
	@touch $@

# No torch: the site's pages about the code are read from the source.
$(DOCS)/.made: requirements/docs.txt | $(VENV)/.made
	@echo "make: installing what the site is built with"
	@$(PY) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check --no-input -q install -r requirements/docs.txt
	@touch $@
