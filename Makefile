PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
BENCH := .venv-bench

.PHONY: demo test test-oldest lint format bench-kv bench-link bench-gpu evidence bench-evidence-peers bench-study docs test-ray clean

demo: $(VENV)/.ready
	$(BIN)/suffice demo --report out/demo.html

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2

# The other end of the supported range: the kv tests on the oldest transformers.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 tests/kv tests/information

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Scoring, decoding and a long stream; ours and kvpress in one process, in an environment of their own.
bench-kv: $(BENCH)/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BENCH)/bin/python -W ignore benchmarks/kv_all.py

# A look at 10,000 stored runs, as whole commands.
bench-study: $(VENV)/.ready
	$(BIN)/python benchmarks/study.py --json docs/results/study-bench.json

# The site, in out/site; nothing is loaded from elsewhere while it is built or read.
docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The same studies on a cluster of two Ray nodes.
test-ray: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[scale]"
	$(BIN)/python -m pytest tests/study/test_ray.py tests/test_docs.py -k ray

# Training with our samplers against a loop as PyG's examples write it, and every model against direct code, in one run.
# With downloaded data sets: make bench-link BENCH_DATA="--data Cora --models-data Photo --root DATA_FOLDER"
bench-link: $(VENV)/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/link.py --threads 1 $(BENCH_DATA) --json docs/results/link-bench.json

# What the kernels' machine code allows, anywhere; then kernels and caches on a GPU, without which it says so. For that
# the torch of this environment must be a build for CUDA.
bench-gpu: $(VENV)/.ready
	$(BIN)/python -W ignore benchmarks/gpu_ceiling.py --json docs/results/gpu-ceiling.json
	$(BIN)/python benchmarks/gpu.py --json out/gpu.json

# Which policy stays closest to the full cache, in short: 8 samples. What is finished is kept in out/evidence.
evidence: $(VENV)/.ready
	$(BIN)/python -W ignore benchmarks/evidence.py --samples 8 --folder out/evidence

# kvpress's presses on the same samples, in short: 4 samples. What is finished is kept in out/evidence-peers.
bench-evidence-peers: $(BENCH)/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BENCH)/bin/python -W ignore benchmarks/evidence_peers.py --samples 4

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	touch $@

$(BENCH)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[kv]" kvpress==0.5.5 scipy
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(BENCH) out
