"""One attention case on packed pages: what both the kernels and the reference are given."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.formats import FORMATS, HEAD_SIZES
from fraqtl_kernels.gpu.constexprs import has_kernels
from fraqtl_kernels.gpu.tuning import Tuning
from tests.kernels.conftest import PagedBatch, make_batch, relative_error
from tests.kernels.gpu.conftest import DEVICE
from tests.kernels.transforms import random_constants

ON_GPU = {name: format for name, format in FORMATS.items() if has_kernels(format)}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Everything that changes what attention computes, or how a kernel goes about it."""

    format: str = "k4v4"
    dtype: torch.dtype = torch.float16
    head_size: int = 64
    block_size: int = 16
    kv_heads: int = 2
    group: int = 4
    seq_lens: tuple[int, ...] = (1, 17, 140)
    queries: tuple[int, ...] = (1, 1, 1)
    window: int | None = None
    soft_cap: float | None = None
    sink_logits: bool = False
    calibrated: bool = False
    padding: int = 0
    splits: int = 3
    tuning: Tuning | None = None
    seed: int = 0

    def batch(self) -> tuple[PagedBatch, Tensor | None]:
        """The paged batch and the sinks. Calibrated: keys have a bias, uneven channels and sink tokens."""
        batch = make_batch(
            self.format,
            head_size=self.head_size,
            block_size=self.block_size,
            kv_heads=self.kv_heads,
            group=self.group,
            seq_lens=self.seq_lens,
            queries=self.queries,
            dtype=self.dtype,
            padding=self.padding,
            seed=self.seed,
        )
        sink_logits = torch.randn(self.kv_heads * self.group) * 2 if self.sink_logits else None
        calibrated = batch.layout.format.k.calibrated or batch.layout.format.v.calibrated
        return (biased(batch) if self.calibrated and calibrated else batch), sink_logits


def random_cases(count: int, *, max_query_len: int, tunings: Iterable[Tuning | None], seed: int = 3) -> list[Case]:
    """Cases that together meet every value of every axis, and with 100 of them every length of 1 .. 300."""
    rng = random.Random(seed)
    decks: dict[str, list[Any]] = {}

    def draw(name: str, values: Iterable[Any]) -> Any:
        if not decks.get(name):
            decks[name] = list(values)
            rng.shuffle(decks[name])
        return decks[name].pop()

    cases = []
    for number in range(count):
        seq_lens = tuple(draw("length", range(1, 301)) for _ in range(3))
        most = draw("queries", range(1, max_query_len + 1))
        cases.append(
            Case(
                format=draw("format", ON_GPU),
                dtype=draw("dtype", TOLERANCE),
                head_size=draw("head size", HEAD_SIZES),
                block_size=draw("block size", (16, 32, 64, 128)),
                kv_heads=draw("heads", (1, 2)),
                group=draw("group", (1, 2, 4, 8, 7)),
                seq_lens=seq_lens,
                queries=tuple(min(n, rng.choice((1, most, most))) for n in seq_lens),
                window=draw("window", (None, None, 1, 33, 100)),
                soft_cap=draw("cap", (None, None, 5.0)),
                sink_logits=draw("sinks", (False, False, True)),
                calibrated=draw("constants", (False, True)),
                padding=draw("padding", (0, 48, 1024)),
                splits=draw("splits", (1, 2, 3, 5)),
                tuning=draw("tile", tunings),
                seed=number,
            )
        )
    return cases


def biased(batch: PagedBatch) -> PagedBatch:
    """The batch with other keys and values in its pages: channels of 2^-3 to 2^3, a bias, every seventh token a sink.

    Queries are the larger where keys are small, so that scores stay as they are. The constants are chosen to fit.
    """
    kv_heads, size = batch.key.shape[2:]
    constants, key_factor, value_factor = random_constants(kv_heads, size, batch.layout.format)
    assert constants.key.transform is not None and constants.value.transform is not None
    assert constants.key.outlier_center is not None
    is_outlier = (torch.arange(batch.key.shape[1]) % 7 == 0)[:, None, None]
    center = torch.where(is_outlier, constants.key.outlier_center, constants.key.transform.center)
    key = (batch.key * key_factor + center).to(batch.key.dtype)
    value = (batch.value * value_factor + constants.value.transform.center).to(batch.key.dtype)
    group = batch.query.shape[1] // kv_heads
    query = (batch.query / key_factor.repeat_interleave(group, 0)).to(batch.query.dtype)
    for r, length in enumerate(batch.seq_lens.tolist()):
        token = torch.arange(length)
        slots = batch.block_table[r, token // batch.layout.block_size].long() * batch.layout.block_size
        slots += token % batch.layout.block_size
        reference.write(batch.pool, batch.layout, key[r, :length], value[r, :length], slots, constants)
    return replace(batch, key=key, value=value, query=query, constants=constants)


def expected(case: Case, batch: PagedBatch, sink_logits: Tensor | None, with_residual: bool = False) -> Tensor:
    """with_residual: as decoding one token reads its pages."""
    return batch.attention(
        window=case.window,
        soft_cap=case.soft_cap,
        sink_logits=sink_logits,
        residuals=batch.page_residuals() if with_residual else None,
    )


def to_device(pool: Tensor) -> Tensor:
    """A pool on the test device with its strides."""
    raw = pool.as_strided((pool.shape[0] * pool.stride(0),), (1,)).to(DEVICE)
    return raw.as_strided(pool.shape, pool.stride())


def run_decode(case: Case, package: str = "fraqtl_kernels.gpu") -> tuple[Tensor, Tensor]:
    """(what the decode kernel computes, what the reference computes); output and scratch start as NaN. package: the
    kernels, or a copy of them."""
    plans, launcher, operands = (import_module(f"{package}.{name}") for name in ("plan", "decode", "operands"))
    batch, sink_logits = case.batch()
    plan = plans.plan_decode(
        batch.layout,
        requests=len(case.seq_lens),
        queries=max(case.queries),
        query_heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads,
        max_seq_len=max(case.seq_lens),
        num_sms=16,
        tuning=case.tuning,
    )
    plan = replace(plan, splits=case.splits)
    output = torch.full(batch.query.shape, torch.nan, dtype=case.dtype, device=DEVICE)
    launcher.decode(
        batch.query.to(DEVICE),
        to_device(batch.pool),
        batch.layout,
        batch.block_table.to(DEVICE),
        batch.query_start.int().to(DEVICE),
        batch.seq_lens.int().to(DEVICE),
        output,
        plan,
        operands.LayerOperands.of(batch.layout.format, case.head_size, case.dtype, DEVICE, batch.constants),
        torch.full((plan.scratch_floats(case.head_size),), torch.nan, device=DEVICE),
        scale=batch.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        sink_logits=None if sink_logits is None else sink_logits.to(DEVICE),
    )
    return output.cpu(), expected(case, batch, sink_logits, with_residual=max(case.queries) == 1)


def decode_error(case: Case, package: str = "fraqtl_kernels.gpu") -> float:
    return relative_error(*run_decode(case, package))
