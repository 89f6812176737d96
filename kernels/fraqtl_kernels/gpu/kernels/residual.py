"""Which tokens of a block are read with their residuals, and where those stand: see `fraqtl_kernels/residual.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.residual import DISTANCE

_DISTANCE = tl.constexpr(DISTANCE)
_RESIDUAL_TILE = tl.constexpr(16)  # keys of a tile that holds the newest tokens: the least that a product takes


@triton.jit
def residual_tokens_before(position, BLOCK_SIZE: tl.constexpr):
    """How many tokens before the one at `position` stand among the DISTANCE newest of its block."""
    return tl.minimum(_DISTANCE - 1, position % BLOCK_SIZE)


@triton.jit
def residual_slots(position, BLOCK_SIZE: tl.constexpr):
    """Of a tile that holds the newest tokens of the block of `position`: (its numbers, those tokens but one, which
    numbers are tokens, their slots, which have a residual, the slots of those)."""
    index = tl.arange(0, _RESIDUAL_TILE)
    before = residual_tokens_before(position, BLOCK_SIZE)
    known = index <= before
    slot = tl.where(known, position % BLOCK_SIZE - before + index, 0)
    has_residual = known & (slot + _DISTANCE < BLOCK_SIZE)
    residual_slot = tl.where(has_residual, slot + _DISTANCE, 0)
    return index, before, known, slot, has_residual, residual_slot
