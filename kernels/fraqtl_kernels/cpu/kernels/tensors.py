"""Rows of tensors that come as addresses, and queries on their way into the basis of the stored keys, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from fraqtl_kernels.cpu.kernels.codes import FAST
from fraqtl_kernels.cpu.layers.bits import to_float


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An address as what `carray` takes."""

    def cast(_target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _target.get_value_type(signature.return_type))

    return types.voidptr(types.int64), cast


@njit(fastmath=FAST, cache=True, nogil=True)
def row_at(address, start, size, like):
    """Numbers start .. start + size - 1 behind an address, in the dtype of `like`."""
    return carray(_pointer(address + start * like.itemsize), (size,), like.dtype)


@njit(fastmath=FAST, cache=True, nogil=True)
def prepare_query(query, center, outlier_shift, scale, x):
    """x <- scale · query. Returns x·center, x·outlier_shift."""
    a, b = np.float32(0), np.float32(0)
    for i in range(x.shape[0]):
        x[i] = to_float(query[i]) * scale
        a += x[i] * center[i]
        b += x[i] * outlier_shift[i]
    return a, b
