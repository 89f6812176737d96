"""16-bit floats for functions that Numba compiles, which knows none.

An array's dtype says what its numbers are: uint16 holds the bits of bfloat16, int16 those of float16, float32 itself.
So one function serves all three, and each of them is compiled without a branch in its loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

FAST = {"reassoc", "contract", "arcp", "nsz"}  # not "nnan" and "ninf": NaN must stay NaN
ZERO = np.float32(0)
_I16, _I32 = ir.IntType(16), ir.IntType(32)
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
DTYPES = tuple(_BITS)  # that the layers of this package take


def bits_of(x: Tensor) -> Any:
    """A NumPy array over the memory of a CPU tensor in one of `DTYPES`: its bits, see the module's docstring."""
    return x.view(_BITS[x.dtype]).numpy()


@intrinsic
def to_float(_context: Any, x: Any) -> Any:
    """The float32 that x stands for."""

    def bfloat16(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(word, ir.FloatType())

    def float16(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    def float32(_target: Any, _builder: Any, _signature: Any, arguments: Any) -> Any:
        return arguments[0]

    return types.float32(x), {types.uint16: bfloat16, types.int16: float16, types.float32: float32}[x]


@intrinsic
def from_float(_context: Any, x: Any, like: Any) -> Any:
    """The float32 x in the dtype of `like`, rounded half to even; NaN stays NaN."""

    def bfloat16(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(word, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(word, ir.Constant(_I32, 0x7FFF)), odd)
        magnitude = builder.and_(word, ir.Constant(_I32, 0x7FFFFFFF))
        is_nan = builder.icmp_unsigned(">", magnitude, ir.Constant(_I32, 0x7F800000))
        rounded = builder.select(is_nan, ir.Constant(_I32, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)

    def float16(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), _I16)

    def float32(_target: Any, _builder: Any, _signature: Any, arguments: Any) -> Any:
        return arguments[0]

    return like(types.float32, like), {types.uint16: bfloat16, types.int16: float16, types.float32: float32}[like]


@intrinsic
def _float_of(_context: Any, word: Any) -> Any:
    """The float32 with these bits (int32)."""

    def cast(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), cast


@njit(fastmath=FAST, cache=True, nogil=True)
def exp(x):
    """e^x to a few units in the last place, for |x| <= 87 (larger ones count as that); vectorizes, unlike libm's.

    e^x = 2^n · e^r with n = round(x · log2 e), |r| <= ln(2)/2 and a Taylor polynomial for e^r.
    """
    y = min(max(x, np.float32(-87.0)), np.float32(87.0))
    n = np.floor(y * np.float32(1.4426950408889634) + np.float32(0.5))
    r = y - n * np.float32(0.6931471805599453)
    e = np.float32(1 / 5040) * r + np.float32(1 / 720)
    e = e * r + np.float32(1 / 120)
    e = e * r + np.float32(1 / 24)
    e = e * r + np.float32(1 / 6)
    e = e * r + np.float32(0.5)
    e = (e * r + np.float32(1)) * r + np.float32(1)
    return e * _float_of((np.int32(n) + np.int32(127)) << np.int32(23))


def flat(x: Tensor) -> tuple[Any, int, int]:
    """The bits of a matrix whose rows are contiguous, however far apart: one flat array, its rows, and their distance.

    x: (..., width); leading dimensions that can be one are taken as one.
    """
    rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
    count, width = rows.shape
    stride = rows.stride(0)
    if rows.stride(1) != 1:
        raise ValueError(f"the last dimension must be contiguous, the strides are {x.stride()}")
    return bits_of(rows.as_strided((max(0, (count - 1) * stride + width),), (1,))), count, stride
