#!/usr/bin/env bash
# Run 2 on a lent GPU: vLLM end to end with packed KV, against stock vLLM. At most 300 seconds. Then read
# RESULTS_FOLDER/results.tar.gz, which is written anew every few seconds, and the verdict at the end of the output.
#
#     bench/gpu_engine.sh RESULTS_FOLDER [--parts FOLDER] [--unpack] [--rehearse]
#
# --parts: a folder with parts of the bundle (`python -m fraqtl_bench.gpu.bundle`), unpacked first. --unpack: that and
# nothing else, for a first transfer that holds half of them. --rehearse: the same steps on a CPU with the demo
# model. PYTHON: default python3. See docs/guides/gpu-benchmarks.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/patches:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m fraqtl_bench.gpu.engine "$@"
