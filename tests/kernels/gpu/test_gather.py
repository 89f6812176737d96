"""Dequantizing a range of cached tokens, against the reference's stored values."""

from __future__ import annotations

import pytest
import torch

from fraqtl_kernels import reference
from fraqtl_kernels.formats import HEAD_SIZES
from fraqtl_kernels.gpu.gather import dequantize
from fraqtl_kernels.gpu.operands import LayerOperands
from tests.kernels.conftest import relative_error
from tests.kernels.gpu.cases import ON_GPU, Case, to_device
from tests.kernels.gpu.conftest import DEVICE

ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_ranges_of_tokens(name: str, size: int, dtype: torch.dtype) -> None:
    case = Case(format=name, dtype=dtype, head_size=size, seq_lens=(5, 90, 64), calibrated=size != 80, padding=48)
    batch, _ = case.batch()
    ranges = ((0, 0), (17, 60), (16, 48))  # (first token, tokens): the first request is skipped
    start = torch.tensor([0, *(n for _, n in ranges)]).cumsum(0)
    key, value = (
        torch.full((start[-1] + 2, case.kv_heads, size), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)
    )
    dequantize(
        to_device(batch.pool),
        batch.layout,
        batch.block_table.to(DEVICE),
        torch.tensor([first for first, _ in ranges]).to(DEVICE),
        start.to(DEVICE),
        60,
        key,
        value,
        LayerOperands.of(batch.layout.format, size, dtype, DEVICE, batch.constants),
    )
    planes = batch.layout.planes(batch.pool)
    for ours, stored in (
        (key, reference.stored_keys(planes, batch.layout.format.k, batch.constants)),
        (value, reference.stored_values(planes, batch.layout.format.v, batch.constants)),
    ):
        for r, (first, count) in enumerate(ranges):
            token = torch.arange(first, first + count)
            exact = stored[batch.block_table[r, token // 16].long(), :, token % 16]
            if count:
                assert relative_error(ours[start[r] : start[r + 1]].cpu(), exact) < ROUNDING[dtype]
        assert ours[start[-1] :].isnan().all()  # nothing behind the end
