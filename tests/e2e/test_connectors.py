"""Packed blocks in vLLM's stores: memory beside the pool and folders of files, through evictions and restarts.

Texts are compared in float32. In 16 bits the sums of linear layers depend on how many tokens a step has, and a request
that waits for its store runs in other steps. Where steps are the same, so are texts: that is compared in bfloat16.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.accounts import TINY_POOL, compare, sliding_windows
from tests.e2e.engine import DEMO_MODEL, Run, run
from tests.e2e.random_models import random_gemma2, random_nemotron_nas

LENGTHS = (17, 32, 33, 300, 411, 640)  # of prompts: the last block holds one token, all its tokens, or some
PROMPTS = [[(7 * i * (i + n) + 3) % 1800 + 200 for i in range(n)] for n in LENGTHS]
IN_WHOLE_BLOCKS = sum(n // 16 * 16 for n in LENGTHS)
SAMPLING = {"max_tokens": 24, "ignore_eos": True}
SENTENCE = (
    "has blocks of this model in another format, with other constants or from other weights ({}): they are not read, "
    "and prompts are computed anew"
)


def connector(folder: Path | None, memory: int = 32 << 20, **more: Any) -> dict[str, Any]:
    """vLLM's OffloadingConnector, with `folder` behind its memory."""
    tiers = [] if folder is None else [{"type": "fs", "root_dir": str(folder)}]
    extra = {"cpu_bytes_to_use": memory, "secondary_tiers": tiers, **more}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def served(folder: Path | None, **options: Any) -> Run:
    """A fresh process. Without a folder there is no connector."""
    options = {"sampling": SAMPLING, "enable_prefix_caching": True, "dtype": "float32", **options}
    if folder is not None:
        options = {"kv_transfer_config": connector(folder), **options}
    return run(PROMPTS, **options)


def stores(folder: Path) -> list[str]:
    """Of every format and set of constants the name of its folder."""
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


@pytest.mark.smoke
@pytest.mark.parametrize("kv_format", ["k4v4", "k8v8"])
def test_text_is_the_same_after_a_round_trip_through_disk(tmp_path: Path, kv_format: str) -> None:
    stored = served(tmp_path, kv_format=kv_format)
    assert (stored.queried, stored.loaded) == (sum(LENGTHS), 0)
    loaded = served(tmp_path, kv_format=kv_format)
    assert loaded.loaded == IN_WHOLE_BLOCKS
    assert served(None, kv_format=kv_format).tokens == stored.tokens == loaded.tokens
    assert SENTENCE.split("(")[0] not in loaded.log


def test_in_16_bits_a_store_gives_the_text_that_the_prefix_cache_gives(tmp_path: Path) -> None:
    """One request at a time, whose last block is never full: that one the prefix cache would not give."""
    prompts = [prompt for prompt in PROMPTS if len(prompt) % 16]
    alone: dict[str, Any] = {"sampling": SAMPLING, "enable_prefix_caching": True, "max_num_seqs": 1}
    found = run(prompts, rounds=2, **alone)
    run(prompts, **alone, kv_transfer_config=connector(tmp_path))
    loaded = run(prompts, **alone, kv_transfer_config=connector(tmp_path))
    assert loaded.cached_tokens == found.cached_tokens
    assert loaded.loaded == sum(found.cached_tokens)
    assert loaded.tokens == found.tokens


def test_what_is_loaded_goes_on_in_chunks_as_it_would_have(tmp_path: Path) -> None:
    """The store has the beginnings of prompts only; what follows them is computed in steps of 64 tokens."""
    halves = [prompt[: len(prompt) // 2] for prompt in PROMPTS]
    before: dict[str, Any] = {"sampling": SAMPLING, "enable_prefix_caching": True, "dtype": "float32"}
    run(halves, **before, kv_transfer_config=connector(tmp_path))
    loaded = served(tmp_path, max_num_batched_tokens=64, max_num_seqs=4)
    assert loaded.loaded == sum(len(half) // 16 * 16 for half in halves)
    assert loaded.tokens == served(None).tokens


def test_a_store_of_another_format_is_not_read(tmp_path: Path) -> None:
    served(tmp_path, kv_format="k4v4")
    [other] = stores(tmp_path)
    loaded = served(tmp_path, kv_format="k8v8")
    assert (loaded.queried, loaded.loaded) == (sum(LENGTHS), 0)
    assert SENTENCE.format(other) in loaded.log
    assert loaded.tokens == served(None, kv_format="k8v8").tokens
    assert len(stores(tmp_path)) == 2


def test_a_store_with_other_constants_is_not_read(tmp_path: Path) -> None:
    """The same format and weights; what differs is whether the constants were calibrated."""
    plain = {"additional_config": {"fraqtl": {"kv_format": "k4v4", "calibration": False}}}
    served(tmp_path)
    [other] = stores(tmp_path)
    loaded = served(tmp_path, **plain)
    assert (loaded.queried, loaded.loaded) == (sum(LENGTHS), 0)
    assert SENTENCE.format(other) in loaded.log
    assert loaded.tokens == served(None, **plain).tokens


def test_a_store_that_says_it_is_something_else_is_refused(tmp_path: Path) -> None:
    served(tmp_path)
    [config] = tmp_path.glob("*/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    with pytest.raises(RuntimeError, match="was written for something else than its name says: delete this folder"):
        served(tmp_path)


def test_files_that_are_cut_off_are_computed_anew(tmp_path: Path) -> None:
    text = served(tmp_path).tokens
    files = sorted(tmp_path.rglob("*.bin"))
    for file in files[::2]:
        file.write_bytes(file.read_bytes()[:100])
    loaded = served(tmp_path)
    assert loaded.tokens == text
    assert loaded.loaded < IN_WHOLE_BLOCKS


def test_memory_beside_a_small_pool(tmp_path: Path) -> None:
    """--kv-offloading-size alone: what the pool evicts comes back from memory."""
    small = {"kv_cache_memory_bytes": 70 * 8704, "max_model_len": 1024}
    text = served(None, **small).tokens
    again = served(None, **small, kv_offloading_size=0.03, rounds=3)
    assert again.tokens == text
    assert again.loaded > 0


def test_small_pool_small_memory_and_disk(tmp_path: Path) -> None:
    """Both forget; chunks have two blocks each."""
    small = {"kv_cache_memory_bytes": 70 * 8704, "max_model_len": 1024}
    offload = connector(tmp_path, memory=30 * (5 << 12), blocks_per_chunk=2)
    again = served(None, **small, kv_transfer_config=offload, rounds=3)
    assert again.tokens == served(None, **small).tokens
    assert again.loaded > 0


@pytest.mark.parametrize("make", [random_gemma2, random_nemotron_nas])
def test_sliding_windows_and_unlike_layers(tmp_path: Path, make: Any) -> None:
    options = {"model": make(tmp_path / "model"), "trust_remote_code": True, "max_model_len": 1024}
    text = served(tmp_path / "store", **options).tokens
    loaded = served(tmp_path / "store", **options)
    assert loaded.tokens == text == served(None, **options).tokens
    assert loaded.loaded > 0


def test_two_ranks_share_a_folder_that_one_rank_cannot_read(tmp_path: Path) -> None:
    ranks = {"tensor_parallel_size": 2, "in_process": False}
    text = served(tmp_path, **ranks).tokens
    loaded = served(tmp_path, **ranks)
    assert (loaded.tokens, loaded.loaded) == (text, IN_WHOLE_BLOCKS)
    assert served(tmp_path).loaded == 0


def flags(folder: Path, memory: int) -> tuple[str, str]:
    return "--kv-transfer-config", json.dumps(connector(folder, memory))


def test_reports_count_blocks_that_came_from_a_store(tmp_path: Path) -> None:
    """The memory holds a third of what the pool does, and the pool a few requests: everything is evicted."""
    setup = replace(TINY_POOL, arguments=flags(tmp_path, 24 * (3 << 12)), blocks=64, longest=600)
    found = compare(setup, requests=60, seed=3)
    assert found.mismatches == []
    for event in ("aborted", "with_loaded_blocks", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts


def test_reports_of_sliding_windows(tmp_path: Path) -> None:
    setup = sliding_windows(tmp_path / "model", *flags(tmp_path / "store", 4 << 20), longest=600)
    found = compare(setup, requests=30, seed=4)
    assert found.mismatches == []
    assert found.counts["with_loaded_blocks"] > 0


def test_a_memory_that_holds_no_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the memory beside the pool holds no block: give at least 12288 bytes"):
        run(PROMPTS, model=DEMO_MODEL, kv_transfer_config=connector(tmp_path, memory=1000))
