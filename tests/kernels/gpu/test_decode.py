"""Decode (and combine) against the reference, in Triton's interpreter.

FRAQTL_SWEEP sets the number of random cases (default 100, which meets every length of 1 .. 300 once).
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import triton
import triton.language as tl

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.gpu.constexprs import AttentionShape
from fraqtl_kernels.gpu.decode import decode
from fraqtl_kernels.gpu.kernels.splits import count_pieces, piece_start
from fraqtl_kernels.gpu.plan import choose_splits, plan_decode
from fraqtl_kernels.gpu.tuning import Tuning
from fraqtl_kernels.pages import PageLayout
from tests.kernels.gpu.cases import ON_GPU, TOLERANCE, Case, decode_error, random_cases, run_decode
from tests.kernels.gpu.conftest import DEVICE

SWEEP = int(os.environ.get("FRAQTL_SWEEP", "100"))


ROWS = Tuning(16, 4, 1)  # the form with queries as rows, in tiles that leave several of them
COLUMNS = replace(ROWS, transposed=True)
HALF = replace(COLUMNS, half=True)
FORMS = pytest.mark.parametrize("form", [ROWS, COLUMNS, HALF], ids=["rows", "columns", "half"])


def tolerance(case: Case) -> float:
    """With fp16 inside only the output is rounded to bf16, which is the smaller part."""
    computed = torch.float16 if case.tuning and case.tuning.half else case.dtype
    return max(TOLERANCE[computed], 4e-3 if case.dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize(
    "case",
    random_cases(SWEEP, max_query_len=8, tunings=(None, ROWS, replace(ROWS, tile=32))),
    ids=lambda c: f"{c.seed}-{c.format}-{c.head_size}",
)
def test_sweep(case: Case) -> None:
    assert decode_error(case) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case",
    random_cases(SWEEP, max_query_len=8, tunings=(COLUMNS, HALF, replace(HALF, tile=32)), seed=4),
    ids=lambda c: f"{c.seed}-{c.format}-{c.head_size}",
)
def test_sweep_of_the_transposed_form(case: Case) -> None:
    assert decode_error(case) <= tolerance(case)


@FORMS
@pytest.mark.parametrize("name", ON_GPU)
def test_formats_and_dtypes(name: str, dtype: torch.dtype, form: Tuning) -> None:
    case = Case(format=name, dtype=dtype, tuning=form)
    assert decode_error(case) <= tolerance(case)


@pytest.mark.parametrize("queries", [2, 3, 5, 8])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_query_tokens_of_a_speculation(queries: int, group: int) -> None:
    """Columns are filled up to a power of two; requests have fewer query tokens than the batch allows for."""
    case = Case(group=group, kv_heads=1, seq_lens=(9, 40, 70), queries=(queries, 1, queries), window=50, tuning=COLUMNS)
    assert decode_error(case) <= TOLERANCE[case.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("form", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_errors_do_not_grow_with_the_context(form: Tuning) -> None:
    """64k tokens, many splits: sums stay in fp32."""
    case = Case(seq_lens=(65536,), queries=(1,), kv_heads=1, block_size=128, splits=8, tuning=replace(form, tile=1024))
    assert decode_error(case) <= 2e-3


@FORMS
def test_splits_that_one_pass_does_not_need(form: Tuning) -> None:
    case = Case(splits=1, sink_logits=True, calibrated=True, soft_cap=5.0, seq_lens=(1, 17, 64), tuning=form)
    assert decode_error(case) <= 2e-3


EVERY_OFFSET = (1, 2, 3, 4, 16, 17, *range(21, 35))  # in blocks of 16, the first, the second or the third


@pytest.mark.parametrize(("form", "dtype"), [(ROWS, torch.float16), (ROWS, torch.bfloat16), (COLUMNS, torch.float16)])
@pytest.mark.parametrize("name", [name for name, format in ON_GPU.items() if format.has_residual])
@pytest.mark.parametrize("block_size", [16, 64])
def test_residual_tokens_at_every_offset(name: str, block_size: int, dtype: torch.dtype, form: Tuning) -> None:
    """Also where windows cut through them, and where they alone are a program's share."""
    every = ((None, None, 3), (None, 5.0, 1), (1, None, 2), (3, None, 2), (5, None, 1))
    for window, soft_cap, splits in every if dtype == torch.bfloat16 else every[::3]:
        case = Case(
            format=name,
            dtype=dtype,
            block_size=block_size,
            seq_lens=EVERY_OFFSET if block_size == 16 else (1, 3, 4, 33, 60, 61, 62, 63, 64, 65, 129),
            queries=(1,) * (len(EVERY_OFFSET) if block_size == 16 else 11),
            window=window,
            soft_cap=soft_cap,
            splits=splits,
            calibrated=window is None,
            tuning=form,
        )
        assert decode_error(case) <= TOLERANCE[dtype]


def test_requests_without_a_query_are_skipped() -> None:
    """Padding of a CUDA graph: no query token, length 0. The others are right, nothing else is written."""
    case = Case(seq_lens=(33, 1, 70), queries=(2, 1, 3))
    batch, _ = case.batch()
    output, expected = run_decode(case)
    assert output.isfinite().all() and output.shape == expected.shape
    padded = replace(case, seq_lens=(33, 1, 70), queries=(2, 0, 3))
    output, _ = run_decode(padded)
    assert output.isfinite().all() and len(output) == 5
    assert torch.equal(batch.seq_lens, torch.tensor(case.seq_lens))


def test_a_graph_planned_for_more_serves_fewer_and_longer() -> None:
    """Splits, programs and scratch come from bounds; real lengths decide the chunks."""
    for splits, form in product((2, 9), (ROWS, COLUMNS)):
        assert decode_error(Case(seq_lens=(300, 2, 64), splits=splits, tuning=form)) <= 2e-3


@FORMS
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", ["fp16", "k4v4"])
def test_blocks_that_a_window_has_freed_are_not_read(name: str, splits: int, form: Tuning) -> None:
    case = Case(format=name, seq_lens=(100,), queries=(1,), window=30, splits=splits, tuning=form)
    batch, _ = case.batch()
    assert batch.block_table.numel() == 8
    original = Case.batch

    def freed(self: Case) -> object:
        batch, sink_logits = original(self)
        batch.block_table[0, :4] = 0  # the null block, still poisoned with NaN
        return batch, sink_logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "batch", freed)
        output, _ = run_decode(case)
    assert output.isfinite().all()


def test_splits_follow_requests_and_context() -> None:
    tuning = Tuning(128, 4, 5)
    assert choose_splits(1, 8, 131072, tuning, 132) == 66
    assert choose_splits(1, 8, 131072, replace(tuning, programs_per_sm=3), 132) == 99
    assert choose_splits(1, 8, 1024, tuning, 132) == 4
    assert choose_splits(1, 8, 1024, replace(tuning, min_tiles=4), 132) == 2
    assert choose_splits(64, 8, 32768, tuning, 132) == 1
    assert choose_splits(1, 8, 100, tuning, 132) == 1
    layout = PageLayout(FORMATS["k4v4"], 128, 16)
    plan = plan_decode(layout, requests=8, queries=2, query_heads=32, kv_heads=8, max_seq_len=4096, num_sms=132)
    assert plan.splits == 8 and plan.shape.ROWS == 16
    assert plan.scratch_floats(128) == 8 * 32 * 2 * 8 * 129


@triton.jit
def _cut(lengths, found, requests, programs, splits, SHAPE: tl.constexpr):  # noqa: N803
    request = tl.program_id(0)
    length = tl.load(lengths + request)
    pieces, own = count_pieces(length * 0, length, lengths, lengths, requests, 8, splits, programs, None, SHAPE)
    tl.store(found + request * (splits + 1), pieces)
    for index in range(pieces):
        tl.store(found + request * (splits + 1) + 1 + index, piece_start(index + 1, pieces, own))


@pytest.mark.parametrize(
    ("lengths", "pieces"),
    [
        ((8192,) * 32, [[64]] * 32),  # not 63 tiles and a stray one
        ((32768,) * 8, [[64] * 4] * 8),
        ((32768,), [[7, 8, 8, 8] * 8 + [8]]),
        ((128 * 5,), [[2, 3]]),  # at least MIN_TILES
        ((1, 0, 129), [[1], [0], [2]]),
        ((131072, 1024), [[31] * 32 + [32], [8]]),
    ],
    ids=("32 x 8k", "8 x 32k", "1 x 32k", "five tiles", "few tokens", "uneven"),
)
def test_pieces_of_a_request_are_equal(lengths: tuple[int, ...], pieces: list[list[int]]) -> None:
    """8 KV heads on 132 multiprocessors with two programs each: as many pieces as there is room for."""
    splits = 66
    found = torch.zeros(len(lengths), splits + 1, dtype=torch.int32, device=DEVICE)
    shape = AttentionShape(1, 4, 128, 5, MIN_TILES=2)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    _cut[(len(lengths),)](seq_lens, found, len(lengths), 264, splits, shape)
    for row, wanted in zip(found.tolist(), pieces, strict=True):
        ends = row[1 : 1 + row[0]]
        assert sorted(b - a for a, b in pairwise([0, *ends])) == sorted(wanted)


def test_refusals() -> None:
    layout = PageLayout(FORMATS["k4v4"], 64, 16)
    heads = {"query_heads": 4, "kv_heads": 2}
    with pytest.raises(UnsupportedError, match="1 to 8 query tokens"):
        plan_decode(layout, requests=1, queries=9, max_seq_len=10, num_sms=1, **heads)
    with pytest.raises(UnsupportedError, match="not a multiple"):
        plan_decode(layout, requests=1, queries=1, query_heads=5, kv_heads=2, max_seq_len=10, num_sms=1)
    with pytest.raises(UnsupportedError, match="float16 and bfloat16"):
        decode_error(Case(dtype=torch.float32))
    plan = plan_decode(layout, requests=1, queries=1, max_seq_len=4096, num_sms=8, **heads)
    empty = torch.empty(1, 4, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="fp32 numbers of scratch for"):
        decode(empty, empty, layout, empty, empty, torch.ones(1), empty, plan, None, scale=1.0)
