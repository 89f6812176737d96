"""Products straight from the rows of pages, and the softmax between them, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from fraqtl_kernels import reference
from fraqtl_kernels.cpu.kernels import softmax
from fraqtl_kernels.cpu.kernels.codes import are_direct
from fraqtl_kernels.cpu.kernels.rows import FLOATS, row_function, run_rows
from fraqtl_kernels.formats import CPU_HEAD_SIZES, VectorFormat

BLOCK, PAGES, SLACK = 16, 4, 8


@njit
def run(address: int, given: Any) -> None:
    run_rows(address, given)


def page_of(bits: int, rows: int, size: int) -> tuple[Any, Any]:
    """Random rows as they lie in a page, as bytes, and as float64 numbers."""
    random = np.random.default_rng()
    if bits in (3, 4, 8):
        codes = random.integers(0, 1 << bits, (rows, size), dtype=np.uint8)
        stored = reference.pack(torch.from_numpy(codes), VectorFormat(bits)).numpy()
        return stored, codes.astype(np.float64)
    dtype = {16: torch.bfloat16, 17: torch.float16, FLOATS: torch.float32}[bits]
    x = torch.randn(rows, size).to(dtype)
    x[0, :3] = torch.tensor([0.0, -0.0, 6e-8])  # of float16's smallest
    return x.view(torch.uint8).numpy(), x.double().numpy()


def assert_sums(found: Any, a: Any, b: Any, begun: Any = 0.0) -> None:
    """found = begun + a · b, but for a few roundings of the largest sum that can be on the way."""
    a = a.astype(np.float64)
    assert np.all(np.abs(found - (begun + a @ b)) <= 1e-6 * (np.abs(begun) + np.abs(a) @ np.abs(b)) + 1e-30)


@pytest.fixture(params=[3, 4, 8, 16, 17, FLOATS])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
@pytest.mark.parametrize("first, after", [(0, 64), (0, 1), (3, 35), (15, 16), (17, 64), (0, 31), (20, 20), (9, 5)])
def test_products(bits: int, size: int, first: int, after: int) -> None:
    if not are_direct(bits, 1, size):
        pytest.skip("read as floats")
    broken = 0xFF if bits >= 16 else 0xAA  # a NaN where a row is not to be read
    stored, numbers = page_of(bits, PAGES * BLOCK, size)
    table = np.random.default_rng().permutation(PAGES + 3)[:PAGES].astype(np.int32)
    bytes_of_page = BLOCK * stored.shape[1] + 32
    pool = np.full((PAGES + 3, bytes_of_page), broken, np.uint8)
    for page, number in enumerate(table):
        begin, end = max(0, first - page * BLOCK), min(BLOCK, after - page * BLOCK)
        if begin < end:
            rows = pool[number, : BLOCK * stored.shape[1]].reshape(BLOCK, -1)
            rows[begin:end] = stored[page * BLOCK :][begin:end]
    for queries in range(1, 10):
        q = np.random.randn(queries, size).astype(np.float32)
        scores = np.full((queries, PAGES * BLOCK + SLACK), 77, np.float32)
        weights = np.random.rand(*scores.shape).astype(np.float32)
        values = np.random.randn(queries, size).astype(np.float32)
        begun = values.copy()
        pages = pool.ctypes.data, table.ctypes.data, bytes_of_page, BLOCK, first, after
        run(
            row_function("score", bits, size).address,
            (queries, q.ctypes.data, *pages, scores.ctypes.data, scores.shape[1]),
        )
        run(
            row_function("add", bits, size).address,
            (queries, values.ctypes.data, *pages, weights.ctypes.data, scores.shape[1]),
        )
        assert_sums(scores[:, first:after], q, numbers[first:after].T)
        assert np.all(scores[:, :first] == 77) and np.all(scores[:, max(first, after) + SLACK - 1 :] == 77)
        assert_sums(values, weights[:, first:after], numbers[first:after], begun)


@njit
def exponential(x: Any, out: Any) -> None:
    out[0], out[1] = softmax.weigh(x, 0, x.shape[0] - SLACK, np.float32(0), np.ones_like(x), out[2:])


def test_the_exponential() -> None:
    x = np.concatenate([np.linspace(-90, 0, 9001), np.full(SLACK, 5)]).astype(np.float32)
    out = np.zeros(len(x) + 2, np.float32)
    exponential(x, out)
    found, wanted = out[2:9003], np.exp(x[:9001].astype(np.float64))
    clear = x[:9001] > -87
    np.testing.assert_allclose(found[clear], wanted[clear], rtol=8e-6)
    assert np.all(found[~clear] == 0) and out[0] == pytest.approx(wanted.sum(), rel=1e-5)


@pytest.mark.parametrize("first, after", [(0, 24), (0, 1), (5, 17), (16, 23)])
def test_a_row_of_scores(first: int, after: int) -> None:
    x = np.random.randn(24 + SLACK).astype(np.float32)
    scales = (np.random.rand(24 + SLACK) - 0.5).astype(np.float16).astype(np.float32)
    scales[:2] = 0.0, -0.0
    scores = x.copy()
    scale_row(scores, after, np.float32(0.25), np.float32(-1.5), np.float32(3), scales)
    sunk = np.signbit(scales)
    wanted = (x.astype(np.float64) - 0.25) * np.abs(scales) - 1.5 + 3.0 * sunk
    np.testing.assert_allclose(scores[:after], wanted[:after], atol=1e-6)
    assert np.array_equal(scores[after:], x[after:])

    scores[after:], scores[:first] = np.inf, np.inf  # nobody may look there
    top = highest_of(scores, first, after, np.float32(-np.inf))
    assert top == scores[first:after].max() and highest_of(scores, first, after, np.float32(99)) == 99
    weights = np.full_like(scores, 77)
    added, scaled = weigh_row(scores, first, after, np.float32(top), scales, weights)
    wanted = np.exp(scores[first:after].astype(np.float64) - top)
    assert (added, scaled) == pytest.approx((wanted.sum(), (wanted * np.abs(scales[first:after])).sum()), rel=1e-5)
    np.testing.assert_allclose(weights[first:after], wanted * np.abs(scales[first:after]), atol=1e-6)
    assert np.all(weights[:first] == 77)


def test_a_broken_score_breaks_its_sum() -> None:
    scores = np.zeros(16 + SLACK, np.float32)
    scores[3] = np.nan
    assert highest_of(scores, 0, 16, np.float32(-1)) == 0
    assert np.isnan(weigh_row(scores, 0, 16, np.float32(0), np.ones_like(scores), scores.copy())[0])
    scores[:] = -np.inf
    assert highest_of(scores, 0, 16, np.float32(-np.inf)) == -np.inf


@njit
def scale_row(scores: Any, count: int, zero: Any, offset: Any, sink: Any, scales: Any) -> None:
    softmax.scale_scores(scores, count, zero, offset, sink, scales)


@njit
def highest_of(scores: Any, first: int, after: int, top: Any) -> Any:
    return softmax.highest(scores, first, after, top)


@njit
def weigh_row(scores: Any, first: int, after: int, top: Any, scales: Any, weights: Any) -> Any:
    return softmax.weigh(scores, first, after, top, scales, weights)
