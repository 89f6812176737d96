"""The compiled write of calibrated vectors: its products, and that a token's bytes are its own."""

from __future__ import annotations

import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch
from numba import get_num_threads
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.cpu import operands
from fraqtl_kernels.cpu.kernels.products import multiply, panels
from fraqtl_kernels.cpu.kernels.store import TILE
from fraqtl_kernels.cpu.operands import spectrum_of
from fraqtl_kernels.cpu.share import share
from fraqtl_kernels.formats import CPU_HEAD_SIZES, FORMATS
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE
from fraqtl_kernels.rotation import hadamard
from tests.kernels.conftest import make_pool
from tests.kernels.on_cpu import cpu_write
from tests.kernels.transforms import random_constants


def made(size: int, tokens: int = 100, heads: int = 2, name: str = "k4v4") -> tuple[Tensor, Tensor, LayerConstants]:
    """Correlated keys and values (tokens, KV heads, D) with a few sinks, bfloat16, and constants that fit them."""
    mix = torch.randn(size, size) / size**0.5 + torch.eye(size) * torch.logspace(0.7, -0.7, size)
    key, value = (torch.randn(2, tokens, heads, size) @ mix).unbind()
    key[::11] += 20 * key[0]
    key, value = key.bfloat16(), value.bfloat16()
    return key, value, calibrate(FORMATS[name], key, torch.randn(tokens, 2 * heads, size), value)


def written(key: Tensor, value: Tensor, constants: LayerConstants, pieces: list[int], name: str = "k4v4") -> Tensor:
    """The pool after the tokens came in pieces of these lengths."""
    pool = make_pool(layout := PageLayout(FORMATS[name], key.shape[-1], 32), 4, key.shape[1])
    start = 0
    for count in pieces:
        row = slice(start, start + count)
        cpu_write(pool, layout, key[row], value[row], torch.arange(start, start + count), constants)
        start += count
    assert start == len(key)
    return pool


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
def test_a_row_of_a_product_does_not_depend_on_the_others(size: int) -> None:
    matrix, x = torch.randn(size, size), torch.randn(TILE, size)
    whole = np.empty((TILE, size), np.float32)
    multiply(x.numpy(), TILE, size, panels(matrix).flatten().numpy(), 0, whole)
    error = torch.from_numpy(whole).double() - x.double() @ matrix.double()
    assert error.abs().max() < 1e-4
    for count in range(1, TILE):
        some, last = np.empty((TILE, size), np.float32), x.roll(count, 0).numpy()
        multiply(last, count, size, panels(matrix).flatten().numpy(), 0, some)
        assert (some[:count] == whole[TILE - count :]).all()


@pytest.mark.parametrize("name", ["k4v4", "k3v3"])
@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
def test_bytes_of_a_token_do_not_depend_on_its_tile(size: int, name: str) -> None:
    """One by one, in pieces around the limits of a tile, and with more than one thread."""
    key, value, constants = made(size, name=name)
    pool = written(key, value, constants, [100], name)
    for pieces in ([1] * 100, [2, 3, 4, 5, 6, 7, 23, 24, 25, 1], [TILE, TILE - 1, 53], [99, 1]):
        assert torch.equal(written(key, value, constants, pieces, name), pool), pieces


def test_the_comparison_of_bytes_sees_a_token_in_another_place() -> None:
    key, value, constants = made(64)
    swapped = [x.clone() for x in (key, value)]
    for x in swapped:
        x[[50, 51]] = x[[51, 50]]
    assert not torch.equal(written(*swapped, constants, [100]), written(key, value, constants, [100]))


@pytest.mark.parametrize("size", CPU_HEAD_SIZES)
def test_feedback_of_a_power_of_two_is_a_spectrum(size: int) -> None:
    """Sums and differences make of it what the matrix makes."""
    _, _, constants = made(size)
    for transform in (constants.key.transform, constants.value.transform):
        assert transform is not None
        spectrum, half = spectrum_of(transform.feedback), size // 2
        assert (spectrum is not None) == (half & (half - 1) == 0)
        if spectrum is not None:
            signs = hadamard(half).sign()
            found = signs @ torch.diag_embed(spectrum.double()) @ signs * reference.FEEDBACK_GRID
            assert (found - transform.feedback.double()).abs().max() < 1e-6
            assert transform.feedback.abs().max() > 0.1
    other = random_constants(2, size)[0].key.transform
    assert other is not None and spectrum_of(other.feedback) is None


@pytest.mark.parametrize("name", ["k4v4", "k4v3", "k3v3"])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_codes_are_those_of_the_reference_by_spectrum_and_by_matrix(
    size: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for numbers on the edge of two codes."""
    key, value, constants = made(size, name=name)
    pool, exact = written(key, value, constants, [100], name), make_pool(PageLayout(FORMATS[name], size, 32), 4, 2)
    reference.write(exact, PageLayout(FORMATS[name], size, 32), key, value, torch.arange(100), constants)
    compare(pool, exact, size, name)
    monkeypatch.setattr(operands, "spectrum_of", lambda feedback: None)
    compare(written(key, value, constants, [100], name), exact, size, name)


def compare(pool: Tensor, exact: Tensor, size: int, name: str) -> None:
    planes = [PageLayout(FORMATS[name], size, 32).planes(p) for p in (pool, exact)]
    for first, second in ((planes[0].k, planes[1].k), (planes[0].v, planes[1].v)):
        same = (first == second).all(-1)[:3]
        assert same.float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_numbers_of_any_dtype_and_strides_become_equal_bytes(dtype: torch.dtype) -> None:
    key, value, constants = made(64)
    key, value = (x.half().bfloat16() for x in (key, value))  # numbers of all of them, subnormal ones too
    pool = written(key, value, constants, [100])
    assert torch.equal(written(key.to(dtype), value.to(dtype), constants, [100]), pool)
    apart = (x.to(dtype).transpose(0, 2).contiguous().transpose(0, 2) for x in (key, value))
    assert torch.equal(written(*apart, constants, [100]), pool)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k4v2"])
def test_tokens_without_a_residual_have_none(name: str) -> None:
    """Those that skip their slot, and those near the end of their block: attention may multiply them by zero."""
    key, value, constants = made(64, tokens=64, name=name)
    layout, slots = PageLayout(FORMATS[name], 64, 16), torch.arange(64)
    slots[[5, 40]] = -1
    running = cpu_write(make_pool(layout, 4, 2), layout, key, value, slots, constants)
    assert running is not None
    has_one = (slots >= 0) & (slots % 16 + DISTANCE < 16)
    for residual in (running.key, running.value):
        assert residual is not None
        assert (residual.tokens[has_one] != 0).any(-1).all() and not residual.tokens[~has_one].any()


def test_every_part_is_done_once_on_as_many_threads_as_numba_has() -> None:
    meeting = threading.Barrier(get_num_threads())
    done: list[tuple[int, int]] = []

    def run(begin: int, end: int) -> None:
        meeting.wait(10)  # so that all run at once, or none goes on
        done.append((begin, end))

    share(run, 11)
    assert len(done) == get_num_threads()
    assert sorted(n for begin, end in done for n in range(begin, end)) == list(range(11))


def test_what_a_part_raises_comes_out() -> None:
    def run(begin: int, end: int) -> None:
        if end == 11:
            raise ValueError("the last")

    with pytest.raises(ValueError, match="the last"):
        share(run, 11)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    share(lambda begin, end: None, 11)  # the parent has some now
    child = multiprocessing.get_context("fork").Process(target=share, args=(lambda begin, end: None, 11))
    child.start()
    child.join(20)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()
