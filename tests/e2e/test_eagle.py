"""An EAGLE or EAGLE-3 head drafts, a layer that reads the model's hidden states: the text is that of plain decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fraqtl_bench.demo_model.eagle_head import train
from tests.e2e.accounts import DEMO_BASELINE, DEMO_BLOCK, Setup, compare
from tests.e2e.engine import run
from tests.e2e.test_draft_models import BYTES, CHUNKS, by, kept_some_but_not_all
from tests.e2e.test_speculation import FLOATS, PROMPTS, TWO_RANKS, plain, plain_on_two_ranks, reads_the_same

BLOCK_BYTES = DEMO_BLOCK + 2 * 16 * BYTES["k8v8"]
BASELINE = (DEMO_BASELINE[0] + 2 * 16 * BYTES["bf16"],)
STEPS = 30  # after which a third of its drafts is right


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    @cache
    def head(method: str) -> dict[str, Any]:
        folder: Path = tmp_path_factory.mktemp(method) / "head"
        losses = train(folder, STEPS, method, step_tokens=2048)
        assert losses[-1] < losses[0] / 2
        return by(folder, 3, method=method)

    return head


@pytest.fixture(params=["eagle", "eagle3"])
def eagle(request: pytest.FixtureRequest, trained: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return trained(request.param)


def test_text_is_that_of_plain_decoding(eagle: dict[str, Any]) -> None:
    found = run(PROMPTS, **eagle, **FLOATS)
    assert found.tokens == plain().tokens
    assert kept_some_but_not_all(found)
    assert sorted(shape[-1] for shape in found.pool["shapes"]) == [BYTES["k4v4"]] * 4 + [BYTES["k8v8"]]
    assert found.kv_pool["block_bytes"] == BLOCK_BYTES
    assert "KV cache calibrated" in found.log and ": 4 layers, " in found.log


def test_chunks_and_prefix_hits_leave_the_text(eagle: dict[str, Any]) -> None:
    found = run(PROMPTS, **eagle, rounds=2, **FLOATS, **CHUNKS)
    assert found.tokens == plain().tokens
    assert sum(found.cached_tokens) > 0 and kept_some_but_not_all(found)


def test_preemption_leaves_the_text(eagle: dict[str, Any]) -> None:
    options = {"sampling": {"max_tokens": 48, "ignore_eos": True}, "kv_cache_memory_bytes": 48 * BLOCK_BYTES}
    found = run(PROMPTS, **options, **eagle, **FLOATS, **CHUNKS)
    assert [a[: len(b)] for a, b in zip(found.tokens, plain().tokens, strict=True)] == plain().tokens
    assert found.preemptions > 0 and kept_some_but_not_all(found)


def test_what_is_read_is_what_plain_decoding_reads(eagle: dict[str, Any]) -> None:
    reads_the_same(**eagle)


def test_two_ranks(trained: Callable[[str], dict[str, Any]]) -> None:
    found = run(PROMPTS, **trained("eagle3"), **FLOATS, **TWO_RANKS)
    assert found.tokens == plain_on_two_ranks().tokens
    assert kept_some_but_not_all(found)


def test_formats_without_residuals(trained: Callable[[str], dict[str, Any]]) -> None:
    texts = [run(PROMPTS, kv_format="bf16", **FLOATS, **more) for more in ({}, trained("eagle"))]
    assert texts[0].tokens == texts[1].tokens
    assert kept_some_but_not_all(texts[1])
    assert {shape[-1] for shape in texts[1].pool["shapes"]} == {BYTES["bf16"]}


def test_reports_equal_what_the_pool_held(trained: Callable[[str], dict[str, Any]]) -> None:
    flags = ("--speculative-config", json.dumps(trained("eagle3")["speculative_config"]))
    found = compare(Setup(flags, BLOCK_BYTES, BASELINE, blocks=64, longest=600), requests=60, seed=3)
    assert found.mismatches == []
    for event in ("accepted_drafts", "aborted", "streamed", "several_sequences", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts
