"""What the kernels know at compile time, derived from the page layout in one place.

The frozen objects here are compile-time arguments of the kernels, which read their fields as constants.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import SCALE_CHOICES, KVFormat, VectorFormat
from fraqtl_kernels.gpu.kernels.parts import INTERPRETED
from fraqtl_kernels.pages import PageLayout

MIN_ROWS = 16  # the smallest M of a tensor-core product
MIN_COLUMNS = 8  # and the smallest N
MIN_WIDTH = 16  # columns of a part, the smallest K of a tensor-core product
MIN_VALUE_WIDTH = 32  # of values: with 16, four warps share two tiles of a product and ptxas spills
DEFERRED_ELEMENTS = 16 * 128  # largest (rows, tile) for which row sums stay in registers during the loop
# Of `VectorFormat`. A new one comes here when the kernels read and write what it says.
KNOWN_FIELDS = {"bits", "rotated", "raw_dtype", "groups", "static", "calibrated", "has_residual"}
TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class VectorShape:
    """A stored key or value. Kernels hold it as PARTS tensors of COLUMNS dimensions each, padded to WIDTH.

    The parts are what one byte holds: 2 halves at 4 bits, 4 quarters at 2 bits. At 3 bits it is quarters where they are
    read and halves where they are written, because rounding errors go from one half to the other. WORDS: 4-bit codes
    are read as words of 16 bits, so that a part is every other dimension of a half (`word_order`): the shared memory of
    a GPU transposes 16-bit numbers on the way to the tensor cores, but not bytes. GROUPS: fp16 scales a vector, 0 if it
    has none. CODES, SCALES: bytes of the page before its codes and its scales. ZEROS: what the unpacked codes of each
    part hold where the value is zero. FIRST_CHOICE: the least of the scales that are tried with feedback. HAS_RESIDUAL:
    the newest tokens of a block have residuals behind it.
    """

    BITS: int
    ROTATED: bool
    STATIC: bool
    GROUPS: int
    WORDS: bool
    PARTS: int
    COLUMNS: int
    WIDTH: int
    ROW_BYTES: int
    CODES: int
    SCALES: int
    MIDPOINT: float
    RAW: tl.dtype
    ZEROS: tuple[float, ...]
    FIRST_CHOICE: float
    HAS_RESIDUAL: bool


@dataclass(frozen=True)
class PageShape:
    """A page: its keys, its values, and how codes are unpacked (PTX: inline, else portable)."""

    HEAD: int
    BLOCK_SIZE: int
    K: VectorShape
    V: VectorShape
    PTX: bool


@dataclass(frozen=True)
class AttentionShape:
    """A program of attention: QUERIES query tokens of GROUP heads over TILE keys at a time.

    HAS_RESIDUAL: whether the newest tokens are read with their residuals. Pages hold what the one query of a decode
    step needs for that. MIN_TILES: the fewest tiles of a split. TRANSPOSED: queries are columns, not rows.
    """

    QUERIES: int
    GROUP: int
    TILE: int
    STAGES: int
    HAS_RESIDUAL: bool = False
    MIN_TILES: int = 1
    TRANSPOSED: bool = False

    @property
    def ROWS(self) -> int:  # noqa: N802
        return rows_for(self.QUERIES * self.GROUP)

    @property
    def COLUMNS(self) -> int:  # noqa: N802
        """Of a transposed program: a power of two, at least the N of a tensor-core product."""
        return max(MIN_COLUMNS, triton.next_power_of_2(self.QUERIES * self.GROUP))

    @property
    def WORDS(self) -> bool:  # noqa: N802
        """Whether codes are read as words. With more rows Triton gives parts of 32 columns to all warps alike."""
        return self.TRANSPOSED or self.ROWS <= MIN_ROWS

    @property
    def DEFERRED(self) -> bool:  # noqa: N802
        """Whether row sums stay in registers until the loop ends."""
        return self.ROWS * self.TILE <= DEFERRED_ELEMENTS


def rows_for(rows: int) -> int:
    """Rows of a query tile: a power of two, at least `MIN_ROWS`."""
    return max(MIN_ROWS, triton.next_power_of_2(rows))


def has_kernels(format: KVFormat) -> bool:
    """Whether these kernels can read and write a format."""
    k, v = format.k, format.v
    if _asks_for_more(k) or _asks_for_more(v):
        return False
    groups = (1,) if v.bits == 3 else (1, 8 // v.bits)  # else a scale for each code of a byte
    return k.bits in (3, 4, 8, 16) and k.groups == 1 and v.bits in (2, 3, 4, 8, 16) and v.groups in groups


def _asks_for_more(vector: VectorFormat) -> bool:
    """Whether it says something in a field that the kernels don't know."""
    return any(f.name not in KNOWN_FIELDS and getattr(vector, f.name) != f.default for f in fields(vector))


@cache
def page_shape(
    layout: PageLayout, dtype: torch.dtype, ptx: bool | None = None, *, words: bool = False, writes: bool = False
) -> PageShape:
    """The constants of a layout for a model's dtype (fp16 or bf16).

    writes: for the kernel that writes pages, not for those that read them. words: read codes as words where that is
    possible. ptx: inline-PTX unpack; None: wherever there is a GPU. Triton's interpreter has none.
    Raises UnsupportedError for a dtype or a vector that no kernel takes.
    """
    if dtype not in TL_DTYPES:
        raise UnsupportedError(f"the GPU kernels take float16 and bfloat16 models, not {dtype}")
    if not has_kernels(layout.format):
        raise UnsupportedError(
            f"no GPU kernel for the vectors of format {layout.format.name}: keys have 3, 4, 8 or 16 bits,"
            " values 2, 3, 4, 8 or 16 and a scale for each code of a byte or for all"
        )
    ptx, k, v = ptx is not False and not INTERPRETED, layout.format.k, layout.format.v
    options = {"ptx": ptx, "words": words, "writes": writes}
    return PageShape(
        HEAD=layout.head_size,
        BLOCK_SIZE=layout.block_size,
        K=_vector(k, layout.head_size, dtype, 0, layout.k_scale_offset, symmetric=False, **options),
        V=_vector(v, layout.head_size, dtype, layout.v_offset, layout.v_scale_offset, symmetric=True, **options),
        PTX=ptx,
    )


def readable_in_words(vector: VectorFormat) -> bool:
    """Whether attention can read the codes of a vector as words: a matrix must put its dimensions in their order."""
    return vector.bits == 4 and vector.rotated


def word_order(head_size: int) -> Tensor:
    """(D,) int64: the dimensions in the order of the parts of words.

    Byte i holds dimensions i and i + D/2 in its nibbles, and word i the bytes 2i and 2i + 1, lower nibbles first.
    """
    half = torch.arange(head_size).view(2, -1, 2)  # (nibble of the byte, word, byte of the word)
    return half.permute(2, 0, 1).flatten()


def _vector(
    vector: VectorFormat,
    head_size: int,
    dtype: torch.dtype,
    codes: int,
    scales: int,
    *,
    symmetric: bool,
    ptx: bool,
    words: bool,
    writes: bool,
) -> VectorShape:
    words = words and readable_in_words(vector)
    parts = 4 if vector.bits == 2 or words or (vector.bits == 3 and not writes) else 2
    columns = head_size // parts
    return VectorShape(
        BITS=vector.bits,
        ROTATED=vector.rotated,
        STATIC=vector.static,
        GROUPS=vector.groups if vector.scale_bytes else 0,
        WORDS=words,
        PARTS=parts,
        COLUMNS=columns,
        WIDTH=max(MIN_VALUE_WIDTH if symmetric else MIN_WIDTH, triton.next_power_of_2(columns)),
        ROW_BYTES=vector.code_bytes(head_size),
        CODES=codes,
        SCALES=scales,
        MIDPOINT=0.0 if vector.is_raw else vector.midpoint,
        RAW=TL_DTYPES[vector.raw_dtype or dtype],
        ZEROS=zero_points(vector, dtype, symmetric=symmetric, ptx=ptx, words=words),
        FIRST_CHOICE=SCALE_CHOICES[vector.bits][0] if vector.has_feedback else 1.0,
        HAS_RESIDUAL=vector.has_residual,
    )


def zero_points(
    vector: VectorFormat, dtype: torch.dtype, *, symmetric: bool, ptx: bool, words: bool = False
) -> tuple[float, ...]:
    """What each unpacked part of a vector holds where the value is zero: midpoint + bias.

    dtype: torch.float16 or torch.bfloat16, the type unpacked to. words: unpacked by `unpack_words`. Raw vectors have
    (0, 0).
    """
    half = dtype == torch.float16
    if vector.is_raw:
        return 0.0, 0.0
    if not ptx or (vector.bits == 8 and not half):
        biases = [0] * (4 if vector.bits in (2, 3) else 2)
    elif vector.bits in (2, 3):
        biases = [-vector.edge] * 4
    elif vector.bits == 8:
        biases = [-128] * 2
    elif symmetric:
        biases = [-8] * 2
    else:
        biases = [-8, 64] if half else [128, 128]
    return tuple(vector.midpoint + bias for bias in biases) * (2 if words else 1)
