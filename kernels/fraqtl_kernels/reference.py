"""The plain-torch meaning of every format and kernel. Slow, obvious, and what tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.formats import SCALE_DTYPE, VectorFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.rotation import hadamard

_LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max


def quantise(x: Tensor, vector: VectorFormat) -> tuple[Tensor, Tensor]:
    """Codes and scale of vectors on the midpoint grid of `formats.py`.

    x: (..., D) floating point, already rotated. Returns codes (..., D) uint8, one a dimension,
    and scale (...) fp16, max|x| / midpoint: the largest magnitude falls on the outermost code.
    A zero vector has scale 0 and comes back as zero; NaN stays NaN, infinity becomes NaN.
    """
    x = x if x.dtype == torch.float64 else x.float()
    scale = (x.abs().amax(-1) / vector.midpoint).clamp_max(_LARGEST_SCALE).to(SCALE_DTYPE)
    steps = x / scale.to(x.dtype).unsqueeze(-1) + vector.midpoint
    codes = steps.nan_to_num(0.0).round().clamp(0, vector.levels)
    return codes.to(torch.uint8), torch.where(x.isinf().any(-1), torch.nan, scale)


def dequantise(codes: Tensor, scale: Tensor, vector: VectorFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., D) codes and (...) scales -> (..., D) values: (code - midpoint) · scale."""
    return (codes.to(dtype) - vector.midpoint) * scale.to(dtype).unsqueeze(-1)


def pack(codes: Tensor, vector: VectorFormat) -> Tensor:
    """(..., D) codes -> (..., code bytes): low nibbles hold the first half of the dimensions."""
    if vector.bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def unpack(packed: Tensor, vector: VectorFormat) -> Tensor:
    """The inverse of `pack`."""
    if vector.bits == 8:
        return packed
    return torch.cat([packed & 15, packed >> 4], -1)


def rotate(x: Tensor, vector: VectorFormat) -> Tensor:
    """x (..., D) in the basis in which `vector` is stored, in x's dtype."""
    return x @ hadamard(x.shape[-1]).to(x.dtype) if vector.rotated else x


def unrotate(x: Tensor, vector: VectorFormat) -> Tensor:
    """The inverse of `rotate`."""
    return x @ hadamard(x.shape[-1]).to(x.dtype).T if vector.rotated else x


def stored_values(plane: Tensor, scale: Tensor | None, vector: VectorFormat) -> Tensor:
    """What a plane of pages stands for: (blocks, heads, N, D) float64, in the original basis."""
    if scale is None:
        return plane.double()
    return unrotate(dequantise(unpack(plane, vector), scale, vector, torch.float64), vector)


def write(
    pool: Tensor,
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    key_centre: Tensor | None = None,
) -> None:
    """Quantise tokens one by one and put them into their slots; slot -1 writes nothing.

    key, value: (tokens, KV heads, D). slot_mapping: (tokens,) block · N + offset.
    key_centre: (KV heads, D), subtracted from every key that is quantised.
    """
    if key_centre is not None and not layout.format.k.is_raw:
        key = key.double() - key_centre.double()
    planes = layout.planes(pool)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, layout.block_size)
        for x, vector, plane, scales in (
            (key[token], layout.format.k, planes.k, planes.k_scale),
            (value[token], layout.format.v, planes.v, planes.v_scale),
        ):
            if scales is None:
                plane[block, :, offset] = x.to(plane.dtype)
                continue
            codes, scale = quantise(rotate(x.double(), vector), vector)
            plane[block, :, offset] = pack(codes, vector)
            scales[block, :, offset] = scale


def paged_attention(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    key_centre: Tensor | None = None,
) -> Tensor:
    """Causal attention of every request over its pages, in float64.

    For query position p and key position j <= p (and j > p - window):
    softmax_j(cap(scale · q_p · k_j)) · v_j with cap(s) = soft_cap · tanh(s / soft_cap). A sink takes part in the
    softmax like a key with that score and a value of zero.

    query: (tokens, query heads, D), requests one after another, the last token of a request at
    position length - 1. block_table: (requests, blocks). query_start: (requests + 1,).
    lengths: (requests,) tokens in the cache, the queries' own included. sinks: (query heads,).
    key_centre: as for `write`, added back to the stored keys. Returns float64 like query.
    """
    planes = layout.planes(pool)
    keys = stored_values(planes.k, planes.k_scale, layout.format.k)
    if key_centre is not None and not layout.format.k.is_raw:
        keys = keys + key_centre.double()[:, None]
    values = stored_values(planes.v, planes.v_scale, layout.format.v)
    group = query.shape[1] // keys.shape[1]
    output = torch.zeros(query.shape, dtype=torch.float64)
    for r, length in enumerate(lengths.tolist()):
        first, last = query_start[r].item(), query_start[r + 1].item()
        slots = torch.arange(length)
        blocks, offsets = block_table[r, slots // layout.block_size].long(), slots % layout.block_size
        k = keys[blocks, :, offsets].repeat_interleave(group, 1)  # (length, query heads, D)
        v = values[blocks, :, offsets].repeat_interleave(group, 1)
        position = torch.arange(length - (last - first), length)[:, None]
        seen = slots <= position
        if window is not None:
            seen &= slots > position - window
        scores = torch.einsum("qhd,khd->hqk", query[first:last].double(), k) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
        weights = scores.softmax(-1)[..., :length]
        output[first:last] = torch.einsum("hqk,khd->qhd", weights, v)
    return output
