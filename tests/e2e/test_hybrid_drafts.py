"""Drafts for a hybrid model: states are taken back with them, and the text is that of plain decoding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.accounts import DRAFTS, Setup, compare
from tests.e2e.engine import Run, run
from tests.e2e.random_models import random_repeating_qwen3_next
from tests.e2e.test_draft_models import BYTES
from tests.e2e.test_hybrids import PROMPTS
from tests.e2e.test_speculation import reads_the_same

METHODS: dict[str, dict[str, Any]] = {"ngram": DRAFTS, "mtp": {"method": "mtp", "num_speculative_tokens": 3}}
every_method = pytest.mark.parametrize("method", METHODS)
FLOATS: dict[str, Any] = {"dtype": "float32", "mamba_ssm_cache_dtype": "float32", "max_model_len": 512}
ANSWER = 120
CHUNKS: dict[str, Any] = {"enable_prefix_caching": True, "max_num_batched_tokens": 192}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_repeating_qwen3_next(tmp_path_factory.mktemp("qwen3_next") / "model")


def served(model: Path, method: str | None, prompts: list[list[int]] = PROMPTS, **options: Any) -> Run:
    speculation = {} if method is None else {"speculative_config": METHODS[method]}
    sampling = {"max_tokens": ANSWER, "ignore_eos": True}
    return run(prompts, model=model, **{"sampling": sampling, **FLOATS, **speculation, **options})


@cache
def plain(model: Path, kv_format: str, **options: Any) -> Run:
    return served(model, None, kv_format=kv_format, **options)


@every_method
@pytest.mark.parametrize("kv_format", ["k8v8", "bf16"])
def test_text_is_that_of_plain_decoding(model: Path, method: str, kv_format: str) -> None:
    found = served(model, method, kv_format=kv_format)
    assert found.tokens == plain(model, kv_format).tokens
    assert ANSWER // 4 < found.accepted < found.drafted - 10


@every_method
def test_what_is_read_is_what_plain_decoding_reads(model: Path, method: str) -> None:
    """With residuals, in blocks of one size: which tokens have any goes by that, and drafts ask for other blocks.

    A code that rounding moves can turn a near tie, so texts needn't be the same to the end. Where residuals are not
    given back, one turns, and 98 % is 0.004.
    """
    options = {"model": model, "kv_format": "k4v4", "block_size": 160, "speculative_config": METHODS[method]}
    reads_the_same(PROMPTS, 100, most=0.001, **FLOATS, **options)


@every_method
def test_chunks_and_prefix_hits_leave_the_text(model: Path, method: str) -> None:
    found = served(model, method, kv_format="k8v8", rounds=2, **CHUNKS)
    assert found.tokens == plain(model, "k8v8").tokens
    assert max(found.cached_tokens) > 0 and found.accepted > ANSWER // 4


def test_preemption_leaves_the_text(model: Path) -> None:
    """Two short prompts are let in together with their states, and their answers don't fit."""
    prompts = [PROMPTS[-1][n : n + 5] for n in range(4)]
    more = {"sampling": {"max_tokens": 400, "ignore_eos": True}, "kv_format": "k8v8"}
    free = served(model, None, prompts, **more)
    pool = served(model, "ngram", prompts[:1], kv_format="k8v8").kv_pool
    sequence = pool["attention_bytes"] + pool["state_bytes"] + pool["padding_bytes"]
    tight = served(model, "ngram", prompts, kv_cache_memory_bytes=2 * sequence - pool["attention_bytes"], **more)
    assert tight.tokens == free.tokens
    assert tight.preemptions > 0 and tight.accepted > ANSWER // 4


def test_two_ranks(model: Path) -> None:
    ranks: dict[str, Any] = {"tensor_parallel_size": 2, "in_process": False}
    found = served(model, "ngram", kv_format="k8v8", **ranks)
    assert found.tokens == plain(model, "k8v8", **ranks).tokens
    assert found.accepted > ANSWER // 4


@pytest.mark.parametrize(
    ("method", "tokens", "layers"), [("ngram", 80, {"k4v4": 2}), ("mtp", 48, {"k4v4": 2, "k8v8": 1})]
)
def test_reports_equal_what_the_pool_held(tmp_path: Path, method: str, tokens: int, layers: dict[str, int]) -> None:
    """A block holds so many tokens of layers that attend, or a state: six layers have one, and one for each draft."""
    token, groups = sum(count * BYTES[kv_format] for kv_format, count in layers.items()), 6
    model = random_repeating_qwen3_next(tmp_path / "model", sharpness=16)
    speculation = ("--speculative-config", json.dumps(METHODS[method]))
    flags = (str(model), "--mamba-ssm-cache-dtype", "float32", *speculation)
    baseline = tokens * 2 * sum(layers.values()) * BYTES["bf16"]
    setup = Setup(flags, tokens * 2 * token, (*[0] * groups, baseline), blocks=150, longest=600)
    found = compare(setup, requests=60, seed=5, concurrency=12)
    assert found.mismatches == []
    assert found.counts["accepted_drafts"] > 60, found.counts
    for event in ("aborted", "streamed", "several_sequences", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts
