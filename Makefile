# Start with `make demo`, then `make test`. `make help` lists everything else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_PROCESSES ?= 2
# each process takes neighbouring tests, so that a file's fixtures are mostly made once; idle processes take over some
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

.PHONY: help demo test multinode image browser targets check check-style chaos fuzz bounds mutation bench bench-gpu parity s3 clean
help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## label and embed real photographs on this machine, offline (under two minutes once installed)
	@$(BIN)/python infra/demo/demo.py

test: $(STAMP)  ## run every test that needs no other program
	$(PYTEST) -m "not realstore and not browser and not targets and not multinode"

multinode: $(STAMP)  ## tests with several Ray nodes on this machine: submit, a stand-in GPU, nodes that leave and join
	$(BIN)/python -m pytest -m multinode

image: $(STAMP)  ## run every instruction of the Dockerfile without a container engine (minutes; as root)
	$(BIN)/python infra/docker/exercise.py

browser: $(STAMP)  ## test the report's page in a real browser (needs Chromium: apt-get install chromium)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest -m browser

targets: $(STAMP)  ## read our exports with Label Studio's, CVAT's and autofaiss' own code (30 MB)
	$(BIN)/python -m pip install --quiet --no-deps --requirement infra/targets.txt
	$(BIN)/python -m pytest -m targets tests/results/exports

check: check-style  ## run before a push: format, lint, types, fast tests
	$(PYTEST) -q -m "not realstore and not slow and not browser and not targets and not multinode"

check-style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

chaos: $(STAMP)  ## 1,000 seeded runs with kills, stops, full disks and failing stores; on Ray; each safeguard off
	$(BIN)/python -m tests.harness.chaos --runs 1000 --out tests/harness/chaos/results/chaos.json
	$(BIN)/python -m tests.harness.chaos.on_retry --out tests/harness/chaos/results/on_retry.json
	$(BIN)/python -m tests.harness.chaos.on_extend --out tests/harness/chaos/results/on_extend.json
	$(BIN)/python -m tests.harness.chaos.on_ray --runs 14 --out tests/harness/chaos/results/on_ray.json
	$(BIN)/python -m tests.harness.chaos.safeguards --out tests/harness/chaos/results/safeguards.json

fuzz: $(STAMP)  ## 30,000 mutated images, 4,000 shards, 400 jobs and 80,000 runs of our parsers (20 minutes)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.harness.fuzz --out tests/harness/fuzz/results/fuzz.json

bounds: $(STAMP)  ## measure peak memory of whole jobs: 100,000 images, a 4 GB tar, 80 megapixels (5 minutes, 5 GB)
	$(BIN)/python -m tests.harness.bounds --out tests/harness/bounds/results/bounds.json

mutation: $(STAMP)  ## put 147 seeded faults into a copy of the package: each is noticed by a test (an hour)
	$(BIN)/python -m tests.harness.mutation --out tests/harness/mutation/results/mutation.json

bench: $(STAMP)  ## compare the speed of models, decoding and whole jobs with alternatives (an hour)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[bench]'
	$(BIN)/python -m infra.bench

bench-gpu: $(STAMP)  ## test and measure one GPU, in 8 minutes: the model alone, fed from memory, fed from shards
	timeout --kill-after=10 600 $(BIN)/python -m infra.bench gpu --out infra/bench/results

parity: $(STAMP)  ## compare every published model at full depth with the reference (25 minutes, 15 GB of memory)
	$(BIN)/python -m tests.harness.parity.parity

s3: $(STAMP)  ## start a real S3 server (Ceph RGW) on loopback, to try things by hand
	infra/s3/rgw.sh start

clean:  ## remove the environment and the demo's files
	rm -rf $(VENV) out
