"""Products with the rows of pages straight from their codes, with all sums in registers, compiled.

    scores:  scores[m, n] = queries[m] · row n         values:  values[m] += Σ_n weights[m, n] · row n

A chunk of a row is eight bytes of codes, or eight floats; it becomes one vector of eight numbers a part: a byte holds
two 4-bit codes, D / 2 dimensions from each other, and four of the lower two bits of 3-bit codes. Up to QUERIES queries
go over a row together, so that it is unpacked once, and the scores of several rows are added up across their lanes
together.

One function is made for each kind of row and head size, because loops of a known length are twice as fast, and handed
to compiled code as its address.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from fraqtl_kernels.cpu.kernels.lanes import WIDTH, constant, fused, half_as_float, ints, spread
from fraqtl_kernels.formats import TOP_BITS

QUERIES = 4  # queries that go over a row together
FLOATS = 32  # bits of rows that are floats already

_VOID, _F32, _I8, _I32, _I64 = ir.VoidType(), ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)


@dataclass(frozen=True)
class _Kind:
    """How rows are stored: bits of a number, and the vectors that a chunk becomes, part by part."""

    bits: int
    parts: int
    unpack: Callable[[_Loops, Any, Any], list[Any]]  # of the row at a place, its chunk of some number


def _read(builder: Any, place: Any, kind: Any) -> Any:
    found = builder.load(builder.bitcast(place, ir.VectorType(kind, WIDTH).as_pointer()))
    found.align = 1
    return found


def _chunk(loops: _Loops, row: Any, chunk: Any, kind: Any, each: int) -> Any:
    """Eight numbers of `each` bytes."""
    builder = loops.builder
    return _read(builder, builder.gep(row, [builder.mul(chunk, _I64(each * WIDTH))]), kind)


def _codes(loops: _Loops, row: Any, chunk: Any) -> Any:
    return loops.builder.zext(_chunk(loops, row, chunk, _I8, 1), _INTS)


def _triples(loops: _Loops, row: Any, chunk: Any) -> list[Any]:
    """Where a chunk's third bits lie in one half of their bytes, see `codes.are_direct`."""
    assert loops.size % (8 * WIDTH) == 0
    builder, eighth = loops.builder, loops.size // 8
    lower, at = _codes(loops, row, chunk), builder.mul(chunk, _I64(WIDTH))
    in_upper_half = builder.icmp_signed(">=", at, _I64(eighth))
    at = builder.sub(builder.add(at, _I64(2 * eighth)), builder.select(in_upper_half, _I64(eighth), _I64(0)))
    third = builder.zext(_read(builder, builder.gep(row, [at]), _I8), _INTS)
    third = builder.lshr(third, spread(builder, builder.select(in_upper_half, _I32(4), _I32(0))))
    parts = []
    for part, bit in enumerate(TOP_BITS):
        low = builder.and_(builder.lshr(lower, ints(2 * part)), ints(3))
        top = builder.and_(builder.shl(builder.lshr(third, ints(bit)), ints(2)), ints(4))
        parts.append(builder.sitofp(builder.or_(low, top), _FLOATS))
    return parts


def _nibbles(loops: _Loops, row: Any, chunk: Any) -> list[Any]:
    builder, codes = loops.builder, _codes(loops, row, chunk)
    return [builder.sitofp(x, _FLOATS) for x in (builder.and_(codes, ints(15)), builder.lshr(codes, ints(4)))]


def _bytes(loops: _Loops, row: Any, chunk: Any) -> list[Any]:
    return [loops.builder.sitofp(_codes(loops, row, chunk), _FLOATS)]


def _words(loops: _Loops, row: Any, chunk: Any) -> Any:
    return loops.builder.zext(_chunk(loops, row, chunk, ir.IntType(16), 2), _INTS)


def _bfloat16(loops: _Loops, row: Any, chunk: Any) -> list[Any]:
    return [loops.builder.bitcast(loops.builder.shl(_words(loops, row, chunk), ints(16)), _FLOATS)]


def _float16(loops: _Loops, row: Any, chunk: Any) -> list[Any]:
    return [half_as_float(loops.builder, _words(loops, row, chunk))]


def _float32(loops: _Loops, row: Any, chunk: Any) -> list[Any]:
    return [_chunk(loops, row, chunk, _F32, 4)]


_KINDS = {  # by the bits that name them, see `records.PAGES`
    3: _Kind(3, 4, _triples),
    4: _Kind(4, 2, _nibbles),
    8: _Kind(8, 1, _bytes),
    16: _Kind(16, 1, _bfloat16),
    17: _Kind(16, 1, _float16),
    FLOATS: _Kind(32, 1, _float32),
}


class _Loops:
    """What builds the loops of one function.

    floats: (M, D) queries or values, other: scores or weights, `stride` floats a query. pages: of one head, the first
    row of page 0. table: int32 page numbers, `page_bytes` from one to the next. first, after: rows of them to go over.
    """

    ARGUMENTS = ("queries", "floats", "pages", "table", "page_bytes", "block_size", "first", "after", "other", "stride")

    def __init__(self, builder: Any, bits: int, size: int, args: Any) -> None:
        self.builder, self.kind, self.size = builder, _KINDS[bits], size
        given = dict(zip(self.ARGUMENTS, args, strict=True))
        self.all_queries, self.stride, self.page_bytes = given["queries"], given["stride"], given["page_bytes"]
        self.block_size, self.first, after = given["block_size"], given["first"], given["after"]
        self.after = builder.select(builder.icmp_signed("<", self.first, after), after, self.first)
        self.all_floats, self.all_other = (builder.inttoptr(given[x], _F32.as_pointer()) for x in ("floats", "other"))
        self.pages = builder.inttoptr(given["pages"], _I8.as_pointer())
        self.table = builder.inttoptr(given["table"], _I32.as_pointer())
        self.width = size // self.kind.parts  # dimensions from one part to the next
        self.chunks = self.width // WIDTH
        self.row_bytes = size * self.kind.bits // 8

    def build(self, body: Callable[[_Loops], None]) -> None:
        """`body` for QUERIES queries, as often as there are, and for the rest of them."""
        builder = self.builder
        done = builder.append_basic_block("done")
        with cgutils.for_range_slice(builder, _I64(0), self.all_queries, _I64(QUERIES), inc=True) as (m, _):
            self.floats = builder.gep(self.all_floats, [builder.mul(m, _I64(self.size))])
            self.other = builder.gep(self.all_other, [builder.mul(m, self.stride)])
            left = builder.sub(self.all_queries, m)
            left = builder.select(builder.icmp_signed("<", left, _I64(QUERIES)), left, _I64(QUERIES))
            following = builder.append_basic_block("following")
            switch = builder.switch(left, following)
            for queries in range(1, QUERIES + 1):
                block = builder.append_basic_block(f"queries{queries}")
                switch.add_case(_I64(queries), block)
                builder.position_at_end(block)
                self.queries = queries
                body(self)
                builder.branch(following)
            builder.position_at_end(following)
        builder.branch(done)
        builder.position_at_end(done)

    def variables(self, count: int) -> list[Any]:
        return [cgutils.alloca_once(self.builder, _FLOATS) for _ in range(count)]

    def times(self, count: int) -> Any:
        return cgutils.for_range(self.builder, _I64(count), intp=_I64)

    def smaller(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def over_pages(self) -> Any:
        """A loop over the pages' numbers in the table."""
        builder, size = self.builder, self.block_size
        whole = builder.udiv(builder.add(self.after, builder.sub(size, _I64(1))), size)
        return cgutils.for_range(builder, whole, start=builder.udiv(self.first, size), intp=_I64)

    def part_of(self, page: Any) -> tuple[Any, Any, Any, Any]:
        """Where page number `page` of the table begins, its first and last row + 1, its first row's number."""
        builder = self.builder
        number = builder.sext(builder.load(builder.gep(self.table, [page])), _I64)
        begin = builder.mul(page, self.block_size)
        first = builder.sub(self.first, begin)
        first = builder.select(builder.icmp_signed("<", first, _I64(0)), _I64(0), first)
        after = self.smaller(self.block_size, builder.sub(self.after, begin))
        return builder.gep(self.pages, [builder.mul(number, self.page_bytes)]), first, after, begin

    def floats_at(self, m: int, chunk: Any) -> list[Any]:
        """Where in row m of `floats` the parts of a chunk belong."""
        first = self.builder.add(_I64(m * self.size), self.builder.mul(chunk, _I64(WIDTH)))
        shifts = [self.builder.add(first, _I64(self.width * part)) for part in range(self.kind.parts)]
        return [self.builder.gep(self.floats, [shift]) for shift in shifts]

    def other_at(self, m: int, n: Any) -> Any:
        return self.builder.gep(self.other, [self.builder.add(n, self.builder.mul(self.stride, _I64(m)))])

    def unpacked(self, row: Any, chunk: Any) -> list[Any]:
        """The parts of a chunk of the row at `row`."""
        return self.kind.unpack(self, row, chunk)

    def accumulate(self, variable: Any, a: Any, b: Any) -> None:
        self.builder.store(fused(self.builder, a, b, self.builder.load(variable)), variable)


def _across(builder: Any, sums: list[Any]) -> Any:
    """The sums over the lanes of 4 or 8 vectors, as one vector. In steps that stay within halves of a register."""

    def shuffled(a: Any, b: Any, low: list[int], high: list[int]) -> Any:
        masks = (ir.Constant(ir.VectorType(_I32, len(x)), x) for x in (low, high))
        return builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))

    def four(a: Any, b: Any, c: Any, d: Any) -> Any:
        """Two lanes of each, in their order."""
        ac, bd = (shuffled(x, y, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]) for x, y in ((a, c), (b, d)))
        return shuffled(ac, bd, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])

    if len(sums) == 4:
        pairs = four(*sums)
        return shuffled(pairs, pairs, [0, 2, 4, 6], [1, 3, 5, 7])
    first, second = (four(*(sums[i] for i in order)) for order in ((0, 1, 4, 5), (2, 3, 6, 7)))
    return shuffled(first, second, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])


def _sums_of(builder: Any, sums: list[list[Any]]) -> list[Any]:
    """For every query, the sums over the lanes of its variables."""
    loaded = [[builder.load(x) for x in one] for one in sums]
    if len(sums) * len(sums[0]) != WIDTH:
        return [_across(builder, one) for one in loaded]
    every = _across(builder, [x for one in loaded for x in one])
    rows = len(sums[0])
    lanes = [ir.Constant(ir.VectorType(_I32, rows), list(range(m * rows, (m + 1) * rows))) for m in range(len(sums))]
    return [builder.shuffle_vector(every, every, mask) for mask in lanes]


def _score(loops: _Loops) -> None:
    """Rows beyond the last one of a page get the scores of the last one."""
    builder = loops.builder
    rows = {1: 8, 2: 4, 3: 4, 4: 2}[loops.queries]  # as many sums as registers allow
    sums = [loops.variables(rows) for _ in range(loops.queries)]
    with loops.over_pages() as page:
        begin, first, after, number = loops.part_of(page.index)
        with cgutils.for_range_slice(builder, first, after, _I64(rows), inc=True) as (n, _):
            last, starts = builder.sub(after, _I64(1)), []
            for row in range(rows):
                index = loops.smaller(builder.add(n, _I64(row)), last)
                starts.append(builder.gep(begin, [builder.mul(index, _I64(loops.row_bytes))]))
            for one in sums:
                for x in one:
                    builder.store(constant(0), x)
            with loops.times(loops.chunks) as chunk:
                places = [loops.floats_at(m, chunk.index) for m in range(loops.queries)]
                operands = [[_read(builder, place, _F32) for place in one] for one in places]
                for row in range(rows):
                    parts = loops.unpacked(starts[row], chunk.index)
                    for m in range(loops.queries):
                        for part, operand in zip(parts, operands[m], strict=True):
                            loops.accumulate(sums[m][row], part, operand)
            for m, found in enumerate(_sums_of(builder, sums)):
                place = loops.other_at(m, builder.add(number, n))
                builder.store(found, builder.bitcast(place, found.type.as_pointer())).align = 4


def _add(loops: _Loops) -> None:
    """Several rows have sums of their own, so that none waits for the one before it."""
    builder, parts = loops.builder, loops.kind.parts
    rows = max(1, 8 // (loops.queries * parts))
    sums = [[loops.variables(parts) for _ in range(loops.queries)] for _ in range(rows)]

    def add_row(begin: Any, number: Any, n: Any, chunk: Any, to: list[list[Any]]) -> None:
        found = loops.unpacked(builder.gep(begin, [builder.mul(n, _I64(loops.row_bytes))]), chunk)
        for m in range(loops.queries):
            weight = spread(builder, builder.load(loops.other_at(m, builder.add(number, n))))
            for part, x in zip(found, to[m], strict=True):
                loops.accumulate(x, part, weight)

    with loops.times(loops.chunks) as chunk:
        for one in sums:
            for m in range(loops.queries):
                for x in one[m]:
                    builder.store(constant(0), x)
        with loops.over_pages() as page:
            begin, first, after, number = loops.part_of(page.index)
            count = builder.sub(after, first)
            whole = builder.add(first, builder.sub(count, builder.urem(count, _I64(rows))))
            with cgutils.for_range_slice(builder, first, whole, _I64(rows), inc=True) as (n, _):
                for row in range(rows):
                    add_row(begin, number, builder.add(n, _I64(row)), chunk.index, sums[row])
            if rows > 1:
                with cgutils.for_range(builder, after, start=whole, intp=_I64) as row:
                    add_row(begin, number, row.index, chunk.index, sums[0])
        for m in range(loops.queries):
            for part, place in enumerate(loops.floats_at(m, chunk.index)):
                found = _read(builder, place, _F32)
                for one in sums:
                    found = builder.fadd(found, builder.load(one[m][part]))
                builder.store(found, builder.bitcast(place, _FLOATS.as_pointer())).align = 4


_SIGNATURE = types.void(*[types.int64] * len(_Loops.ARGUMENTS))


_BODIES = {"score": _score, "add": _add}


@intrinsic
def _run_built(typingctx: Any, body: Any, bits: Any, size: Any, given: Any) -> Any:
    """The loops of `body` for rows of `bits` and `size`, all three known when it is compiled. given: as of `_Loops`."""
    known = body, bits, size
    if not all(isinstance(x, types.Literal) for x in known):
        return None

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        each = [builder.extract_value(args[3], i) for i in range(len(_Loops.ARGUMENTS))]
        _Loops(builder, bits.literal_value, size.literal_value, each).build(_BODIES[body.literal_value])
        return context.get_dummy_value()

    return types.void(*known, given), build


@cache
def row_function(body: str, bits: int, size: int) -> Any:
    """A C function of `_Loops.ARGUMENTS` for rows of `bits` a number.

    body: "score", which may write 7 scores more than there are rows, or "add", see the module's docstring.
    """

    @cfunc(_SIGNATURE, cache=True)
    def run(queries, floats, pages, table, page_bytes, block_size, first, after, other, stride):
        given = queries, floats, pages, table, page_bytes, block_size, first, after, other, stride
        _run_built(body, bits, size, given)

    return run


@intrinsic
def run_rows(typingctx: Any, address: Any, given: Any) -> Any:
    """Call a function of `row_function`. given: the arguments of `_Loops`."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = ir.FunctionType(_VOID, [_I64] * len(_Loops.ARGUMENTS)).as_pointer()
        each = [builder.extract_value(args[1], i) for i in range(len(_Loops.ARGUMENTS))]
        builder.call(builder.inttoptr(args[0], function), each)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(_Loops.ARGUMENTS))), build
