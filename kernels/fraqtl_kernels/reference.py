"""The plain-torch meaning of every format and kernel. Slow, obvious, and what tests and benchmarks compare with.

Production imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants, Transform
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import (
    FEEDBACK_GRID,
    FEEDBACK_LIMIT,
    LARGEST_SCALE,
    SCALE_CHOICES,
    SCALE_DTYPE,
    VectorFormat,
)
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.residual import DISTANCE, reads_residual, residual_positions
from fraqtl_kernels.rotation import hadamard


def quantize(x: Tensor, vector: VectorFormat) -> tuple[Tensor, Tensor]:
    """Codes and scale of vectors on the midpoint grid of `formats.py`.

    x: (..., D) floating point, already rotated. Returns codes (..., D) uint8, one a dimension,
    and scale (...) fp16, or (..., groups): max|x| / 2^(bits - 1), the largest magnitude falls on the edge of the
    outermost cell. Where that is zero, x comes back as zero; NaN stays NaN, infinity becomes NaN.
    """
    x = x if x.dtype == torch.float64 else x.float()
    runs = x.unflatten(-1, (vector.groups, -1))
    scale = (runs.abs().amax(-1) / vector.edge).clamp_max(LARGEST_SCALE).to(SCALE_DTYPE)
    steps = (runs / scale.to(x.dtype).unsqueeze(-1)).flatten(-2) + vector.midpoint
    codes = steps.nan_to_num(0.0).round().clamp(0, vector.levels).to(torch.uint8)
    scale = torch.where(runs.isinf().any(-1), torch.nan, scale)
    return codes, scale.squeeze(-1) if vector.groups == 1 else scale


def quantize_with_feedback(
    z: Tensor, feedback: Tensor, vector: VectorFormat, choices: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scale of calibrated vectors, as `constants.py` means them.

    z: (..., KV heads, D). feedback: (KV heads, D/2, D/2). choices: what is tried in the place of SCALE_CHOICES. With
    each of the scales, the second half is rounded to the nearest codes, and so is the first half plus what that left
    (in steps) times F. What is left of both, squared and added up, says which scale is taken; the first of equals.
    Returns codes (..., KV heads, D) uint8 and scale fp16.
    """
    z = z if z.dtype == torch.float64 else z.float()
    largest = z.abs().amax(-1)
    low, high = z.chunk(2, -1)
    best = least = None
    for choice in choices or SCALE_CHOICES[vector.bits]:
        scale = (largest * (choice / vector.edge)).clamp_max(LARGEST_SCALE).to(SCALE_DTYPE)
        step = scale.to(z.dtype).unsqueeze(-1)
        high_codes, left = _round_steps(high / step, vector)
        left = ((left * FEEDBACK_GRID).round() / FEEDBACK_GRID).clamp(-FEEDBACK_LIMIT, FEEDBACK_LIMIT)
        fed = low / step + torch.einsum("...hd,hde->...he", left, feedback.to(z))
        low_codes, low_left = _round_steps(fed, vector)
        error = (low_left.square().sum(-1) + left.square().sum(-1)) * step.squeeze(-1) * step.squeeze(-1)
        codes = torch.cat([low_codes, high_codes], -1)
        if best is None or least is None:
            best, least = (codes, scale), error
            continue
        better = error < least
        best = torch.where(better[..., None], codes, best[0]), torch.where(better, scale, best[1])
        least = torch.where(better, error, least)
    assert best is not None
    return best[0], torch.where(z.isinf().any(-1), torch.nan, best[1])


def _round_steps(steps: Tensor, vector: VectorFormat) -> tuple[Tensor, Tensor]:
    """The nearest codes uint8, and what they leave, in steps."""
    steps = steps + vector.midpoint
    codes = steps.nan_to_num(0.0).round().clamp(0, vector.levels)
    return codes.to(torch.uint8), steps - codes


def quantize_static(x: Tensor, step: Tensor, vector: VectorFormat) -> Tensor:
    """Codes (..., KV heads, D) uint8 on the symmetric grid with a step for every channel.

    x: (..., KV heads, D). step: (KV heads, D). What lies beyond the grid is clipped to its end; NaN becomes zero.
    """
    x = x if x.dtype == torch.float64 else x.float()
    steps = (x / step.to(x) + vector.midpoint).nan_to_num(vector.midpoint, vector.levels, 1)
    return steps.round().clamp(1, vector.levels).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, vector: VectorFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., D) codes and the scales of `quantize` -> (..., D) values: (code - midpoint) · |scale|."""
    scales = scale.to(dtype).abs().reshape(*codes.shape[:-1], vector.groups)
    return (codes.to(dtype) - vector.midpoint) * scales.repeat_interleave(codes.shape[-1] // vector.groups, -1)


def encode_keys(key: Tensor, vector: VectorFormat, constants: LayerConstants) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of keys (..., KV heads, D), by the formula in `constants.py`."""
    if vector.static:
        return quantize_static(key, _required(constants.key.scale), vector), None
    if not vector.calibrated or constants.key.transform is None:
        return quantize(rotate(key, vector), vector)
    z = constants.key.transform.apply(key)
    if constants.key.outlier_center is None:
        return _quantize_calibrated(z, constants.key.transform, vector)
    as_outlier = constants.key.transform.apply(key, constants.key.outlier_center)
    is_outlier = _plain_scale(as_outlier, vector) < _plain_scale(z, vector)
    chosen = torch.where(is_outlier[..., None], as_outlier, z)
    codes, scale = _quantize_calibrated(chosen, constants.key.transform, vector)
    return codes, torch.where(is_outlier, -scale, scale)


def _quantize_calibrated(z: Tensor, transform: Transform, vector: VectorFormat) -> tuple[Tensor, Tensor]:
    """z: (..., KV heads, D), what the transform made of keys or values."""
    if transform.feedback is None:
        return quantize(z, vector)
    return quantize_with_feedback(z, transform.feedback, vector)


def _plain_scale(z: Tensor, vector: VectorFormat) -> Tensor:
    return (z.abs().amax(-1) / vector.edge).clamp_max(LARGEST_SCALE).to(SCALE_DTYPE)


def encode_values(value: Tensor, vector: VectorFormat, constants: LayerConstants) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of values (..., KV heads, D)."""
    if vector.static:
        return quantize_static(value, _required(constants.value.scale), vector), None
    if not vector.calibrated or constants.value.transform is None:
        return quantize(rotate(value, vector), vector)
    return _quantize_calibrated(constants.value.transform.apply(value), constants.value.transform, vector)


def encode_key_residuals(
    key: Tensor, codes: Tensor, scale: Tensor, vector: VectorFormat, constants: LayerConstants
) -> tuple[Tensor, Tensor]:
    """Codes and scales of what `encode_keys`, which gave `codes` and `scale`, left of keys (..., KV heads, D)."""
    if not vector.calibrated or constants.key.transform is None:
        return _encode_residual(rotate(key, vector), codes, scale, vector)
    z = constants.key.transform.apply(key)
    if constants.key.outlier_center is not None:
        z = torch.where(scale.signbit()[..., None], constants.key.transform.apply(key, constants.key.outlier_center), z)
    return _encode_residual(z, codes, scale, vector)


def encode_value_residuals(
    value: Tensor, codes: Tensor, scale: Tensor, vector: VectorFormat, constants: LayerConstants
) -> tuple[Tensor, Tensor]:
    """The same of values and `encode_values`."""
    if not vector.calibrated or constants.value.transform is None:
        return _encode_residual(rotate(value, vector), codes, scale, vector)
    return _encode_residual(constants.value.transform.apply(value), codes, scale, vector)


def _encode_residual(z: Tensor, codes: Tensor, scale: Tensor, vector: VectorFormat) -> tuple[Tensor, Tensor]:
    return quantize(z - dequantize(codes, scale, vector, z.dtype), vector)


def restore_residual(z: Tensor, vector: VectorFormat, transform: Transform | None) -> Tensor:
    """Residuals (..., KV heads, D), dequantized, in the model's own basis. No center: they are differences."""
    if not vector.calibrated or transform is None:
        return unrotate(z, vector)
    return torch.einsum("...hd,hde->...he", z, transform.inverse.to(z))


def _required(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise ConfigError("a format with static scales needs calibration: leave calibration on")
    return scale


def pack(codes: Tensor, vector: VectorFormat) -> Tensor:
    """(..., D) codes -> (..., code bytes), as `pages.py` says: part j of the dimensions in bits j·b .. j·b+b-1."""
    if vector.bits == 3:
        a, b, c, d = (codes // 4).chunk(4, -1)
        first, second = zip(*(x.chunk(2, -1) for x in (a, c, b, d)), strict=True)
        return torch.cat([_join(codes % 4, 2), _join(torch.cat(first + second, -1), 1)], -1)
    return _join(codes, vector.bits)


def unpack(packed: Tensor, vector: VectorFormat) -> Tensor:
    """The inverse of `pack`."""
    if vector.bits == 3:
        third = packed.shape[-1] // 3
        a, c, b, d, a2, c2, b2, d2 = _split(packed[..., 2 * third :], 1).chunk(8, -1)
        return _split(packed[..., : 2 * third], 2) + 4 * torch.cat([a, a2, b, b2, c, c2, d, d2], -1)
    return _split(packed, vector.bits)


def _join(codes: Tensor, bits: int) -> Tensor:
    parts = codes.int().unflatten(-1, (8 // bits, -1))
    return (parts * _place_values(bits, codes.device)).sum(-2).to(torch.uint8)


def _split(packed: Tensor, bits: int) -> Tensor:
    parts = packed.int().unsqueeze(-2) // _place_values(bits, packed.device) % 2**bits
    return parts.flatten(-2).to(torch.uint8)


def _place_values(bits: int, device: torch.device) -> Tensor:
    """(codes a byte, 1): what one step of each part of the dimensions adds to a byte."""
    return torch.tensor([[2**shift] for shift in range(0, 8, bits)], dtype=torch.int32, device=device)


def rotate(x: Tensor, vector: VectorFormat) -> Tensor:
    """x (..., D) in the basis in which `vector` is stored, in x's dtype."""
    return x @ hadamard(x.shape[-1]).to(x) if vector.rotated else x


def unrotate(x: Tensor, vector: VectorFormat) -> Tensor:
    """The inverse of `rotate`."""
    return x @ hadamard(x.shape[-1]).to(x).T if vector.rotated else x


def stored_keys(planes: Planes, vector: VectorFormat, constants: LayerConstants = IDENTITY) -> Tensor:
    """The keys that pages stand for: (blocks, KV heads, N, D) float64, in the model's own basis."""
    if vector.is_raw:
        return planes.k.double()
    codes = unpack(planes.k, vector)
    if planes.k_scale is None:
        return (codes.double() - vector.midpoint) * _required(constants.key.scale).double()[:, None]
    keys = dequantize(codes, planes.k_scale, vector, torch.float64)
    if not vector.calibrated or constants.key.transform is None:
        return unrotate(keys, vector)
    is_outlier = planes.k_scale.signbit().transpose(1, 2)
    return constants.restore_keys(keys.transpose(1, 2), is_outlier).transpose(1, 2)


def stored_values(planes: Planes, vector: VectorFormat, constants: LayerConstants = IDENTITY) -> Tensor:
    """The values that pages stand for: (blocks, KV heads, N, D) float64, in the model's own basis."""
    if vector.is_raw:
        return planes.v.double()
    codes = unpack(planes.v, vector)
    if planes.v_scale is None:
        return (codes.double() - vector.midpoint) * _required(constants.value.scale).double()[:, None]
    values = dequantize(codes, planes.v_scale, vector, torch.float64)
    if not vector.calibrated or constants.value.transform is None:
        return unrotate(values, vector)
    return constants.value.transform.undo(values.transpose(1, 2)).transpose(1, 2)


def write(
    pool: Tensor,
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    constants: LayerConstants = IDENTITY,
) -> None:
    """Quantize tokens one by one and put them into their slots; slot -1 writes nothing.

    key, value: (tokens, KV heads, D). slot_mapping: (tokens,) block · N + offset. A token of a format with residuals
    also leaves its residual, as `residual.py` says; tokens of a sequence must come in their order.
    """
    k, v, planes = layout.format.k, layout.format.v, layout.planes(pool)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, layout.block_size)
        place, residual_place = (block, slice(None), offset), (block, slice(None), offset + DISTANCE)
        has_room = offset + DISTANCE < layout.block_size
        if k.is_raw:
            planes.k[place] = key[token].to(planes.k.dtype)
        else:
            codes, scale = encode_keys(key[token].double(), k, constants)
            _store(planes.k, planes.k_scale, place, pack(codes, k), scale)
            if k.has_residual and has_room and scale is not None:
                codes, scale = encode_key_residuals(key[token].double(), codes, scale, k, constants)
                _store(planes.k, planes.k_scale, residual_place, pack(codes, k), scale)
        if v.is_raw:
            planes.v[place] = value[token].to(planes.v.dtype)
        else:
            codes, scale = encode_values(value[token].double(), v, constants)
            _store(planes.v, planes.v_scale, place, pack(codes, v), scale)
            if v.has_residual and has_room and scale is not None:
                codes, scale = encode_value_residuals(value[token].double(), codes, scale, v, constants)
                _store(planes.v, planes.v_scale, residual_place, pack(codes, v), scale)


def _store(plane: Tensor, scales: Tensor | None, place: Any, packed: Tensor, scale: Tensor | None) -> None:
    plane[place] = packed
    if scales is not None and scale is not None:
        scales[place] = scale


def paged_attention(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
    constants: LayerConstants = IDENTITY,
    residuals: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Causal attention of every request over its pages, in float64.

    For query position p and key position j <= p (and j > p - window):
    softmax_j(cap(scale · q_p · k_j)) · v_j with cap(s) = soft_cap · tanh(s / soft_cap). A sink logit takes part in the
    softmax like a key with that score and a value of zero.

    query: (tokens, query heads, D), requests one after another, the last token of a request at
    position length - 1. block_table: (requests, blocks). query_start: (requests + 1,).
    seq_lens: (requests,) tokens in the cache, the queries' own included. sink_logits: (query heads,).
    constants: those that the pages were written with. residuals: of each request, what is added to the keys and
    values (length, KV heads, D) that a query reads with their residuals, see `written_residuals` and `page_residuals`;
    None: no query does. Returns float64 like query.
    """
    planes = layout.planes(pool)
    keys = stored_keys(planes, layout.format.k, constants)
    values = stored_values(planes, layout.format.v, constants)
    group = query.shape[1] // keys.shape[1]
    output = torch.zeros(query.shape, dtype=torch.float64)
    for r, length in enumerate(seq_lens.tolist()):
        first, last = query_start[r].item(), query_start[r + 1].item()
        slots = torch.arange(length)
        blocks, offsets = block_table[r, slots // layout.block_size].long(), slots % layout.block_size
        k = keys[blocks, :, offsets].repeat_interleave(group, 1)  # (length, query heads, D)
        v = values[blocks, :, offsets].repeat_interleave(group, 1)
        position = torch.arange(length - (last - first), length)[:, None]
        seen = slots <= position
        if window is not None:
            seen &= slots > position - window
        q = query[first:last].double()
        scores = torch.einsum("qhd,khd->hqk", q, k)
        if residuals is not None:
            near = reads_residual(position, slots, layout.block_size)
            residual_k, residual_v = (x.repeat_interleave(group, 1) for x in residuals[r])
            scores += torch.einsum("qhd,khd->hqk", q, residual_k).masked_fill(~near, 0)
        scores = scores * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sink_logits is not None:
            scores = torch.cat([scores, sink_logits.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
        weights = scores.softmax(-1)[..., :length]
        output[first:last] = torch.einsum("hqk,khd->qhd", weights, v)
        if residuals is not None:
            output[first:last] += torch.einsum("hqk,khd->qhd", weights.masked_fill(~near, 0), residual_v)
    return output


def written_residuals(
    key: Tensor, value: Tensor, layout: PageLayout, constants: LayerConstants = IDENTITY
) -> tuple[Tensor, Tensor]:
    """What the residuals of tokens (tokens, KV heads, D) add to them: float64 like key and value, zero if nothing."""
    k, v = layout.format.k, layout.format.v
    residual_k, residual_v = torch.zeros(2, *key.shape, dtype=torch.float64).unbind()
    if k.has_residual:
        codes, scale = encode_keys(key.double(), k, constants)
        assert scale is not None
        residual = dequantize(*encode_key_residuals(key.double(), codes, scale, k, constants), k, torch.float64)
        residual_k = restore_residual(residual, k, constants.key.transform)
    if v.has_residual:
        codes, scale = encode_values(value.double(), v, constants)
        assert scale is not None
        residual = dequantize(*encode_value_residuals(value.double(), codes, scale, v, constants), v, torch.float64)
        residual_v = restore_residual(residual, v, constants.value.transform)
    return residual_k, residual_v


def page_residuals(
    pool: Tensor, layout: PageLayout, block_table: Tensor, length: int, constants: LayerConstants = IDENTITY
) -> tuple[Tensor, Tensor]:
    """What the pages of a request add to the tokens that the last of `length` tokens reads with their residuals.

    block_table: (blocks,). Returns (length, KV heads, D) float64 twice, zero for all other tokens.
    """
    planes, size = layout.planes(pool), layout.block_size
    residual = torch.zeros(2, length, pool.shape[1], layout.head_size, dtype=torch.float64, device=pool.device)
    position = residual_positions(length, size).to(pool.device)
    place = block_table[position // size].long(), slice(None), position % size + DISTANCE
    for stream, plane, scales, vector, transform in (
        (0, planes.k, planes.k_scale, layout.format.k, constants.key.transform),
        (1, planes.v, planes.v_scale, layout.format.v, constants.value.transform),
    ):
        if vector.has_residual and scales is not None:
            z = dequantize(unpack(plane[place], vector), scales[place], vector, torch.float64)
            residual[stream, position] = restore_residual(z, vector, transform)
    return residual[0], residual[1]
