"""Runs all benchmarks of the KV cache: `make bench-kv`. The last line of the output is a JSON object.

Each benchmark is a program in this folder with its own options, and writes its results to `docs/results`. `--only NAME`
runs one of them: cost, decode, stream or bits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
FIGURE = HERE.parent / "docs" / "images" / "kv-stream.png"
PROGRAMS = {
    "kv-cost.json": ["kv.py"],
    "kv-decode.json": ["kv_decode.py"],
    "kv-stream.json": ["kv_stream.py", "--figure", str(FIGURE)],
    "kv-bits-speed.json": ["kv_bits_speed.py"],
}
NAMES = {"cost": "kv-cost.json", "decode": "kv-decode.json", "stream": "kv-stream.json", "bits": "kv-bits-speed.json"}
KEYS = (
    "capkv_percent_4k",
    "kvpress_cap_percent_4k",
    "peak_cache_bytes_25",
    "kvpress_peak_cache_bytes_25",
    "decode_of_bound_uniform_25",
    "decode_of_bound_ragged_25",
    "ragged_step_vs_uniform",
    "kvpress_of_bound_uniform_25",
    "kvpress_of_bound_adakv_25",
    "peak_memory_ragged_25",
    "kvpress_peak_memory_adakv_25",
    "peak_memory_full",
    "stream_peak_growth_percent",
    "stream_seconds_last_over_first",
    "stream_nll_first_8k",
    "stream_nll_beyond_8k",
    "bits_step_of_same_entries",
    "bits_step_of_stock",
    "bits_packing_percent",
    "bits_eviction_of_that_without",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES)
    only = parser.parse_args().only
    files = list(PROGRAMS) if only is None else [NAMES[only]]
    for name in files:
        program, *options = PROGRAMS[name]
        command = [sys.executable, "-W", "ignore", str(HERE / program), *options, "--json", str(RESULTS / name)]
        subprocess.run(command, check=True)
    results = {key: value for name in files for key, value in json.loads((RESULTS / name).read_text()).items()}
    print(json.dumps({key: results[key] for key in KEYS if key in results}))


if __name__ == "__main__":
    main()
