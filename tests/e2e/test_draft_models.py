"""A second model drafts: the text is that of plain decoding, and its layers are in the pool and in reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.accounts import DEMO_BASELINE, DEMO_BLOCK, Setup, compare
from tests.e2e.draft_models import first_layers
from tests.e2e.engine import Run, run
from tests.e2e.random_models import random_gemma2, random_llama
from tests.e2e.test_speculation import FLOATS, PROMPTS, plain, reads_the_same

LAYERS = 3  # of the draft model
BYTES = {"k4v4": 68, "k8v8": 132, "bf16": 256}  # of a token and KV head, keys and values of 64
BLOCK_BYTES = DEMO_BLOCK + LAYERS * 2 * 16 * BYTES["k8v8"]
BASELINE = (DEMO_BASELINE[0] + LAYERS * 2 * 16 * BYTES["bf16"],)
CHUNKS: dict[str, Any] = {
    "max_num_batched_tokens": 96,
    "max_num_seqs": 12,
    "enable_prefix_caching": True,
    "max_model_len": 704,
}
TINY_POOL: dict[str, Any] = {"kv_cache_memory_bytes": 48 * BLOCK_BYTES}  # one of the longest


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_layers(tmp_path_factory.mktemp("draft") / "model", LAYERS)


def by(model: Path, drafts: int = 4, **options: Any) -> dict[str, Any]:
    return {
        "speculative_config": {
            "method": "draft_model",
            "model": str(model),
            "num_speculative_tokens": drafts,
            **options,
        }
    }


def kept_some_but_not_all(found: Run) -> bool:
    return len(PROMPTS) < found.accepted < found.drafted - len(PROMPTS)


@pytest.mark.smoke
def test_text_is_that_of_plain_decoding(drafting: Path) -> None:
    found = run(PROMPTS, **by(drafting), **FLOATS)
    assert found.tokens == plain().tokens
    assert kept_some_but_not_all(found)
    assert sorted(shape[-1] for shape in found.pool["shapes"]) == [BYTES["k4v4"]] * 4 + [BYTES["k8v8"]] * LAYERS
    assert found.kv_pool["block_bytes"] == BLOCK_BYTES
    assert found.kv_pool["baseline_block_bytes"] == 2 * BASELINE[0]  # a float32 model's
    assert "KV cache calibrated" in found.log and ": 4 layers, " in found.log


@pytest.mark.parametrize("drafts", [1, 7])
def test_number_of_drafts(drafting: Path, drafts: int) -> None:
    found = run(PROMPTS, **by(drafting, drafts), **FLOATS)
    assert found.tokens == plain().tokens
    assert kept_some_but_not_all(found)


def test_chunks_and_prefix_hits_leave_the_text(drafting: Path) -> None:
    found = run(PROMPTS, **by(drafting), rounds=2, **FLOATS, **CHUNKS)
    assert found.tokens == plain().tokens
    assert sum(found.cached_tokens) > 0 and kept_some_but_not_all(found)


def test_preemption_leaves_the_text(drafting: Path) -> None:
    sampling = {"max_tokens": 48, "ignore_eos": True}  # so that requests grow and don't fit; what follows is no answer
    found = run(PROMPTS, sampling=sampling, **by(drafting), **FLOATS, **CHUNKS, **TINY_POOL)
    assert [a[: len(b)] for a, b in zip(found.tokens, plain().tokens, strict=True)] == plain().tokens
    assert found.preemptions > 0 and kept_some_but_not_all(found)


def test_what_is_read_is_what_plain_decoding_reads(drafting: Path) -> None:
    reads_the_same(**by(drafting))


def test_drafts_end_where_the_context_does(drafting: Path) -> None:
    """The last steps before --max-model-len have no room for drafts."""
    prompts, sampling = [PROMPTS[0], PROMPTS[5]], {"max_tokens": 100, "ignore_eos": True}
    options: dict[str, Any] = {"sampling": sampling, "max_model_len": 112, "max_num_seqs": 2, **FLOATS}
    texts = [run(prompts, **options, **more) for more in ({}, by(drafting))]
    assert texts[0].tokens == texts[1].tokens
    assert [len(text) for text in texts[1].tokens] == [112 - len(prompt) for prompt in prompts]


@pytest.mark.parametrize(("kv_format", "of_drafts"), [("bf16", "bf16"), ("k8v8", "k8v8"), ("k4v2", "k8v8")])
def test_formats(drafting: Path, kv_format: str, of_drafts: str) -> None:
    options = {"kv_format": kv_format, **FLOATS}
    texts = [run(PROMPTS, **options, **more) for more in ({}, by(drafting))]
    assert texts[0].tokens == texts[1].tokens
    assert kept_some_but_not_all(texts[1])
    assert sum(shape[-1] == BYTES[of_drafts] for shape in texts[1].pool["shapes"]) >= LAYERS


def test_formats_of_single_layers(drafting: Path) -> None:
    """The numbers of draft layers begin at 0, too: they keep the format of drafts."""
    options = {"additional_config": {"fraqtl": {"kv_format": "k8v8", "kv_layers": {0: "k4v4", 1: "bf16"}}}, **FLOATS}
    texts = [run(PROMPTS, **options, **more) for more in ({}, by(drafting))]
    assert texts[0].tokens == texts[1].tokens
    assert kept_some_but_not_all(texts[1])
    sizes = [BYTES["k4v4"], *[BYTES["k8v8"]] * (2 + LAYERS), BYTES["bf16"]]
    assert sorted(shape[-1] for shape in texts[1].pool["shapes"]) == sizes
    assert texts[1].kv_pool["block_bytes"] == 2 * 16 * sum(sizes)


def test_layers_of_another_shape(tmp_path: Path) -> None:
    """Heads of 128, one KV head: pages of another size in the same blocks. Its drafts are hardly ever right."""
    model = random_llama(tmp_path / "model", 128, num_key_value_heads=1)
    found = run(PROMPTS, **by(model), **FLOATS)
    assert found.tokens == plain().tokens
    assert found.drafted > len(PROMPTS)
    assert found.kv_pool["block_bytes"] == DEMO_BLOCK + 2 * 1 * 16 * (2 * 128 + 4)


@pytest.mark.parametrize("sampled", ["greedy", "probabilistic"])
def test_several_texts_of_a_prompt(drafting: Path, sampled: str) -> None:
    sampling = {"n": 3, "temperature": 0.01, "seed": 1}
    found = run(PROMPTS, sampling=sampling, **by(drafting, draft_sample_method=sampled), **FLOATS)
    same = [choice == text for choices, text in zip(found.choices, plain().tokens, strict=True) for choice in choices]
    assert len(same) == 3 * len(PROMPTS) and sum(same) > 0.95 * len(same)
    assert kept_some_but_not_all(found)


def test_windows_unlike_the_models(tmp_path: Path) -> None:
    model = random_gemma2(tmp_path / "model")
    with pytest.raises(RuntimeError, match="draft models where layers of the two models have unlike windows yet"):
        run(PROMPTS[:1], **by(model), **FLOATS)


def test_reports_equal_what_the_pool_held(drafting: Path) -> None:
    flags = ("--speculative-config", json.dumps(by(drafting)["speculative_config"]))
    found = compare(Setup(flags, BLOCK_BYTES, BASELINE, blocks=64, longest=600), requests=60, seed=3)
    assert found.mismatches == []
    for event in ("accepted_drafts", "aborted", "streamed", "several_sequences", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts
