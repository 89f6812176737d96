"""CPU prefill: many queries of one request, through torch's flash attention for CPUs.

A tile of keys and values is dequantized, attended, and dropped; what the tiles give is joined by the
logarithms of their softmax sums: out = Σ_t e^(lse_t - lse) · out_t, lse = log Σ_t e^lse_t. So the
workspace is one tile, whatever the context.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fraqtl_kernels.cpu.queries import Queries
from fraqtl_kernels.cpu.tiles import Bucket, gather, key_tiles, tile_values
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.residual import DISTANCE, reads_residual

# The public scaled_dot_product_attention runs this operator and drops the second result, the lse.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class LastTile:
    """The keys and values made last, which other queries of the same request may see a part of."""

    def __init__(self) -> None:
        self._place: tuple[int, int] | None = None
        self._tile = (torch.empty(0, 0, 0), torch.empty(0, 0, 0))

    def read(
        self, place: tuple[int, int], tokens: int, make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The first `tokens` of the tile at `place`, (request, position): out of `make` if it isn't the last one."""
        if self._place != place or self._tile[0].shape[2] < tokens:
            self._place, self._tile = place, make()
        key, value = self._tile
        return key[:, :, :tokens], value[:, :, :tokens]


def prefill(
    queries: Queries,
    planes: Planes,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    window: int | None,
    skip_residual: bool = False,
    last_tile: LastTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one request. skip_residual: without the tokens that queries read with their residuals. last_tile: of
    the same layer, best handed from the request's last queries to its first.

    Returns (1, KV heads, M, D) float32 like the queries, in the basis in which V is stored, and the logarithms
    (1, KV heads, M, 1) of the softmax sums. The center of the keys is left out: softmax is blind to it.
    """
    _, heads, rows, size = queries.q.shape
    count = bucket.positions.shape[1]
    group = rows // count
    q = queries.q.view(1, heads * group, count, size)
    out = torch.zeros_like(q)
    lse = q.new_full((1, heads * group, count, 1), -torch.inf)
    tiles = LastTile() if last_tile is None or window is not None else last_tile  # one for a window is spoilt below
    positions = bucket.positions[0]
    for blocks, position in key_tiles(layout, block_table, bucket, window):
        first = int(position[0, 0])
        # What lies behind the last key, or before the window of all, may be anything, even NaN
        used = min(position.shape[1], int(positions[-1]) + 1 - first)
        gone = 0 if window is None else max(0, int(positions[0]) - window + 1 - first)
        bias, blind = _hide(positions, first, used, window, layout.block_size if skip_residual else None)
        if bool(blind.all()):
            continue

        def make(blocks: Tensor = blocks) -> tuple[Tensor, Tensor]:
            key = _keys(queries, planes, layout, blocks)
            value = tile_values(planes.v, planes.v_scale, layout.format.v, blocks)
            return key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

        key, value = tiles.read((int(bucket.rows[0]), first), used, make)
        if gone:
            key[:, :, :gone], value[:, :, :gone] = 0, 0
        part, part_lse = _flash(q, key, value, 0.0, False, attn_mask=bias, scale=1.0)
        # A query that sees nothing of this tile: its lse says so, its output is not to be used.
        part_lse = part_lse.view(1, -1, count, 1).masked_fill(blind, -torch.inf)
        joined = torch.logaddexp(lse, part_lse)
        weight = (part_lse - joined).exp().masked_fill(blind, 0)
        out = out * (lse - joined).exp().nan_to_num(0.0) + part.masked_fill(blind, 0) * weight
        lse = joined
    return out.view(1, heads, rows, size), lse.view(1, heads, rows, 1)


def _hide(query: Tensor, first: int, count: int, window: int | None, block_size: int | None) -> tuple[Tensor, Tensor]:
    """What is added to scores (queries, keys) float32 of keys first .. first + count - 1, 0 or -inf, and which queries
    (queries, 1) see none of them.

    query: (queries,) positions, one after another. block_size: of pages whose newest tokens are read with their
    residuals, and are left out here; None: none are.
    """
    start = int(query[0]) - first
    bias = torch.full((len(query), count), -torch.inf, dtype=torch.float32).triu_(start + 1)
    oldest = torch.full_like(query, first)
    if window is not None:
        bias += torch.full_like(bias, -torch.inf).tril_(start - window)
        oldest = torch.maximum(oldest, query - window + 1)
    seen = query.clamp_max(first + count - 1) - oldest + 1
    rows = torch.arange(len(query))
    for back in range(DISTANCE if block_size is not None else 0):
        key = query - back
        hidden = reads_residual(query, key, block_size or 1) & (key >= oldest) & (key < first + count)
        bias[rows[hidden], key[hidden] - first] = -torch.inf
        seen -= hidden.long()
    return bias, (seen <= 0)[:, None]


def _keys(queries: Queries, planes: Planes, layout: PageLayout, blocks: Tensor) -> Tensor:
    """(1, KV heads, keys, D) float32, in the stored basis."""
    keys = tile_values(planes.k, planes.k_scale, layout.format.k, blocks)
    if queries.outlier_shift is None or planes.k_scale is None:
        return keys
    is_outlier = gather(planes.k_scale, blocks).signbit()
    return keys + queries.outlier_shift[:, None] * is_outlier[..., None]
