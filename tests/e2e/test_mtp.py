"""A head for multi-token prediction, out of the model's own checkpoint, drafts: the text is that of plain decoding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.accounts import Setup, compare
from tests.e2e.engine import Run, run
from tests.e2e.random_models import random_glm4_moe
from tests.e2e.test_draft_models import BYTES, CHUNKS
from tests.e2e.test_speculation import FLOATS, PROMPTS

BLOCK_BYTES = 2 * 16 * (2 * BYTES["k4v4"] + BYTES["k8v8"])
BASELINE = (2 * 16 * 3 * BYTES["bf16"],)
MTP: dict[str, Any] = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
LONG: dict[str, Any] = {"sampling": {"max_tokens": 40, "ignore_eos": True}, **FLOATS}
LONG |= {
    "max_model_len": CHUNKS["max_model_len"]
}  # of which the calibration depends, and a random model's text on that


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_glm4_moe(tmp_path_factory.mktemp("glm"))


@cache
def plain(model: Path, kv_format: str) -> Run:
    return run(PROMPTS, model=model, kv_format=kv_format, **LONG)


@pytest.mark.parametrize("kv_format", ["k4v4", "k8v8", "bf16"])
def test_text_is_that_of_plain_decoding(model: Path, kv_format: str) -> None:
    found = run(PROMPTS, model=model, kv_format=kv_format, **LONG, **MTP)
    assert found.tokens == plain(model, kv_format).tokens
    assert len(PROMPTS) < found.accepted < found.drafted - len(PROMPTS)
    of_head = BYTES["bf16" if kv_format == "bf16" else "k8v8"]
    assert sorted(shape[-1] for shape in found.pool["shapes"]) == sorted([BYTES[kv_format]] * 2 + [of_head])


def test_chunks_prefix_hits_and_preemption_leave_the_text(model: Path) -> None:
    again = run(PROMPTS, model=model, rounds=2, **MTP, **{**LONG, **CHUNKS})
    assert again.tokens == plain(model, "k4v4").tokens
    assert sum(again.cached_tokens) > 0 and again.accepted > len(PROMPTS)
    pool = {"kv_cache_memory_bytes": 48 * BLOCK_BYTES}  # one of the longest
    preempted = run(PROMPTS, model=model, **MTP, **{**LONG, **CHUNKS, **pool})
    assert preempted.tokens == plain(model, "k4v4").tokens
    assert preempted.preemptions > 0 and preempted.accepted > len(PROMPTS)


def test_reports_equal_what_the_pool_held(model: Path) -> None:
    flags = (str(model), "--speculative-config", json.dumps(MTP["speculative_config"]))
    found = compare(Setup(flags, BLOCK_BYTES, BASELINE, blocks=64, longest=600), requests=40, seed=5)
    assert found.mismatches == []
    for event in ("accepted_drafts", "aborted", "several_sequences", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts
