"""What the kernels know at compile time, derived from the page layout in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import KVFormat
from fraqtl_kernels.gpu.tiles import INTERPRETED, TL_DTYPES
from fraqtl_kernels.gpu.unpack import zero_points
from fraqtl_kernels.pages import PageLayout

MIN_ROWS = 16  # the smallest M of a tensor-core product


@dataclass(frozen=True)
class Tuning:
    """Launch shape of a kernel: keys a tile, warps a program, pipeline stages, cap on registers a thread."""

    tile: int
    warps: int
    stages: int
    registers: int | None = None


def rows_for(rows: int) -> int:
    """Rows of a query tile: a power of two, at least `MIN_ROWS`."""
    return max(MIN_ROWS, triton.next_power_of_2(rows))


def half_of(head_size: int) -> int:
    """Columns of half a vector in a kernel: D/2 padded to a power of two."""
    return triton.next_power_of_2(head_size // 2)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises UnsupportedError unless tensor cores multiply this dtype at 16 bits."""
    if dtype not in TL_DTYPES:
        raise UnsupportedError(f"the GPU kernels take float16 and bfloat16 models, not {dtype}")


def has_kernels(format: KVFormat) -> bool:
    """Whether these kernels can read and write a format."""
    vectors = (format.k, format.v)
    return all(x.bits in (4, 8, 16) and x.groups == 1 and not x.static for x in vectors)


def use_ptx(ptx: bool | None) -> bool:
    """Inline PTX unless told otherwise; never in Triton's interpreter, which has none."""
    return not INTERPRETED if ptx is None else ptx and not INTERPRETED


def vector_constants(layout: PageLayout, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a page that every kernel reading one takes. Raises UnsupportedError for an unknown kind."""
    for vector in (layout.format.k, layout.format.v):
        if vector.bits not in (4, 8, 16):
            raise UnsupportedError(f"no GPU kernel for {vector.bits}-bit vectors (format {layout.format.name})")
    return {
        "HEAD": layout.head_size,
        "HALF": half_of(layout.head_size),
        "BLOCK_SIZE": layout.block_size,
        "K_BITS": layout.format.k.bits,
        "V_BITS": layout.format.v.bits,
        "RAW": TL_DTYPES[layout.format.k.raw_dtype or layout.format.v.raw_dtype or dtype],
        "V_OFFSET": layout.v_offset,
        "K_SCALE_OFFSET": layout.k_scale_offset,
        "V_SCALE_OFFSET": layout.v_scale_offset,
    }


def attention_constants(layout: PageLayout, dtype: torch.dtype, *, ptx: bool) -> dict[str, Any]:
    """`vector_constants` and the zero points of the unpacked codes."""
    low, high = zero_points(layout.format.k, dtype, centred=False, ptx=ptx)
    value, _ = zero_points(layout.format.v, dtype, centred=True, ptx=ptx)
    return vector_constants(layout, dtype) | {
        "K_ZERO_LOW": low,
        "K_ZERO_HIGH": high,
        "V_ZERO": value,
        "K_ROTATED": layout.format.k.rotated,
        "V_ROTATED": layout.format.v.rotated,
        "PTX": ptx,
    }
