#!/usr/bin/env bash
# Load on two servers in turns, bf16 and k4v4 with the same KV memory; FOLDER gets load.json, load.md and load.html.
#
#     bash examples/compare_formats.sh FOLDER [more flags of fraqtl-bench load]
set -euo pipefail
folder=${1:?name a folder for the report}
shift
fraqtl-bench load --arms bf16 k4v4 --kv-memory 18MiB --input 512 --output 64 --concurrency 1 8 --repeats 1 \
  --min-requests 8 --out "$folder" "$@"
echo "open $folder/load.html"
