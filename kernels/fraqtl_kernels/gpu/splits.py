"""How a decode batch is cut into programs, on the host by upper bounds and on the device by real lengths.

The grid (requests, KV heads, splits) is fixed by what the host knows without asking the device:
the number of requests, the longest context it allows for, the number of multiprocessors. A CUDA
graph captured with it serves every batch of that many requests. Inside, every program derives the
same chunk length from the real lengths,

    chunk = max(tiles of the whole batch · KV heads / wanted programs, own tiles / splits, MIN_TILES)

so chunks are equally long over short and long requests; programs without a chunk leave at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fraqtl_kernels.gpu.config import AttentionShape, Tuning

PROGRAMS_PER_SM = 2  # resident at once, by registers and shared memory
SLACK = 2  # grid programs per wanted program, so that uneven lengths still split evenly
MIN_TILES = tl.constexpr(2)
MAX_SPLITS = 128


@dataclass(frozen=True)
class DecodePlan:
    """Launch shape of one decode batch, made from host numbers only.

    requests, queries: the most requests and query tokens a request of the batch (or of the graph).
    splits: programs along the context. programs: how many are wanted at once.
    """

    requests: int
    queries: int
    query_heads: int
    kv_heads: int
    splits: int
    programs: int
    tuning: Tuning

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.queries, self.group, self.tuning.tile, self.tuning.stages, self.queries == 1)

    def scratch_floats(self, head_size: int) -> int:
        """fp32 numbers of scratch that `decode` needs: a partial output and a log-sum per split and query row."""
        if self.splits == 1:
            return 0
        return self.requests * self.query_heads * self.queries * self.splits * (head_size + 1)


def choose_splits(requests: int, kv_heads: int, max_seq_len: int, tile: int, num_sms: int) -> int:
    """Programs along the context for a batch of at most `requests` of at most `max_seq_len` tokens."""
    wanted = PROGRAMS_PER_SM * num_sms * SLACK
    chunks = triton.cdiv(max_seq_len, tile * MIN_TILES.value)
    return max(1, min(wanted // (requests * kv_heads), chunks, MAX_SPLITS))


@triton.jit
def oldest_visible(length, count, window):
    """The first token that the first of the last `count` query tokens sees. window: None sees everything."""
    oldest = length * 0
    if window is not None:
        oldest = tl.maximum(length - count - window + 1, 0)
    return oldest


@triton.jit
def chunk_tokens(
    first, length, seq_lens, query_start, requests, kv_heads, splits, programs, window, TILE: tl.constexpr
):
    """Tokens of one split of a request that sees [first, length), a multiple of TILE."""
    tiles = first * 0
    for start in range(0, requests, 256):
        r = start + tl.arange(0, 256)
        n = tl.load(seq_lens + r, mask=r < requests, other=0).to(tl.int32)
        if window is not None:
            count = tl.load(query_start + r + 1, mask=r < requests, other=0)
            count -= tl.load(query_start + r, mask=r < requests, other=0)
            n = tl.minimum(n, count.to(tl.int32) + window + TILE)
        tiles += tl.sum((n + TILE - 1) // TILE, 0).to(tiles.dtype)
    chunk = tl.cdiv(tiles * kv_heads, programs)
    chunk = tl.maximum(chunk, tl.cdiv(tl.cdiv(length - first, TILE), splits))
    return tl.maximum(chunk, MIN_TILES) * TILE
