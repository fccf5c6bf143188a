# On a fresh machine with Python 3.11, gcc and pip: `make demo` shows the whole method on a real model, `make test`
# runs the suite. Both stand on `make install`, which fills .venv with the pinned versions of requirements/ and the
# command `gfwsvd`.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --python $(RUN) install --quiet --quiet --disable-pip-version-check
MARK := $(VENV)/.complete
VLLM := .venv-vllm
VLLM_PIP := $(PYTHON) -m pip --python $(VLLM)/bin/python install --quiet --quiet --disable-pip-version-check
VLLM_MARK := $(VLLM)/.complete
AUDIT := .venv-audit
AUDIT_MARK := $(AUDIT)/.complete

.PHONY: help install demo test test-vllm gpu lint audit clean

help:
	@echo "make install   fill $(VENV) with the pinned dependencies and the command gfwsvd"
	@echo "make demo      compress a real language model and compare the methods"
	@echo "make test      run the test suite"
	@echo "make test-vllm run the tests of serving with vLLM on a CPU, in $(VLLM), an environment of its own"
	@echo "make gpu       on a machine with a GPU: its tests and all kernel benchmarks, with the packages of PYTHON;"
	@echo "               GPU_ARGS=--dry-run for the same steps, tiny, without one"
	@echo "make lint      ruff check, ruff format --check, mypy"
	@echo "make audit     look up the pinned versions among known vulnerabilities, by the network, from $(AUDIT)"
	@echo "make clean     remove $(VENV), caches and build products"

install: $(MARK)
	@echo "$(VENV) is ready; try $(VENV)/bin/gfwsvd --help"

# Without its mark an environment may hold packages that an interrupted pip wrote in part and that the next pip would
# take for whole, so it is made anew; with an outdated mark pip only brings in what changed.
# The environment's pip comes from the pip outside, since some distributions ship Python's venv without its own copy.
# Every file but torch's has to have its digest in requirements/dev.lock. torch goes by itself: whatever build of it there
# is finds what it needs in place, but for the CUDA libraries of some.
# pip makes the editable installation through an import hook, which comes after the search of sys.path: there a mere
# folder named gfwsvd, such as a clone seen from its parent, would win. The path file puts the sources on sys.path
# themselves.
$(MARK): pyproject.toml requirements/dev.txt requirements/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "gfwsvd needs Python 3.11 or newer, got $$($(PYTHON) --version)." >&2; \
			echo "Name one: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	@if [ -e $@ ]; then rm $@; else \
		echo "install 1/4: new environment $(VENV)"; \
		$(PYTHON) -m venv --clear --without-pip $(VENV); \
	fi
	@echo "install 2/4: the packages of requirements/dev.lock (about a minute)"
	@$(PIP) --no-deps --require-hashes --requirement requirements/dev.lock
	@echo "install 3/4: torch (about half a minute)"
	@$(PIP) --constraint requirements/dev.txt torch
	@echo "install 4/4: gfwsvd"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@printf '%s\n' "$(CURDIR)" "$(CURDIR)/kernels" \
		> "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gfwsvd-sources.pth"
	@touch $@

demo: $(MARK)
	@$(RUN) -m benchmarks.demo

# Tests run in as many processes as there are cores, of one thread each: their matrices are small.
test: $(MARK)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# vLLM wants other versions than the suite. What it asks for beyond them is left out, as vllm.txt says, and pip says so too.
$(VLLM_MARK): pyproject.toml requirements/vllm.txt requirements/vllm.lock
	@echo "new environment $(VLLM): vLLM for CPUs (about two minutes); torchvision, torchaudio and torchcodec are left out"
	@$(PYTHON) -m venv --clear --without-pip $(VLLM)
	@$(VLLM_PIP) --no-deps --require-hashes --requirement requirements/vllm.lock
	@$(VLLM_PIP) --constraint requirements/vllm.txt torch
	@$(VLLM_PIP) --no-deps --no-build-isolation --editable .
	@touch $@

test-vllm: $(VLLM_MARK)
	@$(VLLM)/bin/python -m pytest tests/serving_vllm

gpu:
	@PYTHON="$(PYTHON)" benchmarks/gpu.sh $(GPU_ARGS)

lint: $(MARK)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

$(AUDIT_MARK): requirements/audit.lock
	@echo "new environment $(AUDIT): pip-audit"
	@$(PYTHON) -m venv --clear --without-pip $(AUDIT)
	@$(PYTHON) -m pip --python $(AUDIT)/bin/python install --quiet --quiet --disable-pip-version-check \
		--no-deps --require-hashes --requirement requirements/audit.lock
	@touch $@

# Strict: what the service does not know has not been audited. File by file, since some pin the same package.
audit: $(AUDIT_MARK)
	@status=0; for file in requirements/*.txt; do \
		echo "$$file:"; \
		$(AUDIT)/bin/python -m pip_audit --strict --no-deps --disable-pip --progress-spinner off --requirement $$file \
			|| status=$$?; \
	done; exit $$status

clean:
	rm -rf $(VENV) $(VLLM) $(AUDIT) build dist *.egg-info demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
