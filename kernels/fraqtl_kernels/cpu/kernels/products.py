"""Rows times a matrix with all sums kept in registers, compiled.

Each number of the result is one chain of fused multiply-adds over the rows of the matrix from the first to the last,
so it doesn't depend on how many rows there are, which of the functions made it, or on the CPU's vectors.
Matrices come as panels of PANEL columns, see `panels`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from fraqtl_kernels.cpu.kernels.lanes import fused, pointer, spread

PANEL = 16  # columns: two registers of AVX, one of AVX512
ROWS = 6  # rows at once: with AVX 12 sums, two pieces of the matrix and one number fill its 16 registers

_F32, _I64 = ir.FloatType(), ir.IntType(64)
_COLUMNS = ir.VectorType(_F32, PANEL)


def panels(matrix: Tensor) -> Tensor:
    """(..., rows, columns) -> (..., columns / PANEL, rows, PANEL), contiguous. Columns are a multiple of PANEL."""
    return matrix.unflatten(-1, (-1, PANEL)).movedim(-2, -3).contiguous()


def _product(rows: int, columns: int, *, adds: bool = False) -> Any:
    """An intrinsic for `rows` rows and `columns` panels next to each other. adds: to what y holds."""

    @intrinsic
    def product(
        typingctx: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        matrix: Any,
        at: Any,
        depth: Any,
        y: Any,
        y_at: Any,
        y_stride: Any,
    ) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, x_at, x_stride, matrix, at, depth, y, y_at, y_stride = args
            begin, before = pointer(context, builder, sig.args[0], x, x_at, _F32), builder.block
            panel = pointer(context, builder, sig.args[3], matrix, at, _F32)
            starts = [builder.gep(begin, [builder.mul(x_stride, _I64(row))]) for row in range(rows)]
            panel_stride = builder.mul(depth, _I64(PANEL))
            targets = []
            for row in range(rows):
                start = builder.add(y_at, builder.mul(y_stride, _I64(row)))
                places = [builder.add(start, _I64(column * PANEL)) for column in range(columns)]
                targets.append([pointer(context, builder, sig.args[6], y, place, _COLUMNS) for place in places])
            zero = ir.Constant(_COLUMNS, [0.0] * PANEL)
            begun = [[builder.load(target, align=4) if adds else zero for target in one] for one in targets]
            loop, after = builder.append_basic_block("depth"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(_I64)
            sums = [[builder.phi(_COLUMNS) for _ in range(columns)] for _ in range(rows)]
            here = builder.gep(panel, [builder.mul(k, _I64(PANEL))])
            pieces = []
            for column in range(columns):
                piece = builder.gep(here, [builder.mul(panel_stride, _I64(column))])
                pieces.append(builder.load(builder.bitcast(piece, _COLUMNS.as_pointer())))
                pieces[-1].align = 4
            added = []
            for row in range(rows):
                number = spread(builder, builder.load(builder.gep(starts[row], [k])), PANEL)
                added.append([fused(builder, number, pieces[c], sums[row][c]) for c in range(columns)])
            following = builder.add(k, _I64(1))
            k.add_incoming(_I64(0), before)
            k.add_incoming(following, loop)
            for row in range(rows):
                for column in range(columns):
                    sums[row][column].add_incoming(begun[row][column], before)
                    sums[row][column].add_incoming(added[row][column], loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            builder.position_at_end(after)
            for row in range(rows):
                for column in range(columns):
                    builder.store(added[row][column], targets[row][column]).align = 4
            return context.get_dummy_value()

        whole = types.intp
        return types.void(x, whole, whole, matrix, whole, whole, y, whole, whole), build

    return product


# (x, element where its rows begin, from row to row, matrix, element, depth, y, element, from row to row)
multiply_six = _product(ROWS, 1)
add_six = _product(ROWS, 1, adds=True)
_one_row_of_four = _product(1, 4)
_one_row = _product(1, 1)


@njit(cache=True, nogil=True)
def multiply(x, count, size, matrix, at, y):
    """y[:count, :] = x[:count, :] · the matrix whose panels begin at element `at`.

    x, y: (rows, size) float32, at least `count` rounded up to a multiple of ROWS; y is overwritten up to there.
    """
    full = count // ROWS * ROWS
    if count - full > ROWS // 2:
        full += ROWS
    for panel in range(size // PANEL if full else 0):
        for row in range(0, full, ROWS):
            multiply_six(
                x, row * size, size, matrix, at + panel * size * PANEL, size, y, row * size + panel * PANEL, size
            )
    for row in range(full, count):
        panel = 0
        while panel + 4 <= size // PANEL:
            place = at + panel * size * PANEL
            _one_row_of_four(x, row * size, size, matrix, place, size, y, row * size + panel * PANEL, size)
            panel += 4
        while panel < size // PANEL:
            place = at + panel * size * PANEL
            _one_row(x, row * size, size, matrix, place, size, y, row * size + panel * PANEL, size)
            panel += 1
