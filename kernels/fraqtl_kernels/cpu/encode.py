"""Centre, transform, quantise, refine, pack and store vectors on the CPU, compiled: one pass, one vector at a time.

The formulas are those of `reference.encode_keys` and `encode_values`. Without calibration the transform is the rotation
H = S ⊗ B of `rotation.py`, with S of Sylvester's doubling: log2 |S| rounds of sums and differences and |B| products a
number, in place of D products. A vector's bytes never depend on what else is in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.reference import FEEDBACK_GRID, FEEDBACK_LIMIT, SCALE_CHOICES
from fraqtl_kernels.refinement import DISTANCE
from fraqtl_kernels.rotation import hadamard

PARALLEL_VECTORS = 64  # fewer are done before other threads have woken up

_FAST = {"reassoc", "contract", "nsz"}  # not "nnan": NaN must stay NaN
_CHOICES = tuple(np.float32(choice) for choice in SCALE_CHOICES)
_GRID, _LIMIT = np.float32(FEEDBACK_GRID), np.float32(FEEDBACK_LIMIT)


@cache
def _rotation_base(size: int) -> Any:
    """B of H = S ⊗ B, entries ±1, (b, b) float32 with b = 1, 12 or 20."""
    base = size
    while base % 2 == 0 and base not in (12, 20):
        base //= 2
    return hadamard(base).sign().float().numpy()


@njit(fastmath=_FAST, cache=True, nogil=True)
def _rotate(x, spare, base):
    """x <- x · H · sqrt(D), in place."""
    size, width = x.shape[0], base.shape[0]
    half = width
    while half < size:
        for start in range(0, size, 2 * half):
            low, high = x[start : start + half], x[start + half : start + 2 * half]
            for d in range(half):
                a, b = low[d], high[d]
                low[d], high[d] = a + b, a - b
        half *= 2
    if width == 1:
        return
    for start in range(0, size, width):
        for j in range(width):
            spare[j] = np.float32(0)
        for i in range(width):
            row, value = base[i], x[start + i]
            for j in range(width):
                spare[j] += value * row[j]
        for j in range(width):
            x[start + j] = spare[j]


@njit(fastmath=_FAST, cache=True, nogil=True)
def _add_product(x, matrix, y):
    """y += x · matrix, four rows at a time: the number of rows is a multiple of four."""
    for i in range(0, matrix.shape[0], 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        row_a, row_b, row_c, row_d = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        for j in range(matrix.shape[1]):
            y[j] += a * row_a[j] + b * row_b[j] + c * row_c[j] + d * row_d[j]


@njit(fastmath=_FAST, cache=True, nogil=True)
def _half_bits(x, word, word_bits):
    """The bits of fp16(x), rounded half to even, for 0 <= x <= 65504 or NaN. word: one float32, word_bits its bits."""
    if x != x:
        return np.uint16(0x7E00)
    if x < np.float32(2.0**-14):
        return np.uint16(np.rint(x * np.float32(2.0**24)))
    word[0] = x
    bits = word_bits[0]
    return np.uint16(((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) - (112 << 10))


@njit(fastmath=_FAST, cache=True, nogil=True)
def _scale_of(x, edge, word, word_bits):
    """Bits of max|x| / edge in fp16; NaN if x holds NaN or infinity."""
    largest, broken = np.float32(0), np.float32(0)
    for d in range(x.shape[0]):
        largest = max(largest, abs(x[d]))
        broken += x[d] * np.float32(0)
    if broken != broken:
        return np.uint16(0x7E00)
    return _half_bits(min(largest / edge, np.float32(65504)), word, word_bits)


@njit(fastmath=_FAST, cache=True, nogil=True, error_model="numpy")
def _codes_of(x, scale, midpoint, levels, codes):
    """codes <- clamp(round(x / scale + midpoint), 0, levels), zero where that is no number."""
    for d in range(x.shape[0]):
        step = np.rint(x[d] / scale + midpoint)
        step = min(max(step, np.float32(0)), levels) if step == step else np.float32(0)
        codes[d] = np.uint8(step)


@njit(fastmath=_FAST, cache=True, nogil=True, error_model="numpy")
def _round_low(fed, low, scale, midpoint, levels, codes):
    """codes <- the nearest to low / scale + fed; the sum of squares of what they leave."""
    total = np.float32(0)
    for d in range(fed.shape[0]):
        step = low[d] / scale + fed[d] + midpoint
        code = np.rint(step)
        code = code if code > np.float32(0) else np.float32(0)  # NaN too
        code = code if code < levels else levels
        codes[d] = code
        total += (step - code) * (step - code)
    return total


@njit(fastmath=_FAST, cache=True, nogil=True, error_model="numpy")
def _round_high(high, scale, midpoint, levels, codes, left):
    """codes <- the nearest to high / scale, left <- what they leave, on its grid; the sum of its squares."""
    total = np.float32(0)
    for d in range(high.shape[0]):
        step = high[d] / scale + midpoint
        code = np.rint(step)
        code = code if code > np.float32(0) else np.float32(0)
        code = code if code < levels else levels
        rest = np.rint((step - code) * _GRID) * (np.float32(1) / _GRID)
        rest = rest if rest > -_LIMIT else -_LIMIT
        rest = rest if rest < _LIMIT else _LIMIT
        codes[d] = code
        left[d] = rest
        total += rest * rest
    return total


@njit(fastmath=_FAST, cache=True, nogil=True, error_model="numpy")
def _codes_with_feedback(z, feedback, half, edge, midpoint, levels, codes, spare, word, word_bits):
    """codes <- those of `reference.quantise_with_feedback`. spare: (3, D or more). Returns the bits of the scale."""
    size = z.shape[0]
    width = size // 2
    low, high = z[:width], z[width:]
    left, fed, trial = spare[0, :width], spare[1, :width], spare[2, :size]
    largest, broken = np.float32(0), np.float32(0)
    for d in range(size):
        largest = max(largest, abs(z[d]))
        broken += z[d] * np.float32(0)
    best, least = np.uint16(0), np.float32(0)
    for number in range(len(_CHOICES)):
        bits = _half_bits(min(largest * (_CHOICES[number] / edge), np.float32(65504)), word, word_bits)
        scale = half[bits]
        error = _round_high(high, scale, midpoint, levels, trial[width:], left)
        for d in range(width):
            fed[d] = np.float32(0)
        _add_product(left, feedback, fed)
        error += _round_low(fed, low, scale, midpoint, levels, trial[:width])
        error = error * scale * scale
        if number == 0 or error < least:
            best, least = bits, error
            for d in range(size):
                codes[d] = np.uint8(trial[d])
    return np.uint16(0x7E00) if broken != broken else best


@njit(fastmath=_FAST, cache=True, nogil=True)
def _pack(codes, bits, target):
    """target <- the codes as `reference.pack` packs them."""
    row = target.shape[0]
    if bits == 4:  # by itself, because this vectorises
        low, high = codes[:row], codes[row:]
        for i in range(row):
            target[i] = low[i] | (high[i] << np.uint8(4))
        return
    for i in range(row):
        packed = codes[i]
        for j in range(1, 8 // bits):
            packed |= codes[j * row + i] << np.uint8(j * bits)
        target[i] = packed


@njit(fastmath=_FAST, cache=True, nogil=True)
def _subtract_codes(x, codes, scale, midpoint):
    """x <- what the codes leave of it."""
    for d in range(x.shape[0]):
        x[d] -= (np.float32(codes[d]) - midpoint) * scale


@njit(fastmath=_FAST, cache=True, nogil=True)
def _refine_vector(x, half, codes, raw, raw16, code_at, scale_at, sizes, numbers, buffers, finer):
    """Store the refinement of a vector, unless code_at < 0, and write it to `finer`, unless that is empty.

    x: what the vector's codes left of it. codes: (D,) uint8, overwritten. finer: (D,) float32 or (0,).
    """
    bits, groups = sizes
    edge, midpoint, levels, _ = numbers
    word, word_bits = buffers
    width = x.shape[0] // groups
    for group in range(groups):
        part, its = x[group * width : (group + 1) * width], codes[group * width : (group + 1) * width]
        scale_bits = _scale_of(part, edge, word, word_bits)
        scale = half[scale_bits]
        _codes_of(part, scale, midpoint, levels, its)
        if code_at >= 0:
            raw16[scale_at // 2 + group] = scale_bits
        if finer.shape[0]:
            target = finer[group * width : (group + 1) * width]
            for d in range(width):
                target[d] = (np.float32(its[d]) - midpoint) * scale
    if code_at >= 0:
        _pack(codes, bits, raw[code_at : code_at + x.shape[0] * bits // 8])


@njit(fastmath=_FAST, cache=True, nogil=True)
def _store_vector(
    source, centre, basis, feedback, shift, base, half, raw, raw16, code_at, scale_at, sizes, numbers, buffers
):
    """One vector. centre: (D,), basis: (D, D) and feedback: (D/2, D/2) of the transform, all empty without one.

    shift: (D,) what the sink centre adds behind the transform, or (0,).
    What its codes leave of it remains in buffers[0].
    """
    bits, groups = sizes
    edge, midpoint, levels, factor = numbers
    x, other, spare, codes, word, word_bits = buffers
    size = x.shape[0]
    for d in range(size):
        x[d] = np.float32(source[d])
    if centre.shape[0]:
        for d in range(size):
            other[d] = x[d] - centre[d]
            x[d] = np.float32(0)
        _add_product(other, basis, x)
    elif base.shape[0]:
        _rotate(x, spare[0], base)
        for d in range(size):
            x[d] *= factor
    sign = np.uint16(0)
    width = size // groups
    if shift.shape[0]:
        for d in range(size):
            other[d] = x[d] - shift[d]
        mine, its = _scale_of(x, edge, word, word_bits), _scale_of(other, edge, word, word_bits)
        if half[its] < half[mine]:
            sign = np.uint16(0x8000)
            for d in range(size):
                x[d] = other[d]
    if centre.shape[0]:
        scale_bits = _codes_with_feedback(x, feedback, half, edge, midpoint, levels, codes, spare, word, word_bits)
        raw16[scale_at // 2] = scale_bits | sign
        _pack(codes, bits, raw[code_at : code_at + size * bits // 8])
        _subtract_codes(x, codes, half[scale_bits], midpoint)
        return
    for group in range(groups):
        part, its = x[group * width : (group + 1) * width], codes[group * width : (group + 1) * width]
        scale_bits = _scale_of(part, edge, word, word_bits)
        raw16[scale_at // 2 + group] = scale_bits
        _codes_of(part, half[scale_bits], midpoint, levels, its)
        _subtract_codes(part, its, half[scale_bits], midpoint)
    _pack(codes, bits, raw[code_at : code_at + size * bits // 8])


@njit(fastmath=_FAST, cache=True, nogil=True)
def store_range(begin, end, source, slots, constants, base, half, raw, raw16, places, numbers, finer):
    """Vectors begin .. end - 1, head by head. finer: see `store`."""
    tokens, _, size = source.shape
    block_size, block_stride, head_stride, code_offset, code_bytes, scale_offset, scale_bytes = places[:7]
    bits, groups, distance = places[7:]
    centre, basis, feedback, shift = constants
    word_bits = np.empty(1, np.int32)
    word = word_bits.view(np.float32)
    buffers = (
        np.empty(size, np.float32),
        np.empty(size, np.float32),
        np.empty((3, max(32, size)), np.float32),
        np.empty(size, np.uint8),
        word,
        word_bits,
    )
    for item in range(begin, end):
        # Head by head: the matrices of one stay in the cache
        head, token = item // tokens, item % tokens
        slot = slots[token]
        if slot < 0:
            continue
        page = (slot // block_size) * block_stride + head * head_stride
        offset = slot % block_size
        _store_vector(
            source[token, head],
            centre[head],
            basis[head],
            feedback[head],
            shift[head],
            base,
            half,
            raw,
            raw16,
            page + code_offset + offset * code_bytes,
            page + scale_offset + offset * scale_bytes,
            (bits, groups),
            numbers,
            buffers,
        )
        if distance == 0 or offset + distance >= block_size:
            continue
        offset += distance
        code_at, scale_at = page + code_offset + offset * code_bytes, page + scale_offset + offset * scale_bytes
        if token + distance < tokens and slots[token + distance] == slot + distance:
            code_at = -1  # a token of this batch goes there
        if code_at >= 0 or finer.shape[2]:
            _refine_vector(
                buffers[0],
                half,
                buffers[3],
                raw,
                raw16,
                code_at,
                scale_at,
                (bits, groups),
                numbers,
                (word, word_bits),
                finer[token, head],
            )


@njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _store_parallel(count, source, slots, constants, base, half, raw, raw16, places, numbers, finer):
    step = 32
    for part in prange((count + step - 1) // step):
        store_range(
            part * step,
            min(part * step + step, count),
            source,
            slots,
            constants,
            base,
            half,
            raw,
            raw16,
            places,
            numbers,
            finer,
        )


@dataclass(frozen=True)
class StoreOperands:
    """What `store_range` takes of a layer: constants, rotation base, places in the pool, numbers of the grid."""

    constants: Any
    base: Any
    places: tuple[int, ...]
    numbers: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        pool: Tensor,
        size: int,
        vector: VectorFormat,
        block_size: int,
        code_offset: int,
        scale_offset: int,
        constants: LayerConstants,
        which: str,
    ) -> StoreOperands:
        """The arguments are those of `store`; size: of a head."""
        heads = pool.shape[1]
        places = (
            block_size,
            pool.stride(0),
            pool.stride(1),
            code_offset,
            vector.code_bytes(size),
            scale_offset,
            vector.scale_bytes,
            vector.bits,
            vector.groups,
            DISTANCE if vector.refined else 0,
        )
        return cls(
            _arrays(constants, heads)[which] if vector.centred else _nothing(heads),
            _rotation_base(size) if vector.rotated else np.empty((0, 0), np.float32),
            places,
            tuple(np.float32(n) for n in (vector.edge, vector.midpoint, vector.levels, size**-0.5)),
        )

    def as_tuple(self) -> tuple[Any, ...]:
        return self.constants, self.base, self.places, self.numbers


def store(
    pool: Tensor,
    half: Any,
    x: Tensor,
    slots: Tensor,
    vector: VectorFormat,
    block_size: int,
    code_offset: int,
    scale_offset: int,
    constants: LayerConstants,
    which: str,
    finer: Tensor,
) -> None:
    """Encode x into its slots, and refinements into those behind them.

    pool: as for `write`. half: the float32 value of every fp16 bit pattern. x: (tokens, KV heads, D) float32. slots:
    (tokens,) int64. vector: quantised, with scales of its own. which: "key" or "value", whose constants are used.
    finer: (tokens, KV heads, D) float32, where refined tokens leave what their refinement stands for; or
    (tokens, KV heads, 0).
    """
    tokens, heads, size = x.shape
    raw = pool.as_strided((pool.untyped_storage().nbytes() // 2 * 2 - pool.storage_offset(),), (1,)).numpy()
    operands = StoreOperands.of(pool, size, vector, block_size, code_offset, scale_offset, constants, which)
    arguments = (
        x.contiguous().numpy(),
        slots.contiguous().numpy(),
        operands.constants,
        operands.base,
        half,
        raw,
        raw.view(np.uint16),
        operands.places,
        operands.numbers,
        finer.numpy(),
    )
    if tokens * heads < PARALLEL_VECTORS:
        store_range(0, tokens * heads, *arguments)
    else:
        _store_parallel(tokens * heads, *arguments)


_PREPARED: WeakKeyDictionary[LayerConstants, Any] = WeakKeyDictionary()


def _nothing(heads: int) -> Any:
    """The arrays of `_arrays` for vectors without a transform."""
    return (
        np.empty((heads, 0), np.float32),
        np.empty((heads, 0, 0), np.float32),
        np.empty((heads, 0, 0), np.float32),
        np.empty((heads, 0), np.float32),
    )


def _arrays(constants: LayerConstants, heads: int) -> Any:
    """By "key" and "value": centre, basis, feedback, and the way to the sink centre in the basis, (KV heads, ...)."""
    if constants not in _PREPARED:
        found = {}
        for which, transform in (("key", constants.key), ("value", constants.value)):
            found[which] = _nothing(heads)
            if transform is None:
                continue
            shift = torch.empty(heads, 0, dtype=torch.float32)
            if which == "key" and constants.sink_centre is not None:
                shift = transform.apply(constants.sink_centre.float())
            arrays = (transform.centre, transform.basis, transform.feedback, shift)
            found[which] = tuple(a.float().contiguous().numpy() for a in arrays)
        _PREPARED[constants] = found
    return _PREPARED[constants]
