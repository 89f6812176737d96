#!/usr/bin/env bash
# Run 1 on a lent GPU: are the kernels right, and how fast are they? At most 260 seconds. Then read
# RESULTS_FOLDER/results.tar.gz, which is written anew every few seconds, and the verdict at the end of the output.
#
#     bench/gpu_first.sh RESULTS_FOLDER [--parts FOLDER] [--rehearse]
#
# --parts: a folder with parts of the bundle (`python -m fraqtl_bench.gpu.bundle`), unpacked first. --rehearse: the same
# steps in Triton's interpreter with tiny shapes, without a GPU. PYTHON: default python3. See docs/guides/gpu-benchmarks.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/patches:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m fraqtl_bench.gpu.first "$@"
