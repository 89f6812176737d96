"""Which tokens of its request a program of a decode batch attends: the device's half of `plan.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def oldest_visible(length, count, window):
    """The first token that the first of the last `count` query tokens sees. window: None sees everything."""
    oldest = length * 0
    if window is not None:
        oldest = tl.maximum(length - count - window + 1, 0)
    return oldest


@triton.jit
def count_pieces(
    first, length, seq_lens, query_start, requests, kv_heads, splits, programs, window, SHAPE: tl.constexpr
):
    """(pieces of a request that sees [first, length), its tiles). first: a multiple of TILE."""
    TILE: tl.constexpr = SHAPE.TILE
    total = first * 0
    for start in range(0, requests, 256):
        r = start + tl.arange(0, 256)
        n = tl.load(seq_lens + r, mask=r < requests, other=0).to(tl.int32)
        if window is not None:
            count = tl.load(query_start + r + 1, mask=r < requests, other=0)
            count -= tl.load(query_start + r, mask=r < requests, other=0)
            n = tl.minimum(n, count.to(tl.int32) + window + TILE)
        total += tl.sum((n + TILE - 1) // TILE, 0).to(total.dtype)
    own = tl.cdiv(length - first, TILE)
    whole = tl.maximum(total * kv_heads, 1)
    pieces = (2 * own.to(tl.int64) * programs + whole) // (2 * whole)
    pieces = tl.minimum(pieces.to(tl.int32), tl.minimum(own // SHAPE.MIN_TILES, splits))
    return tl.maximum(pieces, 1), own


@triton.jit
def piece_start(index, pieces, own):
    """The tiles before one of the pieces of a request of `own` tiles."""
    return (own.to(tl.int64) * index // pieces).to(tl.int32)
