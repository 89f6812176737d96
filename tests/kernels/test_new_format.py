"""A format is one entry in one list: everything that stores, attends, counts or offers formats takes a toy at once."""

from __future__ import annotations

import pytest
import torch

from fraqtl_kernels import reference
from fraqtl_kernels.cpu import plan_attention
from fraqtl_kernels.formats import FORMATS, INT4_KEY, INT8, KVFormat
from fraqtl_kernels.gpu import constexprs
from fraqtl_serve.cli.main import main
from fraqtl_vllm.config import FraqtlConfig
from tests.kernels.conftest import make_batch, make_pool, relative_error
from tests.kernels.gpu.cases import TOLERANCE, Case, decode_error
from tests.kernels.on_cpu import cpu_attend, cpu_write

TOY = KVFormat("k4v8", INT4_KEY, INT8, "keys as in k4v4, values as in k8v8")
BYTES_AT_64 = 64 // 2 + 2 + 64 + 2


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, TOY.name, TOY)


def test_the_cpu_stores_and_attends_it() -> None:
    batch = make_batch(TOY.name, seq_lens=(70, 33), queries=(1, 1), calibrated=True)
    assert batch.layout.page_bytes == 16 * BYTES_AT_64
    pool = make_pool(batch.layout, 5, 2)
    key, value, slots = batch.key[0, :70], batch.value[0, :70], torch.arange(70)
    cpu_write(pool, batch.layout, key, value, slots, batch.constants)
    planes, expected = batch.layout.planes(pool), make_pool(batch.layout, 5, 2)
    reference.write(expected, batch.layout, key, value, slots, batch.constants)
    # But for a vector with a number on the edge of two codes: the kernel works in float32, the reference in float64
    assert (pool[:4] != expected[:4]).float().mean() < 0.005 and planes.v.shape[-1] == 64
    output, plan = torch.empty_like(batch.query), plan_attention([0, 1, 2], [70, 33])
    options = {"scale": batch.scale, "constants": batch.constants}
    cpu_attend(batch.query, batch.pool, batch.layout, batch.block_table, plan, output, **options)
    where = batch.layout, batch.block_table, batch.query_start, batch.seq_lens
    requests = zip(batch.block_table, batch.seq_lens.tolist(), strict=True)
    residuals = [reference.page_residuals(batch.pool, batch.layout, *request, batch.constants) for request in requests]
    wanted = reference.paged_attention(batch.query, batch.pool, *where, **options, residuals=residuals)
    assert relative_error(output, wanted) < 2e-6


def test_gpu_kernels_attend_it() -> None:
    case = Case(format=TOY.name, calibrated=True)
    assert decode_error(case) < TOLERANCE[case.dtype]


def test_gpu_kernels_refuse_what_a_field_says_that_they_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    assert constexprs.has_kernels(TOY) and constexprs.has_kernels(FORMATS["fp16"])
    monkeypatch.setattr(constexprs, "KNOWN_FIELDS", constexprs.KNOWN_FIELDS - {"rotated"})
    assert not constexprs.has_kernels(TOY)
    assert constexprs.has_kernels(FORMATS["fp16"])  # which says nothing there


def test_settings_and_the_command_line_offer_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert FraqtlConfig(kv_format=TOY.name).format is TOY
    assert main(["formats"]) in (None, 0)
    assert TOY.name in capsys.readouterr().out
