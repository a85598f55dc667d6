# make setup         install into .venv; the other targets call it when it is needed
# make demo          write sample files and search the best adapter for them; a CPU is enough
# make test          the test suite that needs no GPU
# make test-heavy    its tests that take half a minute or more each
# make test-object-store   tests with a server of the S3 protocol on this machine
# make test-oldest   the tests of four folders with the oldest versions that pyproject.toml allows
# make check         lint, format, types, spelling
# make audit         known weaknesses of the pinned versions; needs a network
# make flags         write the table of flags anew, after another version of TRL or transformers
#
# PYTHON=/path/to/python3.12 chooses the Python that .venv is made from: 3.11 or 3.12.
# TORCH='torch==… torchvision==… --index-url …' chooses another build of them: README.md says when.

SHELL := /bin/bash
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
COMMA := ,
OLDEST := .venv-oldest
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
TORCH := $(shell grep '^torch==\|^torchvision==' constraints.txt)
# Some packages of the extra `families` bring torchvision with them.
EXTRAS := dev,demo$(if $(findstring torchvision,$(TORCH)),$(COMMA)families)
SUPPORTED := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.PHONY: setup demo test test-heavy test-object-store test-oldest check audit flags constraints clean

setup: $(STAMP)

# A .venv that is half made, or made from another Python, has no pip that runs on a supported version: it is
# made anew. torch and torchvision come first: with their versions settled, pip never considers
# other builds of several GB.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(RUN) -c "$(SUPPORTED)" 2>/dev/null && $(RUN) -m pip --version >/dev/null 2>&1 || { \
		for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.12 python3.11); do \
			if "$$python" -c "$(SUPPORTED)" >/dev/null 2>&1; then found="$$python"; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "vlmtune needs Python 3.11 or 3.12 with its venv module;" \
				"name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
			exit 2; \
		fi; \
		echo "making $(VENV) from $$("$$found" --version)"; "$$found" -m venv --clear $(VENV); }
	@echo "installing into $(VENV): a few minutes"
	$(RUN) $(PIP_INSTALL) -c constraints.txt $(TORCH)
	$(RUN) $(PIP_INSTALL) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# The oldest versions go into an environment of their own; .ci/oldest.py takes them from pyproject.toml.
$(OLDEST)/.installed: pyproject.toml constraints.txt .ci/oldest.py | setup
	@echo "installing into $(OLDEST): a few minutes"
	$(RUN) -m venv --clear $(OLDEST)
	$(RUN) .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP_INSTALL) $(TORCH)
	$(OLDEST)/bin/python $(PIP_INSTALL) -c $(OLDEST)/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(RUN) -m vlmtune.demo
	$(RUN) ray_jobs/tune.py --config configs/demo.yaml --overwrite

test: setup
	$(RUN) -m pytest

test-heavy: setup
	$(RUN) -m pytest -m heavy

# moto asks for an older python-dateutil than the pinned one, and works with it: so --no-deps.
MOTO := moto==5.2.5 flask==3.1.3 flask-cors==6.0.5 boto3==1.44.8 botocore==1.44.8 s3transfer==0.19.3 \
	jmespath==1.1.0 responses==0.26.3 xmltodict==1.0.4 py-partiql-parser==0.6.3 blinker==1.9.0 itsdangerous==2.2.0

test-object-store: setup
	$(RUN) $(PIP_INSTALL) --no-deps $(MOTO)
	$(RUN) -m pytest -m heavy tests/ray_jobs/test_object_store.py

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest tests/test_compat.py tests/data tests/model tests/training tests/packed

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib

# Published weaknesses of the pinned versions; needs a network.
audit: setup
	$(RUN) $(PIP_INSTALL) pip-audit
	$(RUN) -m pip_audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

flags: setup
	$(RUN) -m vlmtune.config.generate_flags

# The exact versions that .venv holds now, under the same head. To move to newer ones: delete the lines below
# the head, make setup, make constraints.
constraints: setup
	@{ grep '^#' constraints.txt; \
		$(RUN) -m pip freeze --all --exclude-editable --exclude pip --exclude wheel --exclude vlmtune \
		| grep -v '^nvidia-\|^triton==\|^cuda-' | sed 's/+[a-z0-9.]*$$//'; } > constraints.txt.part
	@mv constraints.txt.part constraints.txt
	@touch $(STAMP)

clean:
	rm -rf $(VENV) $(OLDEST) *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
