"""Eight float32 numbers as one value that Numba keeps in a register: `Lanes`.

Numba vectorizes loops where it can see that it may; what the write does to a vector it can't. So the code says it:
`load` and `store` move eight numbers, + - * / and the functions below work on all eight. LLVM makes one AVX
instruction of each, or two of NEON. There are no fast-math flags: what a lane holds depends on that lane alone,
in any function that such code is compiled into.

Array indices are elements of a C-contiguous array of any shape, counted from its begin, and are not checked.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 8  # lanes

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)


class _LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


Lanes = _LanesType()


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, _FLOATS)


def _operator(function: Any, instruction: str) -> None:
    infer_global(function)(type("_Arithmetic", (ConcreteTemplate,), {"cases": [signature(Lanes, Lanes, Lanes)]}))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)

    lower_builtin(function, Lanes, Lanes)(lower)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, to: Any) -> Any:
    """Where element `index` of a contiguous array lies, as a pointer to `to`. Of 64 bits, not checked."""
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def constant(value: float) -> Any:
    """The same number in all lanes, for code that builds IR."""
    return ir.Constant(_FLOATS, [float(value)] * WIDTH)


def spread(builder: Any, value: Any, width: int = WIDTH) -> Any:
    """A scalar in all lanes, for code that builds IR."""
    kind = ir.VectorType(value.type, width)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, width), None))


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c rounded once, for code that builds IR."""
    name = f"llvm.fma.v{a.type.count}f32"
    call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(call, [a, b, c])


def _rounded(builder: Any, a: Any) -> Any:
    name = f"llvm.rint.v{WIDTH}f32"
    call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), name)
    return builder.call(call, [a])


def half_as_float(builder: Any, words: Any) -> Any:
    """Lanes of fp16's bits as floats, for code that builds IR. In integers, since not every CPU converts them."""
    sign = builder.shl(builder.and_(words, ints(0x8000)), ints(16))
    size = builder.shl(builder.and_(words, ints(0x7FFF)), ints(13))
    broken = builder.icmp_unsigned(">=", size, ints(0x7C00 << 13))
    moved = builder.bitcast(builder.fmul(builder.bitcast(size, _FLOATS), constant(2.0**112)), _INTS)
    size = builder.select(broken, builder.or_(size, ints(0x7F800000)), moved)
    return builder.bitcast(builder.or_(size, sign), _FLOATS)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def load(typingctx: Any, array: Any, at: Any) -> Any:
    """Eight numbers of a float32 array."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = builder.load(pointer(context, builder, sig.args[0], args[0], args[1], _FLOATS))
        found.align = 4
        return found

    return Lanes(array, types.intp), build


@intrinsic
def load_bfloat16(typingctx: Any, address: Any) -> Any:
    """Eight bfloat16 numbers in memory."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(_words(builder, args[0]), ints(16)), _FLOATS)

    return Lanes(types.intp), build


@intrinsic
def load_float16(typingctx: Any, address: Any) -> Any:
    """Eight float16 numbers in memory."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return half_as_float(builder, _words(builder, args[0]))

    return Lanes(types.intp), build


@intrinsic
def load_float32(typingctx: Any, address: Any) -> Any:
    """Eight float32 numbers in memory."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = builder.load(builder.inttoptr(args[0], _FLOATS.as_pointer()))
        found.align = 4
        return found

    return Lanes(types.intp), build


def _words(builder: Any, address: Any) -> Any:
    found = builder.load(builder.inttoptr(address, ir.VectorType(ir.IntType(16), WIDTH).as_pointer()))
    found.align = 2
    return builder.zext(found, _INTS)


def ints(value: int) -> Any:
    """The same whole number in all lanes, for code that builds IR."""
    return ir.Constant(_INTS, [value] * WIDTH)


@intrinsic
def load_every(typingctx: Any, array: Any, at: Any, stride: Any) -> Any:
    """Eight numbers of a float32 array, `stride` from each other."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        here, found = pointer(context, builder, sig.args[0], args[0], args[1], _F32), ir.Constant(_FLOATS, ir.Undefined)
        for lane in range(WIDTH):
            found = builder.insert_element(found, builder.load(here), ir.Constant(_I32, lane))
            here = builder.gep(here, [args[2]])
        return found

    return Lanes(array, types.intp, types.intp), build


@intrinsic
def store(typingctx: Any, array: Any, at: Any, lanes: Any) -> Any:
    """Eight numbers into a float32 array."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], pointer(context, builder, sig.args[0], args[0], args[1], _FLOATS)).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), build


@intrinsic
def store_bytes(typingctx: Any, array: Any, at: Any, lanes: Any) -> Any:
    """Eight whole numbers 0 .. 255 into a uint8 array."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(ir.IntType(8), WIDTH)
        whole = builder.trunc(builder.fptosi(args[2], _INTS), kind)
        builder.store(whole, pointer(context, builder, sig.args[0], args[0], args[1], kind)).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), build


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """A float32 in all lanes."""
    if x != types.float32:
        return None  # no other type is meant

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(builder, args[0])

    return Lanes(types.float32), build


@intrinsic
def splat_at(typingctx: Any, array: Any, at: Any) -> Any:
    """One number of a float32 array in all lanes."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(builder, builder.load(pointer(context, builder, sig.args[0], args[0], args[1], _F32)))

    return Lanes(array, types.intp), build


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return fused(builder, *args)

    return Lanes(Lanes, Lanes, Lanes), build


@intrinsic
def rint(typingctx: Any, a: Any) -> Any:
    """To the nearest whole number, half to even."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _rounded(builder, args[0])

    return Lanes(Lanes), build


@intrinsic
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """max(a, b); b where one is NaN."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _larger(builder, *args)

    return Lanes(Lanes, Lanes), build


@intrinsic
def smaller(typingctx: Any, a: Any, b: Any) -> Any:
    """min(a, b); b where one is NaN."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return Lanes(Lanes, Lanes), build


@intrinsic
def magnitude(typingctx: Any, a: Any) -> Any:
    """|a|."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.and_(builder.bitcast(args[0], _INTS), ints(0x7FFFFFFF))
        return builder.bitcast(bits, _FLOATS)

    return Lanes(Lanes), build


def _fold(builder: Any, lanes: Any, join: Any) -> Any:
    """All lanes joined to a scalar, in a fixed order."""
    while lanes.type.count > 1:
        half = lanes.type.count // 2
        nothing = ir.Constant(lanes.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                lanes, nothing, ir.Constant(ir.VectorType(_I32, half), list(range(first, first + half)))
            )
            for first in (0, half)
        )
        lanes = join(builder, low, high)
    return builder.extract_element(lanes, ir.Constant(_I32, 0))


@intrinsic
def largest(typingctx: Any, a: Any) -> Any:
    """The largest of the lanes, none of them NaN."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fold(builder, args[0], _larger)

    return types.float32(Lanes), build


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """The sum of the lanes."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fold(builder, args[0], lambda b, low, high: b.fadd(low, high))

    return types.float32(Lanes), build


@intrinsic
def first_least(typingctx: Any, a: Any) -> Any:
    """The first of the lanes that hold the least number; 0 if the first holds NaN."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        least = _fold(builder, args[0], lambda b, low, high: b.select(b.fcmp_ordered("<", high, low), high, low))
        mask = builder.bitcast(builder.fcmp_ordered("==", args[0], spread(builder, least)), ir.IntType(WIDTH))
        # A ninth bit for the case that none is equal
        mask = builder.or_(builder.zext(mask, _I32), ir.Constant(_I32, 1 << WIDTH))
        lane = builder.urem(builder.cttz(mask, ir.Constant(ir.IntType(1), 1)), ir.Constant(_I32, WIDTH))
        first = builder.extract_element(args[0], ir.Constant(_I32, 0))
        is_number = builder.fcmp_ordered("==", first, first)
        return builder.zext(builder.select(is_number, lane, ir.Constant(_I32, 0)), ir.IntType(64))

    return types.intp(Lanes), build


@intrinsic
def lane(typingctx: Any, a: Any, at: Any) -> Any:
    """One of the lanes."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], builder.trunc(args[1], _I32))

    return types.float32(Lanes, types.intp), build


@intrinsic
def round_to_half(typingctx: Any, a: Any) -> Any:
    """fp16(a), rounded half to even, for 0 <= a <= 65504. In integers, since not every CPU converts them."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        tiny = builder.fmul(_rounded(builder, builder.fmul(args[0], constant(2.0**24))), constant(2.0**-24))
        bits = builder.bitcast(args[0], _INTS)
        odd = builder.and_(builder.lshr(bits, ints(13)), ints(1))
        bits = builder.and_(builder.add(builder.add(bits, ints(0xFFF)), odd), ints(~0x1FFF))
        return builder.select(
            builder.fcmp_ordered("<", args[0], constant(2.0**-14)), tiny, builder.bitcast(bits, _FLOATS)
        )

    return Lanes(Lanes), build


@intrinsic
def half_bits(typingctx: Any, a: Any) -> Any:
    """The bits of fp16(a), as int32, for a float32 that fp16 holds exactly, 0 <= a <= 65504, or NaN."""
    if a != types.float32:
        return None

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.sub(builder.lshr(builder.bitcast(args[0], _I32), _I32(13)), _I32(112 << 10))
        tiny = builder.fptosi(builder.fmul(args[0], _F32(2.0**24)), _I32)
        found = builder.select(builder.fcmp_ordered("<", args[0], _F32(2.0**-14)), tiny, bits)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), _I32(0x7E00), found)

    return types.int32(types.float32), build


@intrinsic
def where_negative(typingctx: Any, x: Any, a: Any, b: Any) -> Any:
    """In lanes where the sign bit of x is set those of a, in others those of b."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, a, b = args
        return builder.select(builder.icmp_signed("<", builder.bitcast(x, _INTS), ints(0)), a, b)

    return Lanes(Lanes, Lanes, Lanes), build


@intrinsic
def first_of(typingctx: Any, count: Any, a: Any, b: Any) -> Any:
    """The first `count` lanes of a, the others of b."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count, a, b = args
        lanes = ir.Constant(ir.VectorType(_I64, WIDTH), list(range(WIDTH)))
        return builder.select(builder.icmp_signed("<", lanes, spread(builder, count)), a, b)

    return Lanes(types.intp, Lanes, Lanes), build


_LOWEST = -87.0  # e^x of anything less is taken for 0
_LOG2_E, _LN_2 = 1.4426950408889634, 0.6931471805599453
_TAYLOR = [1 / math.factorial(i) for i in range(7, -1, -1)]


@intrinsic
def exp(typingctx: Any, a: Any) -> Any:
    """e^a for a <= 0, to a few units in the last place; NaN of NaN.

    e^a = 2^n · e^r with n = round(a · log2 e), |r| <= ln(2)/2 and a Taylor polynomial for e^r.
    """

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = args[0]
        y = _larger(builder, x, constant(_LOWEST))
        n = _rounded(builder, builder.fmul(y, constant(_LOG2_E)))
        r = fused(builder, n, constant(-_LN_2), y)
        e = constant(_TAYLOR[0])
        for factor in _TAYLOR[1:]:
            e = fused(builder, e, r, constant(factor))
        power = builder.shl(builder.add(builder.fptosi(n, _INTS), ints(127)), ints(23))
        e = builder.fmul(e, builder.bitcast(power, _FLOATS))
        small = builder.select(builder.fcmp_ordered("<=", x, constant(_LOWEST)), constant(0.0), e)
        return builder.select(builder.fcmp_unordered("uno", x, x), x, small)

    return Lanes(Lanes), build
