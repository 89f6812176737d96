#!/usr/bin/env bash
# Clients against a running server, each in an environment of its own, made in FOLDER and kept there (2 GB for all).
#
#   fraqtl-serve serve --port 8123 --enable-auto-tool-choice --tool-call-parser hermes --tool-strict-level parameter \
#     --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'
#   tests/clients/run.sh FOLDER [CLIENT ...]
#
# Without the last two flags, the demo model calls tools with anything, and writes white space in JSON without end.
# The server's address: FRAQTL_URL. A run of all clients writes bench/results/cpu/clients.json.
set -uo pipefail
folder=$(realpath -m "${1:?usage: run.sh FOLDER [CLIENT ...]}")
shift
url=${FRAQTL_URL:-http://127.0.0.1:8123}
cd "$(dirname "$0")/../.."
export LITELLM_LOCAL_MODEL_COST_MAP=True # else LiteLLM and DSPy ask the internet for prices

declare -A packages=(
  [instructor]="instructor==1.17.0"
  [openai_agents]="openai-agents==0.24.0"
  [llama_index]="llama-index-llms-openai-like==0.8.1"
  [haystack]="haystack-ai==3.4.1"
  [dspy]="dspy==3.4.1"
  [litellm_proxy]="litellm[proxy]==1.108.7"
  [langfuse]="langfuse==5.0.4 openai==3.57.0"
)
all=(instructor openai_agents llama_index haystack dspy litellm_proxy langfuse)
clients=("${@:-${all[@]}}")

install() {
  [ -e "$folder/$1/done" ] && return
  # shellcheck disable=SC2086 # two packages are two words
  python3 -m venv "$folder/$1" && "$folder/$1/bin/pip" install --quiet ${packages[$1]} && touch "$folder/$1/done"
}

failed=0
for client in "${clients[@]}"; do
  if install "$client" >&2 && "$folder/$client/bin/python" -m "tests.clients.$client" "$url" >"$folder/$client.json"; then
    echo "ok   $client: $(cat "$folder/$client.json")"
  else
    echo "FAIL $client: above is why"
    rm -f "$folder/$client.json"
    failed=1
  fi
done
[ $# -gt 0 ] || python3 -m tests.clients.record "$folder" "$url" "${all[@]}"
exit $failed
