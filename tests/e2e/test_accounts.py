"""Reports against the engine's block pool, read by a witness. `python -m tests.e2e.accounts` runs it in full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.accounts import TINY_POOL, compare, hybrid, sliding_windows, unlike_heads


@pytest.mark.smoke
def test_reports_equal_what_the_pool_held() -> None:
    found = compare(replace(TINY_POOL, blocks=64, longest=600), requests=60, seed=3)
    assert found.mismatches == []
    for event in ("aborted", "streamed", "several_sequences", "stopped_by_string", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts


def test_sliding_windows_on_two_ranks(tmp_path: Path) -> None:
    setup = sliding_windows(tmp_path, "--tensor-parallel-size", "2", longest=600, ranks=2)
    found = compare(setup, requests=25, seed=4)
    assert found.mismatches == []
    assert found.counts["with_shared_blocks"] > 0


def test_layers_with_unlike_numbers_of_heads(tmp_path: Path) -> None:
    found = compare(replace(unlike_heads(tmp_path), blocks=64, longest=600), requests=60, seed=5)
    assert found.mismatches == []
    for event in ("aborted", "several_sequences", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts


def test_states_of_a_hybrid_model(tmp_path: Path) -> None:
    found = compare(hybrid(tmp_path), requests=60, seed=5, concurrency=12)
    assert found.mismatches == []
    for event in ("aborted", "streamed", "several_sequences", "with_shared_blocks", "preemptions"):
        assert found.counts[event] > 0, found.counts
