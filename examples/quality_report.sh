#!/usr/bin/env bash
# What the formats cost a model, and what plain INT4 and deletion would; FOLDER gets quality.json, quality.md and quality.html.
#
#     bash examples/quality_report.sh FOLDER                     the demo model on made-up text
#     bash examples/quality_report.sh FOLDER MODEL --text FILE   your own model on your own text
set -euo pipefail
folder=${1:?name a folder for the report}
shift
[ $# -gt 0 ] || set -- demo --quick
fraqtl-bench quality "$@" --out "$folder"
echo "open $folder/quality.html"
