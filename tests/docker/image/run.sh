#!/usr/bin/env bash
# check.py with a Docker engine of its own (engine.sh), for machines that have neither an engine nor a registry.
# Debian or Ubuntu, as root, with this project's .venv.
#
#   tests/docker/image/run.sh --out bench/results/cpu/image.json
set -euo pipefail
cd "$(dirname "$0")/../../.."
folder=$(mktemp -d)
trap 'tests/docker/image/engine.sh stop "$folder"' EXIT
tests/docker/image/engine.sh start "$folder" "$PWD" ${PIP_CERT:+"$PIP_CERT"}
.venv/bin/python -m tests.docker.image.check --docker "$folder/docker" "$@"
