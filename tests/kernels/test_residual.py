"""The newest tokens of a block, and what its free slots hold of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fraqtl_kernels import cpu, reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE, reads_residual, residual_positions
from tests.kernels.conftest import make_pool, relative_error
from tests.kernels.on_cpu import cpu_attend, cpu_write

WITH_RESIDUAL = [name for name, format in FORMATS.items() if format.has_residual]
TOKENS, HEADS, SIZE = 90, 2, 64


def test_which_tokens_a_query_reads_with_a_residual() -> None:
    position = torch.arange(64)
    for query in range(64):
        offset = query % 16
        wanted = [query - back for back in range(4) if back <= offset and offset - back + 4 < 16]
        assert position[reads_residual(torch.tensor(query), position, 16)].tolist() == sorted(wanted)
        assert residual_positions(query + 1, 16).tolist() == sorted(wanted)
    assert (
        residual_positions(0, 16).tolist() == []
        and residual_positions(64, 64).tolist() == []
        and residual_positions(61, 64).tolist() == [57, 58, 59]
    )


def made(name: str, calibrated: bool) -> tuple[PageLayout, Tensor, Tensor, Tensor, LayerConstants]:
    """A layout, and queries, keys and values of one request with the constants that fit them."""
    torch.manual_seed(5)
    key, value = torch.randn(2, TOKENS, HEADS, SIZE).unbind()
    key[::11] += 20 * key[0]
    query = torch.randn(TOKENS, 2 * HEADS, SIZE)
    constants = calibrate(FORMATS[name], key, query, value) if calibrated else IDENTITY
    return PageLayout(FORMATS[name], SIZE, 16), query, key, value, constants


def in_chunks(name: str, pieces: list[int], calibrated: bool, soft_cap: float | None = None) -> tuple[Tensor, Tensor]:
    """(pages, outputs) of a request whose tokens come in chunks, each written and then attended."""
    layout, query, key, value, constants = made(name, calibrated)
    pool, table = make_pool(layout, 8, HEADS), torch.tensor([[3, 1, 7, 2, 5, 6]], dtype=torch.int32)
    output, start = torch.full_like(query, torch.nan), 0
    for count in pieces:
        token = torch.arange(start, start + count)
        slots = table[0, token // 16].long() * 16 + token % 16
        residual = cpu_write(pool, layout, key[token], value[token], slots, constants)
        rows = torch.full_like(query[token], torch.nan)
        plan = cpu.plan_attention([0, count], [start + count])
        options = {"scale": 0.1, "soft_cap": soft_cap, "constants": constants, "residuals": residual}
        cpu_attend(query[token], pool, layout, table, plan, rows, **options)
        output[token], start = rows, start + count
    return pool, output


@pytest.mark.parametrize("name", WITH_RESIDUAL)
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_attention_does_not_depend_on_how_a_prompt_is_cut(name: str, calibrated: bool, soft_cap: float | None) -> None:
    pool, whole = in_chunks(name, [TOKENS], calibrated, soft_cap)
    assert whole.isfinite().all()
    cuts = ([1] * TOKENS, [2] * 45, [3] * 30, [16, 16, 16, 42], [7, 13, 4, 1, 1, 64], [15, 2, 13, 3, 57], [30, 60])
    for pieces in cuts:
        pages, output = in_chunks(name, pieces, calibrated, soft_cap)
        assert torch.equal(pages, pool)
        assert relative_error(output, whole) < 1e-5, pieces


@pytest.mark.parametrize("name", WITH_RESIDUAL)
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_prompt_reads_what_the_reference_makes_of_its_tokens(name: str, calibrated: bool, window: int | None) -> None:
    """Pages and residuals by the reference alone; a number on the edge of two codes may fall to the other side."""
    layout, query, key, value, constants = made(name, calibrated)
    pools, slots = [make_pool(layout, 8, HEADS) for _ in range(2)], torch.arange(TOKENS)
    running = cpu_write(pools[0], layout, key, value, slots, constants)
    reference.write(pools[1], layout, key, value, slots, constants)
    table, start, seq_lens = torch.arange(8)[None], torch.tensor([0, TOKENS]), torch.tensor([TOKENS])
    output, plan = torch.full_like(query, torch.nan), cpu.plan_attention([0, TOKENS], [TOKENS])
    options = {"scale": 0.1, "window": window, "constants": constants}
    cpu_attend(query, pools[0], layout, table, plan, output, residuals=running, **options)
    residual = reference.written_residuals(key, value, layout, constants)
    batch = query, pools[1], layout, table, start, seq_lens
    expected = reference.paged_attention(*batch, **options, residuals=[residual])
    assert relative_error(output, expected) < 2e-3
    assert relative_error(output, reference.paged_attention(*batch, **options)) > 1e-2


@pytest.mark.parametrize("name", WITH_RESIDUAL)
def test_full_blocks_hold_no_residuals(name: str) -> None:
    """They are shared, so they must not depend on what a request did with them. Half a block holds some."""
    layout, _, key, value, _ = made(name, calibrated=False)
    for tokens, equal in ((32, True), (40, False)):
        pools = []
        for format in (layout.format, layout.format.without_residual):
            own = PageLayout(format, SIZE, 16)
            pools.append(make_pool(own, 3, HEADS))
            for token in range(tokens):  # one by one: every residual is written and written over
                row = slice(token, token + 1)
                cpu_write(pools[-1], own, key[row], value[row], torch.tensor([token]))
        assert torch.equal(*pools) is equal


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_residual_brings_an_order_of_magnitude(calibrated: bool) -> None:
    layout, _, key, value, constants = made("k4v4", calibrated)
    pool, length = make_pool(layout, 8, HEADS), 39
    reference.write(pool, layout, key[:length], value[:length], torch.arange(length), constants)
    residual = reference.page_residuals(pool, layout, torch.arange(8), length, constants)
    planes, token = layout.planes(pool), residual_positions(length, 16)
    assert token.tolist() == [35, 36, 37, 38]
    place = token // 16, slice(None), token % 16
    for exact, stored, added in (
        (key, reference.stored_keys(planes, layout.format.k, constants), residual[0]),
        (value, reference.stored_values(planes, layout.format.v, constants), residual[1]),
    ):
        coarse = relative_error(stored[place], exact[token])
        assert 0.03 < coarse < 0.2
        assert relative_error(stored[place] + added[token], exact[token]) < coarse / 8
        assert not added[: length - DISTANCE].any()


def test_residuals_are_dropped_on_request() -> None:
    plain = FORMATS["k4v4"].without_residual
    assert not plain.has_residual and plain.bytes_per_token(128) == 132
    layout, query, key, value, _ = made("k4v4", calibrated=False)
    pool = make_pool(layout, 8, HEADS)
    layout = PageLayout(plain, SIZE, 16)
    assert cpu_write(pool, layout, key, value, torch.arange(TOKENS)) is None
    output, plan = torch.empty_like(query), cpu.plan_attention([0, TOKENS], [TOKENS])
    table = torch.arange(8)[None]
    cpu_attend(query, pool, layout, table, plan, output, scale=0.1)
    seq_lens, start = torch.tensor([TOKENS]), torch.tensor([0, TOKENS])
    expected = reference.paged_attention(query, pool, layout, table, start, seq_lens, scale=0.1)
    assert relative_error(output, expected) < 2e-6
