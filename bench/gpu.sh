#!/usr/bin/env bash
# Everything that needs a GPU, inside 25 minutes:
#
#     bench/gpu.sh RESULTS_FOLDER [STEP ...]
#
# Without steps, all of them, in the order of STEPS below. Each has its own limit, and all together MINUTES (default:
# 25); one that fails doesn't stop the others. What every step printed stands in RESULTS_FOLDER/STEP.log, how long it
# took and how it ended in steps.tsv; all.tar.gz holds everything so far after every step. Exits with 1 if any step failed or had no time left. vLLM and torch must be importable by PYTHON (default: python3), perhaps through
# PYTHONPATH, and so must the entry points of this project (an installed copy; the source here comes first).

set -uo pipefail

STEPS=(machine tests memcheck racecheck grid writes rivals errors texts_packed texts_raw itl_demo itl_8b)
PYTHON=${PYTHON:-python3}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -lt 1 ]]; then
    echo "usage: bench/gpu.sh RESULTS_FOLDER [STEP ...]; steps: ${STEPS[*]}" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
wanted=("$@")
[[ ${#wanted[@]} -gt 0 ]] || wanted=("${STEPS[@]}")

cd "$root" || exit 2
export PYTHONPATH="$root:$root/kernels:$root/patches:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 FRAQTL_TEST_DEVICE=cuda
# Without this vLLM compiles FlashInfer's sampler when it starts.
export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
unset TRITON_INTERPRET

deadline=$(($(date +%s) + ${MINUTES:-25} * 60))
failed=()

step() { # NAME LIMIT_SECONDS COMMAND...
    local name=$1 limit=$2 start end status
    shift 2
    start=$(date +%s)
    if ((deadline - start < 10)); then
        printf '%s\t0 s\tno time left\n' "$name" | tee -a "$out/steps.tsv"
        failed+=("$name")
        return
    fi
    ((limit <= deadline - start)) || limit=$((deadline - start))
    echo "== $name (at most $limit s)"
    timeout --kill-after=30 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    tar -C "$out" --exclude=./all.tar.gz --exclude='./dummy-*' -czf "$out/all.tar.gz" . || true
    end=$(date +%s)
    printf '%s\t%s s\texit %s\n' "$name" "$((end - start))" "$status" | tee -a "$out/steps.tsv"
    if [[ $status -ne 0 ]]; then
        failed+=("$name")
        tail -n 15 "$out/$name.log"
    fi
}

bench() { # NAME LIMIT_SECONDS SUBCOMMAND ARGUMENTS... (writes NAME.json)
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$PYTHON" -m fraqtl_bench.cli "$@"
    [[ ! -f "$out/$name.log" ]] || sed -n '/━/d; /[│┃]/p; /skipped/p' "$out/$name.log"
}

sanitize() { # NAME LIMIT_SECONDS TOOL: all kernels on small shapes, compiled variants kept few
    step "$1" "$2" compute-sanitizer --tool "$3" --error-exitcode 9 --target-processes all \
        "$PYTHON" -m fraqtl_bench.kernels.sanitize
}

run_step() {
    case $1 in
    machine)
        step machine 60 bash -c "nvidia-smi; '$PYTHON' --version; '$PYTHON' -c '
import torch, triton, vllm
print(torch.__version__, triton.__version__, vllm.__version__, torch.cuda.get_device_properties(0))
import vllm.vllm_flash_attn as flash
print(\"FlashAttention 3:\", flash.FA3_AVAILABLE)'; git rev-parse HEAD 2>/dev/null || true"
        ;;
    tests)
        # Compiling takes most of the time: one process a core where pytest-xdist is there.
        local parallel=()
        "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
        # Without what compiles for GPUs that aren't here, and what breaks the code that only the interpreter runs
        step tests 420 "$PYTHON" -m pytest "${parallel[@]}" -p no:cacheprovider tests/kernels/gpu \
            --ignore tests/kernels/gpu/test_aot.py --ignore tests/kernels/gpu/test_mutations.py
        ;;
    memcheck) sanitize memcheck 150 memcheck ;;
    racecheck) sanitize racecheck 150 racecheck ;;
    grid)
        bench grid 300 kernels --device cuda --arms fa3-bf16 flashinfer-bf16 bf16 k8v8 k8v4 k4v4 k4v2 k4v4-channel --out "$out/grid.json"
        ;;
    writes)
        bench writes 60 kernels --device cuda --write --out "$out/writes.json"
        ;;
    rivals) # in a process of their own: whatever they do to the device ends with it
        bench rivals 180 kernels --device cuda --out "$out/rivals.json" \
            --arms fa3-bf16 fa3-fp8 vllm-triton-bf16 vllm-int4-per-token-head vllm-turboquant-4bit k4v4
        ;;
    errors)
        bench errors 120 kernels --device cuda --errors --out "$out/errors.json" \
            --arms bf16 k8v8 k8v4 k4v4 fa3-bf16 vllm-int4-per-token-head
        ;;
    texts_packed) # the same keys as on the CPU without residuals: only rounding may differ
        bench texts_packed 150 texts --compare bench/results/cpu/texts_unrefined.json --out "$out/texts_packed.json" \
            --server-args --additional-config '{"fraqtl": {"prefill_keys": "packed"}}'
        ;;
    texts_raw) # as served on either: here the chunk's raw keys, which may also change what was undecided
        bench texts_raw 150 texts --compare bench/results/cpu/texts.json --out "$out/texts_raw.json"
        ;;
    itl_demo)
        bench itl_demo 240 decode-step --one-at-a-time --contexts 512 2048 8000 --rounds 8 --out "$out/itl_demo.json" \
            --server-args --gpu-memory-utilization 0.2
        ;;
    itl_8b)
        "$PYTHON" -m fraqtl_bench.dummy_model "$out/dummy-8b" || return
        # 16 GB of weights: on a GPU of 80 GB one server at a time
        bench itl_8b 420 decode-step --one-at-a-time --model "$out/dummy-8b" --formats stock k4v4 \
            --contexts 2048 16384 32768 --rounds 5 --out "$out/itl_8b.json" \
            --server-args --load-format dummy --gpu-memory-utilization 0.6
        rm -rf "$out/dummy-8b"
        ;;
    *)
        echo "unknown step $1: choose from ${STEPS[*]}" >&2
        failed+=("$1")
        ;;
    esac
}

for name in "${wanted[@]}"; do
    run_step "$name"
done

echo
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]} (see their logs in $out)"
    exit 1
fi
echo "all steps passed; results in $out"
