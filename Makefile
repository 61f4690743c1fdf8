# Everything a newcomer needs: `make demo`, then `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test check check-style bench parity s3 clean
help:  ## what can be made
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## label and embed real photographs on this machine, offline (under two minutes once installed)
	@$(BIN)/python infra/demo/demo.py

test: $(STAMP)  ## every test that needs no other program
	$(BIN)/python -m pytest -m "not realstore"

check: check-style  ## before a push: format, lint, types, fast tests
	$(BIN)/python -m pytest -q -m "not realstore and not slow"

check-style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## side-by-side speed of models against the reference
	$(BIN)/python -m infra.bench

parity: $(STAMP)  ## every published model at full depth against the reference (15 minutes on 2 cores, 12 GB of memory)
	$(BIN)/python -m tests.models.parity

s3: $(STAMP)  ## start a real S3 server (Ceph RGW) on loopback, for trying things by hand
	infra/s3/rgw.sh start

clean:  ## remove the environment and what the demo made
	rm -rf $(VENV) out
