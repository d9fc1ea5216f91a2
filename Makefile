# Everything a developer does, each in one word. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# One thread a test process: two beside a busy machine make single operations take milliseconds.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A process for each core, which takes 1 to 2 GiB and starts servers of its own: not more than these. A file's
# tests stay together, since many share what is dear to make; files go in order, so that no long one is left to the end.
WORKERS ?= 4
# `repo` follows the documentation's pages, minutes in one file: first, or one process would end long after the others.
FOLDERS := tests/repo/ $(filter-out tests/repo/ %__pycache__/,$(wildcard tests/*/))
PARALLEL := -n logical --maxprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
export TRITON_DEFAULT_FP_FUSION ?= 1

.DEFAULT_GOAL := help
.PHONY: docs reference help install demo test all-tests test-fast test-kernels test-web screenshot fuzz faults lint bench api-cost bench-gpu bench-peers tune-gpu many-adapters swap-latency soak protos sync train clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## Make .venv and install everything into it

$(STAMP): pyproject.toml clients/python/pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	@echo "installing into $(VENV): some minutes, about 3 GB"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e clients/python -e '.[bench,dev]'
	@touch $@

demo: $(STAMP) ## Start a real server on the demo model and put twelve adapters and the base to work at once
	$(VENV)/bin/loraplex demo

faults: $(STAMP) ## Clients, connections, disks and steps that fail under a real server, at length
	$(TEST_ENV) LORAPLEX_FAULTS=long $(PY) -m pytest -q --durations=0 tests/e2e/test_faults.py tests/e2e/test_statuses.py \
	  tests/e2e/test_restart.py tests/engine/test_failed_steps.py

lint: $(STAMP) ## ruff and mypy (strict)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: $(STAMP) ## Everything, on any machine: at most 15 minutes on two cores
	+@$(MAKE) --no-print-directory -j2 lint all-tests

all-tests: $(STAMP)
	$(TEST_ENV) $(PY) -m pytest -q $(PARALLEL) --durations=15 $(FOLDERS)

test-fast: $(STAMP) ## The inner loop: two minutes
	$(TEST_ENV) $(PY) -m pytest -q $(PARALLEL) -x -m 'not slow and not kernels_wide and not gpu_bench and not web'

test-kernels: $(STAMP) ## The wide sweep of the Triton kernels, under the interpreter where there is no GPU
	$(TEST_ENV) $(PY) -m pytest -q -m kernels_wide tests/ops tests/engine/test_fusion.py

test-web: $(STAMP) ## The built-in page in headless Chromium, installed by apt or else by Playwright
	$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e clients/python -e '.[web-test]'
	@for name in chromium-headless-shell chromium google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  { $$sudo apt-get -qq update && $$sudo apt-get -qq install -y --no-install-recommends chromium-headless-shell; } \
	  || $(PY) -m playwright install --with-deps chromium-headless-shell
	$(TEST_ENV) $(PY) -m pytest -q -m web tests/web

screenshot: ## The picture of the built-in page in docs/how-to/watching.md, taken anew by `make test-web`'s tools
	LORAPLEX_SCREENSHOT=docs/images/page.png $(MAKE) test-web

fuzz: $(STAMP) ## 100,000 spoiled adapter files, as many random messages, 8,000 HTTP requests: a typed error or a whole answer
	$(TEST_ENV) LORAPLEX_FUZZ_INPUTS=100000 $(PY) -m pytest -q -s -k 'fuzz or description or spoiled' tests/adapters/test_fuzz.py \
	  tests/e2e/test_spoiled_adapters.py tests/e2e/test_fuzz_requests.py tests/e2e/test_openai.py

bench: $(STAMP) ## The benches that fit this machine, side by side with their peers; results in bench/results
	$(VENV)/bin/loraplex bench side-by-side --output bench/results

bench-gpu: ## Correctness, then timings of the kernels and the engine on the GPU at hand (uses $(PYTHON) as it is)
	PYTHONPATH=server:kernels:clients/python:bench $(PYTHON) -m loraplex_bench.gpu --output bench/results

bench-peers: ## Fetch the 4-bit products that `bench-gpu` compares with into bench/.peers (uses $(PYTHON)'s pip)
	PYTHONPATH=server:kernels:clients/python:bench $(PYTHON) -m loraplex_bench.fetch_peers

tune-gpu: ## Measure which variants of the LoRA kernels are fastest on the GPU at hand, and keep them (uses $(PYTHON) as it is)
	PYTHONPATH=server:kernels:clients/python:bench $(PYTHON) -m loraplex_bench.tune_lora

api-cost: $(STAMP) ## What the API costs beside the engine: CPU a message, messages and tokens a second; results in bench/results
	$(VENV)/bin/loraplex bench api-cost --output bench/results

many-adapters: $(STAMP) ## 5,000 adapters through 32 slots: answers, memory, throughput, misses; results in bench/results
	$(VENV)/bin/loraplex bench many-adapters --output bench/results

swap-latency: $(STAMP) ## 16 adapters in 8 slots beside 8 in 8: time to first token; results in bench/results
	$(VENV)/bin/loraplex bench swap-latency --output bench/results

soak: $(STAMP) ## Five minutes of load with crashes, cancellations and swaps; every answer checked
	$(VENV)/bin/loraplex bench soak

protos: $(STAMP) ## Regenerate the SDK's stubs from protos/
	$(PY) -m grpc_tools.protoc -I protos --python_out=clients/python --pyi_out=clients/python \
	  --grpc_python_out=clients/python protos/loraplex/v1/*.proto

sync: $(STAMP) ## Make the SDK's blocking client anew from its asyncio client
	$(PY) tools/make_sync.py

docs: $(STAMP) ## The documentation as a site in build/docs; a broken link or a missing page is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

reference: $(STAMP) ## Write the reference pages in docs/reference anew from the code
	$(PY) tools/grpc_reference.py
	$(PY) -m loraplex_server.config.reference > docs/reference/flags.md
	$(PY) -m loraplex_server.api.telemetry.reference > docs/reference/metrics.md
	$(PY) -m loraplex_server.api.reference > docs/reference/errors.md
	$(PY) -m loraplex_server.adapters.spec.reference > docs/reference/adapter-kinds.md

train: $(STAMP) ## Train the demo model and its adapters anew (hours)
	$(PY) -m demo_training.train all

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
