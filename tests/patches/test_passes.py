"""Passes of flash attention: every query sees each of its keys exactly once, within the workspace."""

from __future__ import annotations

import random

import pytest

from fraqtl_vllm.attention.passes import Chunk, Pass, list_chunks, plan_passes


def check(chunks: tuple[Chunk, ...], capacity: int, window: int | None) -> list[Pass]:
    passes = plan_passes(chunks, capacity, window)
    covered: dict[int, list[int]] = {chunk.row: [] for chunk in chunks}
    for p in passes:
        assert p.tokens.stop - p.tokens.start == sum(c.queries for c in p.chunks)
        assert p.rows.stop - p.rows.start == len(p.chunks)
        assert not p.from_pages or sum(p.counts) <= capacity
        assert not p.joined or len(p.chunks) == 1
        for chunk, first, count in zip(p.chunks, p.first, p.counts, strict=True):
            assert count > 0
            # What isn't causal is seen whole, so it must be older than the chunk; what is causal ends with it.
            assert first + count == chunk.length if p.causal else first + count <= chunk.prefix
            assert p.from_pages or first >= chunk.prefix
            assert p.causal or p.joined
            covered[chunk.row] += range(first, first + count)
    for chunk in chunks:
        oldest = 0 if window is None else max(0, chunk.prefix - window + 1)
        assert covered[chunk.row] == list(range(oldest, chunk.length))
    return passes


@pytest.mark.parametrize("window", [None, 1, 7, 20])
def test_every_key_once(window: int | None) -> None:
    source = random.Random(0)
    for _ in range(300):
        start, seq_lens = [0], []
        for _ in range(source.randint(1, 6)):
            queries = source.choice([1, 2, 5, 9, 30])
            start.append(start[-1] + queries)
            seq_lens.append(queries + source.choice([0, 0, 1, 16, 31, 64, 100]))
        check(list_chunks(start, seq_lens, 0), source.choice([50, 64, 130]), window)


def test_prompts_without_a_prefix_share_a_pass_and_need_no_workspace() -> None:
    (only,) = check(list_chunks([0, 5, 9, 12], [5, 4, 3], 0), capacity=2, window=None)
    assert (only.from_pages, only.causal, only.joined) == (False, True, False)
    assert only.tokens == slice(0, 12)


def test_a_long_prefix_is_cut() -> None:
    passes = check(list_chunks([0, 4], [25], 0), capacity=10, window=None)
    assert [(p.first, p.counts, p.causal, p.from_pages) for p in passes] == [
        ((0,), (10,), False, True),
        ((10,), (10,), False, True),
        ((20,), (5,), True, True),
    ]
    # Where the rest of the prefix and the chunk don't fit together, the chunk is attended raw.
    passes = check(list_chunks([0, 8], [25], 0), capacity=10, window=None)
    assert [(p.counts, p.from_pages) for p in passes] == [((10,), True), ((7,), True), ((8,), False)]


def test_decodes_and_padding_are_no_chunks() -> None:
    chunks = list_chunks([0, 1, 2, 7, 7, 7], [9, 3, 5, 0, 0], 2)
    assert chunks == (Chunk(row=2, start=2, queries=5, length=5),)


def test_a_window_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a window of 8 and a chunk of 5 exceed 10 keys"):
        plan_passes(list_chunks([0, 5], [30], 0), 10, 8)
