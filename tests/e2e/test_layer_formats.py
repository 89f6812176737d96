"""Formats of single layers: each layer's pages are in its own, and everything that counts bytes knows it."""

from __future__ import annotations

from typing import Any

import torch

from tests.e2e.accounts import MIXED, compare
from tests.e2e.engine import Run, run

PROMPTS = [[5 + (7 * i) % 200 for i in range(300)], [9 + (11 * i) % 150 for i in range(97)]]
BYTES = {"k4v4": 68, "k8v8": 132}  # of a token and KV head, keys and values of 64
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": 64,
    "sampling": {"max_tokens": 12, "prompt_logprobs": 0},
}
HEADS, LAYERS, BLOCK_SIZE = 2, 4, 16


def answered(kv_format: str, **settings: Any) -> Run:
    """In chunks, so that most of a prompt is read back from its pages."""
    return run(PROMPTS, **OPTIONS, additional_config={"fraqtl": {"kv_format": kv_format, **settings}})


def test_layers_are_stored_in_formats_of_their_own() -> None:
    """All layers named one by one are a uniform cache bit by bit; some of them are neither of both."""
    fine, coarse = answered("k8v8"), answered("k4v4")
    all_fine = answered("k4v4", kv_layers=dict.fromkeys(range(LAYERS), "k8v8"))
    assert (all_fine.tokens, all_fine.prompt_logprobs) == (fine.tokens, fine.prompt_logprobs)
    ends = answered("k4v4", kv_layers={0: "k8v8", -1: "k8v8"})
    assert ends.prompt_logprobs not in (fine.prompt_logprobs, coarse.prompt_logprobs)
    content = [run.kv_pool["block_bytes"] for run in (coarse, ends, fine)]
    token = HEADS * BLOCK_SIZE
    mixed = token * 2 * (BYTES["k4v4"] + BYTES["k8v8"])
    assert content == [token * LAYERS * BYTES["k4v4"], mixed, token * LAYERS * BYTES["k8v8"]]
    assert "2 attention layers, all FRAQTL, in pages of k8v8: 132 bytes" in ends.log


def test_a_layer_is_found_by_its_number() -> None:
    found = answered("k4v4", kv_layers={1: "k8v8"})
    assert [shape[-1] for shape in found.pool["shapes"]] == [68, 132, 68, 68]


def test_two_ranks_agree_with_one() -> None:
    """In formats fine enough that what ranks calibrate by themselves makes no difference."""
    settings = {"kv_layers": {1: "bf16", 3: "k8v4"}}
    one = answered("k8v8", **settings)
    ours = {"fraqtl": {"kv_format": "k8v8", **settings}}
    two = run(PROMPTS, **OPTIONS, additional_config=ours, tensor_parallel_size=2, in_process=False)
    for a, b in zip(one.prompt_logprobs, two.prompt_logprobs, strict=True):
        assert (torch.tensor(a) - torch.tensor(b)).abs().mean() < 0.01


def test_reports_count_every_layer_as_it_is() -> None:
    found = compare(MIXED, requests=40, seed=3, concurrency=8)
    assert found.mismatches == []
    assert found.counts["preemptions"] > 0 and found.counts["with_shared_blocks"] > 0, found.counts
