"""CPU prefill: many queries of one request. See `kernels/prefill.py`.

A tile of keys and values is dequantized, attended, and dropped, so the workspace is one tile and what the softmax
carries of each query, whatever the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.cpu.kernels.prefill import ROWS_TOGETHER, Carried, attend_tile, begin, dequantize_tile, finish
from fraqtl_kernels.cpu.kernels.products import PANEL
from fraqtl_kernels.cpu.layers.bits import DTYPES, bits_of
from fraqtl_kernels.cpu.operands import LayerOperands
from fraqtl_kernels.cpu.pages import Pool
from fraqtl_kernels.cpu.plan import Bucket, Softmax
from fraqtl_kernels.cpu.residual import Residuals, StreamResiduals
from fraqtl_kernels.cpu.share import share
from fraqtl_kernels.formats import DEFAULT_FORMAT, get_format
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE

TILE_TOKENS = 4096  # keys dequantized at once, rounded down to whole pieces
PIECE_FLOATS = 16384  # of keys attended at once, and as many of values: they stay in a second-level cache
BLOCK_ROWS = 192  # queries that go over a piece together, in one thread
_NO_RESIDUALS = np.empty((0, 0, 0), np.float32)


def prefill(
    query: Tensor,
    output: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    operands: LayerOperands,
    softmax: Softmax,
    residuals: Residuals | None,
) -> None:
    """Attention of the one request of a bucket, as of `attend`."""
    heads, size = pool.shape[1], layout.head_size
    token, first, count = int(bucket.tokens[0, 0]), int(bucket.positions[0, 0]), bucket.positions.shape[1]
    source, target = _plain(query[token : token + count]), _plain(output[token : token + count])
    batch = _Batch.of(query.shape[1], heads, count, first)
    carried, parts = Carried.of(batch.rows, size), heads * batch.blocks
    reading = operands.to_basis, np.float32(softmax.scale)
    share(lambda a, b: begin(a, b, *_memory(source), batch, reading, carried.q, carried.score_bias), parts)

    pages = Pool.of(pool, layout, with_residual=False), block_table[int(bucket.rows[0])].int().contiguous().numpy()
    near = tuple(_around(residuals, stream, token, count) for stream in ("key", "value"))
    rule = layout.block_size, DISTANCE if residuals else 0, *softmax.limits
    for tile, keys, values in _tiles(heads, size, first, count, softmax.window):
        read = partial(_run, dequantize_tile, *pages, tile, operands.outlier_shift, keys, values)
        share(read, heads * -(-(tile[1] - tile[0]) // PANEL))
        share(partial(_run, attend_tile, tile, batch, keys, values, carried, near, rule), parts)

    bare = softmax.soft_cap is None  # scores come without the center's constant
    restoring = operands.from_basis, softmax.sinks(heads), bare
    share(lambda a, b: finish(a, b, *_memory(target), batch, restoring, carried), parts)
    if target.data_ptr() != output[token : token + count].data_ptr():
        output[token : token + count] = target.to(output.dtype)


class _Batch(NamedTuple):
    """What the compiled loops know of a bucket's queries. block_tokens: that go over keys together, in one thread."""

    heads: int
    group: int
    tokens: int
    blocks: int
    block_tokens: int
    block_rows: int
    first_position: int

    @classmethod
    def of(cls, query_heads: int, heads: int, count: int, first: int) -> _Batch:
        group = query_heads // heads
        block_tokens = min(count, max(1, BLOCK_ROWS // group))
        block_rows = -(-block_tokens * group // ROWS_TOGETHER) * ROWS_TOGETHER
        return cls(heads, group, count, -(-count // block_tokens), block_tokens, block_rows, first)

    @property
    def rows(self) -> int:
        return self.heads * self.blocks * self.block_rows


def _run(function: Any, *arguments: Any) -> None:
    """`share` gives the parts last, compiled functions take them first."""
    *others, first, after = arguments
    function(first, after, *others)


def _plain(x: Tensor) -> Tensor:
    """(tokens, heads, D) as the compiled loops take it: a copy where the heads of a token don't lie side by side."""
    if x.dtype in DTYPES and x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x
    return x.to(x.dtype if x.dtype in DTYPES else torch.float32).contiguous()


def _memory(x: Tensor) -> tuple[tuple[int, int], Any]:
    """Address and stride of a tensor's tokens, and an array that says its dtype."""
    return (x.data_ptr(), x.stride(0)), bits_of(x[:0])


def _tiles(heads: int, size: int, first: int, count: int, window: int | None) -> Iterator[tuple[Any, Any, Any]]:
    """(first key, behind the last), and room for its keys and its values, of all tiles that the queries see."""
    piece = min(TILE_TOKENS, PIECE_FLOATS // size // PANEL * PANEL)
    oldest = 0 if window is None else max(0, first - window + 1) // piece * piece
    after = first + count
    tokens = min(TILE_TOKENS // piece, -(-(after - oldest) // piece)) * piece
    keys = np.empty((heads, tokens // PANEL, size, PANEL), np.float32)
    values = np.empty((heads, tokens // piece, size // PANEL, piece, PANEL), np.float32)
    for start in range(oldest, after, tokens):
        yield (start, min(start + tokens, after)), keys, values


def _around(residuals: Residuals | None, stream: str, token: int, count: int) -> Any:
    """What residuals add to keys or values, (BEFORE + count, KV heads, D), or nothing."""
    of_stream: StreamResiduals | None = getattr(residuals, stream, None)
    return _NO_RESIDUALS if of_stream is None else of_stream.around(token, count).numpy()


def warm_up_prefill(dtype: torch.dtype = torch.bfloat16) -> None:
    """As `warm_up_decode`, for a model in `dtype`."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    x, rows, tokens = torch.zeros(2, 1, 64, dtype=dtype), torch.zeros(1, dtype=torch.int64), torch.arange(2)[None]
    operands = LayerOperands.of(layout, 1)
    prefill(x, x.clone(), pool, layout, rows[None], Bucket(rows, tokens, tokens), operands, Softmax(1.0), None)
