PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
BENCH := .venv-bench
BITS := .venv-bits

.PHONY: demo test test-oldest test-families test-families-oldest lint format bench-kv bench-link bench-gpu evidence bench-evidence-peers bench-bits bench-study docs test-ray clean

demo: $(VENV)/.ready
	$(BIN)/suffice demo --report out/demo.html

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Test suffice.kv with the oldest supported transformers: families, layers, storages and saved caches, where its models
# matter most. `make test-oldest OLDEST_TESTS=tests/kv` runs everything and takes several times as long.
OLDEST_TESTS := $(addsuffix .py,$(addprefix tests/kv/test_,cache conformance cross_attention default_model failures families \
	layers replay rotary saving))
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal $(OLDEST_TESTS)

# Test every family of models that transformers registers (about 10 minutes), and write docs/results/support.md.
test-families: $(VENV)/.ready
	rm -rf out/support
	SUFFICE_SUPPORT=out/support $(BIN)/python -m pytest -n 2 -m "" tests/kv/test_families.py tests/kv/test_rotary.py
	$(BIN)/python -m tests.kv.support_page out/support

# The same families with the oldest supported transformers, as far as it has them.
test-families-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 -m "" tests/kv/test_families.py tests/kv/test_rotary.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Time scoring, decoding and a long stream, Suffice and kvpress in one process and in a separate environment.
# One part only: make bench-kv BENCH_KV="--only bits"
bench-kv: $(BENCH)/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BENCH)/bin/python -W ignore benchmarks/kv_all.py $(BENCH_KV)

# Time the commands that read a study, with 10,000 stored runs.
bench-study: $(VENV)/.ready
	$(BIN)/python benchmarks/study.py --json docs/results/study-bench.json

# Build the documentation in out/site. Neither the build nor the pages load anything from the network.
docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Test studies on a Ray cluster of two nodes.
test-ray: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[scale]"
	$(BIN)/python -m pytest tests/study/test_ray.py tests/test_docs.py -k ray

# Time the training against the loop of PyG's examples, and every model against straightforward code.
# With downloaded data sets: make bench-link BENCH_DATA="--data Cora --models-data Photo --root DATA_FOLDER"
bench-link: $(VENV)/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/link.py --threads 1 $(BENCH_DATA) --json docs/results/link-bench.json

# Compute the upper bounds on the kernels' speed from their machine code (no GPU needed), then time kernels and caches on
# a GPU. The second part needs a torch that is built for CUDA, and only prints a message if there is no GPU.
bench-gpu: $(VENV)/.ready
	$(BIN)/python -W ignore benchmarks/gpu_ceiling.py --json docs/results/gpu-ceiling.json
	$(BIN)/python benchmarks/gpu.py --json out/gpu.json

# Measure which policy stays closest to the full cache: at equal bytes with 2 samples, then at equal entries with 8.
# Finished samples are kept in out/equal-bytes and out/evidence.
evidence: $(VENV)/.ready
	$(BIN)/python -W ignore benchmarks/equal_bytes.py --samples 2
	$(BIN)/python -W ignore benchmarks/evidence.py --samples 8 --folder out/evidence

# Measure kvpress on the same samples, 4 of them. Finished samples are kept in out/evidence-peers.
bench-evidence-peers: $(BENCH)/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BENCH)/bin/python -W ignore benchmarks/evidence_peers.py --samples 4

# Measure how close quantized caches stay, 3 samples, beside the quantized caches of transformers. Finished samples are
# kept in out/bits.
bench-bits: $(BITS)/.ready
	$(BITS)/bin/python -W ignore benchmarks/bits.py --samples 3

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

$(BITS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BITS)
	$(BITS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[kv]" optimum-quanto==0.2.7 hqq==0.2.8.post1
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(BENCH) $(BITS) out
