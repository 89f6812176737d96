"""The engine with packed pages: what lies in its memory, and that scheduling never changes the text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.engine import DEMO_MODEL, Run, run
from tests.e2e.prompts import recall_prompt
from tests.e2e.random_models import random_gemma2, random_gemma4, random_llama

LENGTHS = (*range(150, 182), 400, 401, 733, 1000)  # two lengths for every residue of 16, and longer ones
PAIRS = [recall_prompt(n, seed=n) for n in LENGTHS]
PROMPTS = [ids for ids, _ in PAIRS]
ANSWERS = [text for _, text in PAIRS]
BUDGET = 32 << 20


@cache
def unconstrained() -> Run:
    return run(PROMPTS, max_num_batched_tokens=16384)


def cache_tokens(result: Run) -> int:
    found = re.search(r"KV cache size: ([\d,]+) tokens", result.log)
    assert found, "vLLM did not log its KV cache size"
    return int(found[1].replace(",", ""))


def test_the_demo_model_answers() -> None:
    assert {n % 16 for n in LENGTHS} == set(range(16))
    right = sum(text == answer for text, answer in zip(unconstrained().texts, ANSWERS, strict=True))
    assert right >= 0.9 * len(ANSWERS)


@pytest.mark.smoke
def test_capacity_at_equal_memory() -> None:
    packed, plain = (run(PROMPTS[:1], kv_format=f, kv_cache_memory_bytes=BUDGET) for f in ("k4v4", "bf16"))
    assert cache_tokens(plain) == BUDGET // (4 * 2 * 16 * 256) * 16  # layers x heads x tokens x bytes
    assert cache_tokens(packed) / cache_tokens(plain) >= 3.75


def test_capacity_at_head_size_128(tmp_path: Path) -> None:
    model = random_llama(tmp_path, head_size=128)
    packed, plain = (run(PROMPTS[:1], model=model, kv_format=f, kv_cache_memory_bytes=BUDGET) for f in ("k4v4", "bf16"))
    assert cache_tokens(packed) / cache_tokens(plain) >= 3.87


@pytest.mark.parametrize("kv_format", ["k8v8", "k4v4"])
def test_sliding_windows_and_soft_caps_in_a_real_model(kv_format: str, tmp_path: Path) -> None:
    """A random Gemma 2: every second layer sees 32 tokens, scores are capped, head size 256."""
    compare_formats(random_gemma2(tmp_path), kv_format)


@pytest.mark.parametrize("kv_format", ["k8v8", "k4v4"])
def test_head_sizes_that_differ_and_layers_that_share_pages(kv_format: str, tmp_path: Path) -> None:
    """A random Gemma 4: head sizes 256 and 512, KV heads that differ, the last layers read the cache of others."""
    compare_formats(random_gemma4(tmp_path), kv_format)


def compare_formats(model: Path, kv_format: str) -> None:
    """In float32, so that nothing but the cache rounds."""
    options = {
        "model": model,
        "dtype": "float32",
        "sampling": {"prompt_logprobs": 0, "max_tokens": 4},
        "max_num_batched_tokens": 64,
    }
    plain, packed = (run(PROMPTS[:2], kv_format=f, **options) for f in ("bf16", kv_format))
    for a, b in zip(plain.prompt_logprobs, packed.prompt_logprobs, strict=True):
        assert len(a) > 100
        differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
        assert 0 < max(differences) < {"k8v8": 0.05, "k4v4": 1.0}[kv_format]
    if kv_format == "k8v8":
        assert packed.tokens == plain.tokens


def test_the_pool_is_packed_bytes_and_nothing_else() -> None:
    packed = run(PROMPTS[:8], kv_cache_memory_bytes=BUDGET, compares_pools=True)
    assert packed.pool["dtypes"] == ["torch.uint8"]
    blocks = BUDGET // (4 * 2 * 16 * 68)
    assert packed.pool["shapes"] == [[blocks, 2, 16, 68]] * 4
    assert packed.pool["bytes"] == blocks * 4 * 2 * 16 * 68 <= BUDGET
    assert packed.pool["changed"] == [True] * 4


def test_memory_does_not_grow_with_the_size_of_an_fp16_cache() -> None:
    """A cache that would need 960 MiB in FP16, filled by the run: a hidden copy of it would show."""
    prompts = [recall_prompt(1000, seed=i)[0] for i in range(24)]
    result = run(prompts, kv_cache_memory_bytes=255 << 20, max_num_batched_tokens=2048, rounds=2)
    # First touch of the pool's own pages counts too: 24 requests of 1,000 tokens hold 13 MB packed, 50 MB in FP16.
    assert result.pool["resident_growth"] < 150 << 20


@pytest.mark.parametrize("chunk", [32, 57])
def test_chunked_prefill(chunk: int) -> None:
    result = run(PROMPTS, max_num_batched_tokens=chunk, max_num_seqs=8)
    assert result.texts == unconstrained().texts


@pytest.mark.smoke
def test_prefix_caching_hits_give_the_same_text() -> None:
    result = run(PROMPTS, enable_prefix_caching=True, rounds=2)
    assert sum(n > 0 for n in result.cached_tokens) >= len(PROMPTS) - 1
    assert result.texts == unconstrained().texts


@pytest.mark.smoke
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preemption_in_a_tiny_pool(prefix_caching: bool) -> None:
    prompts = PROMPTS[:32]
    # Past the end of the answer two tokens can be nearly even; in float32 rounding doesn't decide between them.
    # The longest context allowed decides where the calibration texts lie, so both runs have the same one.
    options = {"sampling": {"max_tokens": 48, "ignore_eos": True}, "dtype": "float32", "max_model_len": 256}
    free = run(prompts, enable_prefix_caching=prefix_caching, **options)
    tight = run(
        prompts,
        **options,
        enable_prefix_caching=prefix_caching,
        kv_cache_memory_bytes=128 * 4 * 2 * 16 * 68,  # 128 blocks: ten of the 32 requests fit
        max_num_batched_tokens=512,
    )
    assert free.preemptions == 0
    assert tight.preemptions > 0
    assert tight.texts == free.texts


@pytest.mark.smoke
def test_tensor_parallel_2() -> None:
    result = run(PROMPTS, tensor_parallel_size=2, in_process=False)
    assert result.texts == unconstrained().texts


def test_two_engines_after_each_other_in_one_process() -> None:
    """Multiprocessing off: the second one starts where Numba has been imported."""
    code = """
import sys
from vllm import LLM, SamplingParams
for _ in range(2):
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=8 << 20)
    [answer] = llm.generate(["The farmer"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print("SAID", answer.outputs[0].text)
    del llm
"""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, str(DEMO_MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert first == second
