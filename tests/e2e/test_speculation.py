"""Speculative decoding: the text is that of plain decoding, and drafts are really accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tests.e2e.accounts import DRAFTS, DRAFTS_IN_TINY_POOL, compare
from tests.e2e.engine import Run, run
from tests.e2e.prompts import encode, recall_prompt

LENGTHS = (*range(90, 106), 150, 233, 400, 641)
PROMPTS = [recall_prompt(n, seed=n)[0] for n in LENGTHS]
NGRAM: dict[str, Any] = {"speculative_config": DRAFTS}
FLOATS: dict[str, Any] = {"dtype": "float32"}
TWO_RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "in_process": False}
BLOCK_BYTES = 4 * 2 * 16 * 68  # of all layers in k4v4
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 96, "enable_prefix_caching": True, "max_model_len": 704}
TINY_POOL: dict[str, Any] = {"kv_cache_memory_bytes": 48 * BLOCK_BYTES, "max_num_seqs": 12}  # one of the longest


@cache
def plain() -> Run:
    return run(PROMPTS, **FLOATS)


@pytest.mark.smoke
def test_text_is_that_of_plain_decoding() -> None:
    found = run(PROMPTS, **NGRAM, **FLOATS)
    assert found.tokens == plain().tokens
    assert found.accepted > len(PROMPTS), "most answers repeat a sentence of their prompt"
    assert plain().accepted == 0


@cache
def plain_on_two_ranks() -> Run:
    return run(PROMPTS, **FLOATS, **TWO_RANKS)


def test_two_ranks() -> None:
    """A rank that gave nothing back would pass here: its text turns in `test_eagle.py`, which has more drafts."""
    found = run(PROMPTS, **NGRAM, **FLOATS, **TWO_RANKS)
    assert found.tokens == plain_on_two_ranks().tokens
    assert found.accepted > len(PROMPTS)


def test_chunks_and_prefix_hits_leave_the_text() -> None:
    found = run(PROMPTS, **NGRAM, rounds=2, **FLOATS, **CHUNKS)
    assert found.tokens == plain().tokens
    assert sum(found.cached_tokens) > 0 and found.accepted > len(PROMPTS)


def test_preemption_leaves_the_text() -> None:
    sampling = {"max_tokens": 48, "ignore_eos": True}  # so that requests grow and don't fit; what follows is no answer
    found = run(PROMPTS, sampling=sampling, **NGRAM, **FLOATS, **CHUNKS, **TINY_POOL)
    assert [a[: len(b)] for a, b in zip(found.tokens, plain().tokens, strict=True)] == plain().tokens
    assert found.preemptions > 0 and found.accepted > len(PROMPTS)


def test_what_is_read_is_what_plain_decoding_reads() -> None:
    reads_the_same(**NGRAM)


def reads_the_same(prompts: list[list[int]] = PROMPTS, tokens: int = 48, most: float = 0.02, **engine: Any) -> None:
    """The log-probabilities along long texts. A residual that a rejected draft displaced changes them by tenths.

    most: of 98 % of the differences, in nats.
    """
    sampling = {"max_tokens": tokens, "ignore_eos": True, "logprobs": 0}
    plain = {name: value for name, value in engine.items() if name != "speculative_config"}
    texts = [run(prompts, sampling=sampling, **{**FLOATS, **options}) for options in (plain, engine)]
    gaps = []
    for a, b, x, y in zip(*(text.tokens for text in texts), *(text.logprobs for text in texts), strict=True):
        same = next((i for i in range(len(a)) if a[i] != b[i]), len(a))
        gaps += [abs(p - q) for p, q in zip(x[:same], y[:same], strict=True)]
    gaps.sort()
    assert texts[1].drafted > texts[1].accepted > 0
    assert len(gaps) > 0.9 * tokens * len(prompts)
    assert gaps[len(gaps) // 2] < 1e-4
    assert gaps[int(0.98 * len(gaps))] < most


@pytest.mark.parametrize(("kv_format", "others"), [("k4v4", {0: "k8v8", -1: "bf16"}), ("k8v8", {1: "k4v4"})])
def test_formats_of_single_layers(kv_format: str, others: dict[int, str]) -> None:
    """Layers with residuals take turns, also where the format of most layers has none."""
    ours = {"fraqtl": {"kv_format": kv_format, "kv_layers": others}}
    reads_the_same(additional_config=ours, **NGRAM)


def test_several_texts_of_a_prompt() -> None:
    sampling = {"n": 3, "temperature": 0.01, "seed": 1}
    found = run(PROMPTS, sampling=sampling, **NGRAM, **FLOATS)
    same = [choice == text for choices, text in zip(found.choices, plain().tokens, strict=True) for choice in choices]
    assert len(same) == 3 * len(PROMPTS) and sum(same) > 0.95 * len(same)
    assert found.accepted > 3 * len(PROMPTS)


def test_answers_that_follow_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "enum": ["yes", "no"]} for name in ("first", "second", "third")},
        "required": ["first", "second", "third"],
        "additionalProperties": False,
    }
    example = ' {"first": "yes", "second": "no", "third": "yes"}'
    prompts = [encode(f"<|bos|><|user|>{example * 2} {n}<|end|><|assistant|>") for n in range(6)]
    sampling = {"json_schema": schema, "max_tokens": 200}
    options = {**FLOATS, "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    texts = [run(prompts, sampling=sampling, **options, **more) for more in ({}, NGRAM)]
    assert texts[0].tokens == texts[1].tokens
    assert all(json.loads(text).keys() == schema["properties"].keys() for text in texts[1].texts)  # type: ignore[attr-defined]
    assert texts[1].accepted > 0


def test_reports_equal_what_the_pool_held() -> None:
    found = compare(replace(DRAFTS_IN_TINY_POOL, blocks=64, longest=600), requests=60, seed=3)
    assert found.mismatches == []
    for event in (
        "accepted_drafts",
        "aborted",
        "streamed",
        "several_sequences",
        "stopped_by_string",
        "with_shared_blocks",
        "preemptions",
    ):
        assert found.counts[event] > 0, found.counts
