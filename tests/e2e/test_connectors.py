"""Packed blocks in vLLM's stores: memory beside the pool and folders of files, through evictions and restarts.

Texts are compared in float32. In 16 bits the sums of linear layers depend on how many tokens a step has, and a request
that waits for its store runs in other steps. Where steps are the same, so are texts: that is compared in bfloat16.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.accounts import compare, with_store
from tests.e2e.engine import DEMO_MODEL, Run, run
from tests.e2e.random_models import random_nemotron_nas

LENGTHS = (17, 32, 33, 300, 411, 640)  # of prompts: the last block holds one token, all its tokens, or some
PROMPTS = [[(7 * i * (i + n) + 3) % 1800 + 200 for i in range(n)] for n in LENGTHS]
IN_WHOLE_BLOCKS = sum(n // 16 * 16 for n in LENGTHS)
SAMPLING = {"max_tokens": 24, "ignore_eos": True}
SENTENCE = (
    "has blocks of this model in another format, with other constants or from other weights ({}): they are not read, "
    "and prompts are computed anew"
)


Options = dict[str, Any]


def connector(folder: Path | None, memory: int = 32 << 20, **more: Any) -> Options:
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


@cache
def text_up_to(context: int) -> list[list[int]]:
    """As `text`, with the constants that belong to this longest context."""
    return served(None, max_model_len=context).tokens


@cache
def text(kv_format: str = "k4v4", calibration: bool = True) -> list[list[int]]:
    """Without a connector."""
    section = {"kv_format": kv_format, "calibration": calibration}
    return served(None, additional_config={"fraqtl": section}).tokens


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that a `k4v4` engine has filled. Tests take copies."""
    folder = tmp_path_factory.mktemp("filled")
    stored = served(folder)
    assert (stored.queried, stored.loaded, stored.tokens) == (sum(LENGTHS), 0, text())
    return folder


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "store"))


@pytest.mark.smoke
def test_text_is_the_same_after_a_round_trip_through_disk(store: Path) -> None:
    loaded = served(store)
    assert loaded.loaded == IN_WHOLE_BLOCKS
    assert loaded.tokens == text()
    assert SENTENCE.split("(")[0] not in loaded.log


def test_what_follows_a_loaded_beginning_comes_in_chunks_as_it_would_have(store: Path) -> None:
    prompts = [[*prompt, *range(300, 400)] for prompt in PROMPTS]
    options: Options = {"sampling": SAMPLING, "dtype": "float32"}
    chunks: Options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": True}
    loaded = run(prompts, **options, **chunks, kv_transfer_config=connector(store))
    assert loaded.loaded == IN_WHOLE_BLOCKS
    assert loaded.tokens == run(prompts, **options).tokens


def test_in_16_bits_a_store_gives_the_text_that_the_prefix_cache_gives(tmp_path: Path) -> None:
    """One request at a time, whose last block is never full: that one the prefix cache would not give."""
    prompts = [prompt for prompt in PROMPTS if len(prompt) % 16]
    alone: Options = {"sampling": SAMPLING, "enable_prefix_caching": True, "max_num_seqs": 1}
    found = run(prompts, rounds=2, **alone)
    run(prompts, **alone, kv_transfer_config=connector(tmp_path))
    loaded = run(prompts, **alone, kv_transfer_config=connector(tmp_path))
    assert loaded.cached_tokens == found.cached_tokens
    assert loaded.loaded == sum(found.cached_tokens)
    assert loaded.tokens == found.tokens


def test_a_store_of_another_format_is_not_read(store: Path) -> None:
    [other] = stores(store)
    anew = served(store, kv_format="k8v8")
    assert (anew.queried, anew.loaded) == (sum(LENGTHS), 0)
    assert SENTENCE.format(other) in anew.log
    loaded = served(store, kv_format="k8v8")
    assert (loaded.loaded, len(stores(store))) == (IN_WHOLE_BLOCKS, 2)
    assert anew.tokens == loaded.tokens == text("k8v8")


def test_a_store_with_other_constants_is_not_read(store: Path) -> None:
    """The same format and weights; what differs is whether the constants were calibrated."""
    [other] = stores(store)
    anew = served(store, additional_config={"fraqtl": {"kv_format": "k4v4", "calibration": False}})
    assert (anew.queried, anew.loaded) == (sum(LENGTHS), 0)
    assert SENTENCE.format(other) in anew.log
    assert anew.tokens == text(calibration=False)


def test_a_store_that_says_it_is_something_else_is_refused(store: Path) -> None:
    [config] = store.glob("*/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    with pytest.raises(RuntimeError, match="was written for something else than its name says: delete this folder"):
        served(store)


def test_files_that_are_cut_off_are_computed_anew(store: Path) -> None:
    files = sorted(store.rglob("*.bin"))
    for file in files[::2]:
        file.write_bytes(file.read_bytes()[:100])
    loaded = served(store)
    assert loaded.tokens == text()
    assert loaded.loaded < IN_WHOLE_BLOCKS


SMALL: Options = {"kv_cache_memory_bytes": 70 * 8704}  # for the longest prompt, and little beside it


def test_memory_beside_a_small_pool() -> None:
    """--kv-offloading-size alone: what the pool evicts comes back from memory."""
    again = served(None, **SMALL, max_model_len=1024, kv_offloading_size=0.03, rounds=3)
    assert again.loaded > 0
    assert again.tokens == text_up_to(1024)


def test_small_pool_small_memory_and_disk(tmp_path: Path) -> None:
    """Both forget; chunks have two blocks each."""
    offload = connector(tmp_path, memory=30 * (5 << 12), blocks_per_chunk=2)
    again = served(None, **SMALL, max_model_len=1024, kv_transfer_config=offload, rounds=3)
    assert again.loaded > 0
    assert again.tokens == text_up_to(1024)


def test_unlike_layers(tmp_path: Path) -> None:
    options: Options = {
        "model": random_nemotron_nas(tmp_path / "model"),
        "trust_remote_code": True,
        "max_model_len": 1024,
    }
    stored, loaded = served(tmp_path / "store", **options), served(tmp_path / "store", **options)
    assert loaded.tokens == stored.tokens == served(None, **options).tokens
    assert loaded.loaded > 0


def test_two_ranks_have_a_store_of_their_own(store: Path) -> None:
    ranks: Options = {"tensor_parallel_size": 2, "in_process": False}
    stored = served(store, **ranks)
    loaded = served(store, **ranks)
    assert (stored.loaded, loaded.loaded) == (0, IN_WHOLE_BLOCKS)
    assert loaded.tokens == stored.tokens


def test_reports_count_blocks_that_came_from_a_store(tmp_path: Path) -> None:
    """The memory holds a third of what the pool does, and the pool a few requests: everything is evicted."""
    found = compare(with_store(tmp_path), requests=60, seed=3)
    assert found.mismatches == []
    for event in ("aborted", "with_loaded_blocks", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts


def test_a_memory_that_holds_no_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the memory beside the pool holds no block: give at least 12288 bytes"):
        run(PROMPTS, model=DEMO_MODEL, kv_transfer_config=connector(tmp_path, memory=1000))
