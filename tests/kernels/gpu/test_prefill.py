"""Prefill over packed pages against the reference, in Triton's interpreter.

FRAQTL_PREFILL_SWEEP sets the number of random cases (default 30, of chunks of up to 40 tokens).
"""

from __future__ import annotations

import os

import pytest
import torch

from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.gpu.prefill import prefill
from fraqtl_kernels.gpu.tuning import Tuning
from tests.kernels.conftest import relative_error
from tests.kernels.gpu.cases import ON_GPU, TOLERANCE, Case, expected, random_cases, to_device
from tests.kernels.gpu.conftest import DEVICE

SWEEP = int(os.environ.get("FRAQTL_PREFILL_SWEEP", "30"))


def prefill_error(case: Case) -> float:
    batch, sink_logits = case.batch()
    output = torch.full(batch.query.shape, torch.nan, dtype=case.dtype, device=DEVICE)
    prefill(
        batch.query.to(DEVICE),
        to_device(batch.pool),
        batch.layout,
        batch.block_table.to(DEVICE),
        batch.query_start.int().to(DEVICE),
        batch.seq_lens.int().to(DEVICE),
        max(case.queries),
        output,
        LayerOperands.of(batch.layout.format, case.head_size, case.dtype, DEVICE, batch.constants),
        scale=batch.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        sink_logits=None if sink_logits is None else sink_logits.to(DEVICE),
        tuning=case.tuning,
    )
    return relative_error(output.cpu(), expected(case, batch, sink_logits))


@pytest.mark.parametrize(
    "case",
    random_cases(SWEEP, max_query_len=40, tunings=(None, Tuning(32, 4, 1), Tuning(64, 4, 1))),
    ids=lambda c: f"{c.seed}-{c.format}-{c.head_size}",
)
def test_sweep(case: Case) -> None:
    assert prefill_error(case) <= TOLERANCE[case.dtype]


def test_more_query_heads_than_rows_of_a_program() -> None:
    """One KV head for 40 query heads: a program still takes a whole query token."""
    assert prefill_error(Case(kv_heads=1, group=40, seq_lens=(20,), queries=(3,))) <= 2e-3


@pytest.mark.parametrize("name", ON_GPU)
def test_a_chunk_behind_a_cached_prefix(name: str, dtype: torch.dtype) -> None:
    case = Case(format=name, dtype=dtype, seq_lens=(90, 33, 5), queries=(41, 33, 1), padding=48)
    assert prefill_error(case) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("head_size", "group", "block_size"), [(80, 7, 32), (96, 8, 16), (128, 1, 64), (256, 2, 128)])
def test_shapes(head_size: int, group: int, block_size: int, dtype: torch.dtype) -> None:
    case = Case(
        dtype=dtype,
        head_size=head_size,
        group=group,
        block_size=block_size,
        kv_heads=1,
        seq_lens=(100, 70),
        queries=(64, 70),
        tuning=Tuning(32, 4, 1),
    )
    assert prefill_error(case) <= TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_window_soft_cap_sink_logits_and_center(window: int | None, soft_cap: float | None) -> None:
    case = Case(
        seq_lens=(75, 31),
        queries=(50, 31),
        window=window,
        soft_cap=soft_cap,
        sink_logits=True,
        calibrated=True,
        tuning=Tuning(16, 4, 1),
    )
    assert prefill_error(case) <= TOLERANCE[torch.float16]
