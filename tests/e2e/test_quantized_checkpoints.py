"""Quantized checkpoints on a CPU without vLLM's operators: FP8 caches that they ask for, and FP8 weights."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.engine import run
from tests.e2e.prompts import recall_prompt
from tests.e2e.random_models import ask_for_fp8_cache, random_llama, round_to_fp8
from tests.e2e.test_native_ops import apart, of_transformers, served

WARNING = (
    "This checkpoint asks for an FP8 KV cache: its pages are stored as {}, and its scales of keys and values are not"
)


def test_a_cache_that_a_checkpoint_asks_for_is_ours_all_the_same(tmp_path: Path) -> None:
    """The same text and the same pages as without its scheme and scales, and one warning."""
    plain, asking = random_llama(tmp_path / "plain", 64), ask_for_fp8_cache(random_llama(tmp_path / "asking", 64))
    prompts = [recall_prompt(n, seed=n)[0] for n in (150, 301)]
    sampling = {"prompt_logprobs": 0, "max_tokens": 8}
    first, second = (run(prompts, model=folder, sampling=sampling) for folder in (plain, asking))
    assert second.tokens == first.tokens
    assert second.prompt_logprobs == first.prompt_logprobs
    assert second.pool["dtypes"] == ["torch.uint8"]
    assert second.pool["shapes"] == first.pool["shapes"]
    assert second.kv_pool == first.kv_pool
    assert (first.log.count(WARNING.format("k4v4")), second.log.count(WARNING.format("k4v4"))) == (0, 1)


def test_fp8_weights_that_torch_multiplies(tmp_path: Path) -> None:
    folder, wide = round_to_fp8(random_llama(tmp_path / "model", 64, initializer_range=0.1))
    expected, _ = of_transformers(wide)
    result = served(folder, kv_format="k8v8")
    assert apart(result, expected).mean() < 0.25  # activations are rounded to FP8, too
    assert result.log.count(WARNING.format("k8v8")) == 1
