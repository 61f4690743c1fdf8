# Everything a newcomer needs: `make demo`, then `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_PROCESSES ?= 2
# each takes a run of tests that lie together, so that a file's fixtures are mostly made once; who is idle takes over some
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

.PHONY: help demo test multinode image browser targets check check-style chaos fuzz bounds bench bench-gpu parity s3 clean
help:  ## what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## label and embed real photographs on this machine, offline (under two minutes once installed)
	@$(BIN)/python infra/demo/demo.py

test: $(STAMP)  ## every test that needs no other program
	$(PYTEST) -m "not realstore and not browser and not targets and not multinode"

multinode: $(STAMP)  ## several Ray nodes and a live head on this machine: submit, a stand-in GPU, nodes that go and come
	$(BIN)/python -m pytest -m multinode

image: $(STAMP)  ## every instruction of the Dockerfile, without an engine, in roots of its own (minutes; as root)
	$(BIN)/python infra/docker/exercise.py

browser: $(STAMP)  ## the report's page in a real browser (wants Chromium: apt-get install chromium)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest -m browser

targets: $(STAMP)  ## our exports read by Label Studio's, CVAT's and autofaiss' own code (30 MB)
	$(BIN)/python -m pip install --quiet --no-deps --requirement infra/targets.txt
	$(BIN)/python -m pytest -m targets tests/exports

check: check-style  ## before a push: format, lint, types, fast tests
	$(PYTEST) -q -m "not realstore and not slow and not browser and not targets and not multinode"

check-style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

chaos: $(STAMP)  ## 1,000 seeded runs under kills, stops, full disks and failing stores; Ray's processes; each safeguard off
	$(BIN)/python -m tests.chaos --runs 1000 --out tests/chaos/results/chaos.json
	$(BIN)/python -m tests.chaos.on_retry --out tests/chaos/results/on_retry.json
	$(BIN)/python -m tests.chaos.on_extend --out tests/chaos/results/on_extend.json
	$(BIN)/python -m tests.chaos.on_ray --runs 14 --out tests/chaos/results/on_ray.json
	$(BIN)/python -m tests.chaos.safeguards --out tests/chaos/results/safeguards.json

fuzz: $(STAMP)  ## 30,000 mutated images, 4,000 shards, 400 jobs, 80,000 runs of our parsers (20 minutes, one process)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --out tests/fuzz/results/fuzz.json

bounds: $(STAMP)  ## peak memory of whole jobs: 100,000 images, a tar of 4 GB, 80 megapixels (5 minutes, 5 GB of disk)
	$(BIN)/python -m tests.bounds --out tests/bounds/results/bounds.json

bench: $(STAMP)  ## side-by-side speed of models, decoding and whole jobs against what people use instead (an hour)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[bench]'
	$(BIN)/python -m infra.bench

bench-gpu: $(STAMP)  ## how well one GPU is kept busy: the model alone, fed from memory, fed from shards
	$(BIN)/python -m infra.bench gpu --out infra/bench/results

parity: $(STAMP)  ## every published model at full depth against the reference (25 minutes on 2 cores, 15 GB of memory)
	$(BIN)/python -m tests.models.parity

s3: $(STAMP)  ## start a real S3 server (Ceph RGW) on loopback, for trying things by hand
	infra/s3/rgw.sh start

clean:  ## remove the environment and what the demo made
	rm -rf $(VENV) out
