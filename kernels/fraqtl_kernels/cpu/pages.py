"""A pool's pages as compiled loops take them: numbers, and memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.cpu.kernels.codes import are_direct
from fraqtl_kernels.cpu.kernels.rows import FLOATS, row_function
from fraqtl_kernels.formats import SCALE_BYTES, VectorFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE


def page_sizes(pool: Tensor, layout: PageLayout, *, with_residual: bool) -> tuple[int, ...]:
    """`sizes` of `attend_run`. with_residual: whether pages hold the residuals of the newest tokens."""
    k, v = layout.format.k, layout.format.v
    offsets = (layout.v_offset, layout.k_scale_offset, layout.v_scale_offset)
    groups = (k.scale_bytes // SCALE_BYTES, v.scale_bytes // SCALE_BYTES)
    distances = tuple(DISTANCE if with_residual and x.has_residual else 0 for x in (k, v))
    bits, size = (_kind(k), _kind(v)), layout.head_size
    direct = [are_direct(*x) for x in zip(bits, groups, strict=True)]
    read_as = [x if is_direct else FLOATS for x, is_direct in zip(bits, direct, strict=True)]
    rows = row_function("score", read_as[0], size), row_function("add", read_as[1], size)
    strides = pool.stride(0), pool.stride(1)
    return (layout.block_size, *bits, *groups, *strides, *offsets, *distances, *(x.address for x in rows))


def grid_midpoints(layout: PageLayout) -> Any:
    """(2,) float32: what codes of K and of V are too large by."""
    return np.array([0.0 if x.is_raw else x.midpoint for x in (layout.format.k, layout.format.v)], np.float32)


def pool_bytes(pool: Tensor) -> Any:
    """All memory from the pool's first byte to the end of its storage, as one array of uint8."""
    return pool.as_strided((pool.untyped_storage().nbytes() // 2 * 2 - pool.storage_offset(),), (1,)).numpy()


def _kind(vector: VectorFormat) -> int:
    return 17 if vector.raw_dtype == torch.float16 else int(vector.bits)
