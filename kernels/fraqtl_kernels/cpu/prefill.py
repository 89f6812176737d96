"""CPU prefill: many queries of one request, through torch's flash attention for CPUs.

A tile of keys and values is dequantised, attended, and dropped; what the tiles give is joined by the
logarithms of their softmax sums: out = Σ_t e^(lse_t - lse) · out_t, lse = log Σ_t e^lse_t. So the
workspace is one tile, whatever the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.cpu.queries import Queries
from fraqtl_kernels.cpu.tiles import Bucket, gather, key_tiles, tile_values
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.refinement import hide_refined

# The public scaled_dot_product_attention runs this operator and drops the second result, the lse.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def prefill(
    queries: Queries,
    planes: Planes,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    window: int | None,
    soft_cap: float | None = None,
    apart: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of one request; no soft cap. apart: without the tokens that queries read refined.

    Returns (1, KV heads, M, D) float32 like the queries, in the basis in which V is stored, and the logarithms
    (1, KV heads, M, 1) of the softmax sums. The centre of the keys is left out: softmax is blind to it.
    """
    assert not soft_cap
    _, heads, rows, size = queries.q.shape
    count = bucket.positions.shape[1]
    group = rows // count
    q = queries.q.view(1, heads * group, count, size)
    out = torch.zeros_like(q)
    total = q.new_full((1, heads * group, count, 1), -torch.inf)
    for blocks, position in key_tiles(layout, block_table, bucket, window):
        seen = position <= bucket.positions[0, :, None]
        if window is not None:
            seen &= position > bucket.positions[0, :, None] - window
        if apart:
            hide_refined(seen, bucket.positions[0], int(position[0, 0]), layout.block_size)
            if not bool(seen.any()):
                continue
        used = int(seen.any(0).nonzero().max()) + 1  # what lies behind the last key may be anything, even NaN
        key = _keys(queries, planes, layout, blocks)[:, :, :used]
        value = tile_values(planes.v, planes.v_scale, layout.format.v, blocks)[:, :, :used]
        unseen = ~seen[:, :used].any(0)
        if bool(unseen.any()):
            key, value = (x.masked_fill(unseen[:, None], 0) for x in (key, value))
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        bias = q.new_zeros(count, used).masked_fill_(~seen[:, :used], -torch.inf)
        part, lse = _flash(q, key, value, 0.0, False, attn_mask=bias, scale=1.0)
        # A query that sees nothing of this tile: its lse says so, its output is not to be used.
        blind = ~seen.any(1)[:, None]
        lse = lse.view(1, -1, count, 1).masked_fill(blind, -torch.inf)
        joined = torch.logaddexp(total, lse)
        weight = (lse - joined).exp().masked_fill(blind, 0)
        out = out * (total - joined).exp().nan_to_num(0.0) + part.masked_fill(blind, 0) * weight
        total = joined
    return out.view(1, heads, rows, size), total.view(1, heads, rows, 1)


def _keys(queries: Queries, planes: Planes, layout: PageLayout, blocks: Tensor) -> Tensor:
    """(1, KV heads, keys, D) float32, in the stored basis."""
    keys = tile_values(planes.k, planes.k_scale, layout.format.k, blocks)
    if queries.sink_shift is None or planes.k_scale is None:
        return keys
    is_sink = gather(planes.k_scale, blocks).signbit()
    return keys + queries.sink_shift[:, None] * is_sink[..., None]
