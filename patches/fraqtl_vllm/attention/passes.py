"""How the prompt chunks of a step are attended: in passes of flash attention, planned on the host.

A chunk's queries see their cached prefix and the chunk itself. A pass takes some requests and, of each, one
range of keys [first, first + count). Keys that are cached are dequantized into a workspace of fixed size,
so a pass never takes more keys than it holds:

- requests without a cached prefix need no workspace and share one pass;
- requests whose visible keys fit together into the workspace share one pass;
- a longer prefix is cut into pieces, whose outputs are joined by the logarithms of their softmax sums.
  Only the last piece holds the chunk, and only it is causal: the others are seen whole by every query.

With a sliding window nothing older than window - 1 tokens before the chunk is seen, so the workspace is made
to hold that much and no piece is needed (a piece couldn't say where the window lies).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Chunk:
    """The query tokens of one request in a step. row: its place in the batch. start: its first query token
    in the batch's tensors. queries: how many. length: keys in the cache once the chunk is written."""

    row: int
    start: int
    queries: int
    length: int

    @property
    def prefix(self) -> int:
        return self.length - self.queries

    def oldest(self, window: int | None) -> int:
        """The oldest key that any query of the chunk sees."""
        return 0 if window is None else max(0, self.prefix - window + 1)


@dataclass(frozen=True)
class Pass:
    """One call of flash attention.

    chunks: neighbors in the batch. first, counts: the keys [first, first + count) of each. from_pages: whether
    keys come out of the workspace. causal: whether they end with the chunk itself. joined: whether the output
    is one piece of a request's (then `chunks` has one entry).
    """

    chunks: tuple[Chunk, ...]
    first: tuple[int, ...]
    counts: tuple[int, ...]
    from_pages: bool
    causal: bool
    joined: bool

    @property
    def tokens(self) -> slice:
        """Its query tokens in the batch's tensors."""
        return slice(self.chunks[0].start, self.chunks[-1].start + self.chunks[-1].queries)

    @property
    def rows(self) -> slice:
        """Its requests in the batch's tensors."""
        return slice(self.chunks[0].row, self.chunks[-1].row + 1)


def list_chunks(query_start: Sequence[int], seq_lens: Sequence[int], decodes: int) -> tuple[Chunk, ...]:
    """The chunks of a batch whose first `decodes` requests are decoded. Requests without a query are padding."""
    rows = [
        Chunk(row, start, end - start, length)
        for row, ((start, end), length) in enumerate(zip(pairwise(query_start), seq_lens, strict=False))
    ]
    return tuple(chunk for chunk in rows[decodes:] if chunk.queries)


def plan_passes(chunks: Sequence[Chunk], capacity: int, window: int | None) -> list[Pass]:
    """All passes of a step, in order. capacity: keys that the workspace holds.

    Raises ValueError if a window and its chunk don't fit into the workspace.
    """
    passes: list[Pass] = []
    for group in _groups(chunks, capacity, window):
        oldest = tuple(chunk.oldest(window) for chunk in group)
        counts = tuple(chunk.length - first for chunk, first in zip(group, oldest, strict=True))
        if group[0].prefix == 0:
            passes.append(Pass(group, oldest, counts, from_pages=False, causal=True, joined=False))
        elif sum(counts) <= capacity:
            passes.append(Pass(group, oldest, counts, from_pages=True, causal=True, joined=False))
        elif window is None:
            passes.extend(_pieces(group[0], capacity))
        else:
            raise ValueError(f"a window of {window} and a chunk of {group[0].queries} exceed {capacity} keys")
    return passes


def _groups(chunks: Sequence[Chunk], capacity: int, window: int | None) -> Iterator[tuple[Chunk, ...]]:
    """Neighbors that share a pass."""
    group: list[Chunk] = []
    used = 0
    for chunk in chunks:
        keys = chunk.length - chunk.oldest(window) if chunk.prefix else 0
        starts_pass = bool(group) and ((group[-1].prefix == 0) != (chunk.prefix == 0) or used + keys > capacity)
        if starts_pass:
            yield tuple(group)
            group, used = [], 0
        group.append(chunk)
        used += keys
    if group:
        yield tuple(group)


def _pieces(chunk: Chunk, capacity: int) -> Iterator[Pass]:
    """A long prefix from its start; the last piece holds the chunk and what of the prefix is left."""
    for first in range(0, chunk.prefix, capacity):
        count = min(capacity, chunk.prefix - first)
        if chunk.length - first <= capacity:
            yield Pass((chunk,), (first,), (chunk.length - first,), from_pages=True, causal=True, joined=True)
            return
        yield Pass((chunk,), (first,), (count,), from_pages=True, causal=False, joined=True)
    yield Pass((chunk,), (chunk.prefix,), (chunk.queries,), from_pages=False, causal=True, joined=True)
