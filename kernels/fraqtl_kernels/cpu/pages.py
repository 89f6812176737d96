"""A pool's pages as compiled loops take them: numbers, and memory."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.cpu.kernels.codes import are_direct
from fraqtl_kernels.cpu.kernels.records import PAGES
from fraqtl_kernels.cpu.kernels.rows import FLOATS, row_function
from fraqtl_kernels.formats import SCALE_BYTES, VectorFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE


class Pool(NamedTuple):
    """raw: all bytes from the pool's first to the end of its storage. raw16: the same in pairs. half: the float32 of
    every fp16 bit pattern. pages: (1,) of `PAGES`."""

    raw: Any
    raw16: Any
    half: Any
    pages: Any

    @classmethod
    def of(cls, pool: Tensor, layout: PageLayout, *, with_residual: bool) -> Pool:
        """pool: as for `write`. with_residual: whether attention reads residuals from the pages."""
        raw = pool.as_strided((pool.untyped_storage().nbytes() // 2 * 2 - pool.storage_offset(),), (1,)).numpy()
        return cls(raw, raw.view(np.uint16), _half_table(), _pages(pool, layout, with_residual))


@cache
def _half_table() -> Any:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).float().numpy()


def _pages(pool: Tensor, layout: PageLayout, with_residual: bool) -> Any:
    pages = np.zeros(1, PAGES)
    pages["block_size"], pages["heads"], pages["head_size"] = layout.block_size, pool.shape[1], layout.head_size
    pages["block_stride"], pages["head_stride"] = pool.stride(0), pool.stride(1)
    pages["v_offset"] = layout.v_offset
    pages["k_scale_offset"], pages["v_scale_offset"] = layout.k_scale_offset, layout.v_scale_offset
    for name, vector, body in (("k", layout.format.k, "score"), ("v", layout.format.v, "add")):
        bits, groups = _kind(vector), vector.scale_bytes // SCALE_BYTES
        read_as = bits if are_direct(bits, groups, layout.head_size) else FLOATS
        pages[f"{name}_bits"], pages[f"{name}_groups"] = bits, groups
        pages[f"{name}_distance"] = DISTANCE if with_residual and vector.has_residual else 0
        pages[f"{name}_rows"] = row_function(body, read_as, layout.head_size).address
        pages[f"{name}_midpoint"] = 0 if vector.is_raw else vector.midpoint
    return pages


def _kind(vector: VectorFormat) -> int:
    return 17 if vector.raw_dtype == torch.float16 else int(vector.bits)
