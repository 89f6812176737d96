"""One attention case on packed pages: what both the kernels and the reference are given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.gpu import decode as decode_module
from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.config import Tuning
from tests.kernels.conftest import PagedBatch, make_batch, relative_error
from tests.kernels.gpu.conftest import DEVICE

# Formats that the Triton kernels take.
GPU_FORMATS = [name for name in FORMATS if name not in ("k4v2", "k4v4-channel")]
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
    lengths: tuple[int, ...] = (1, 17, 140)
    queries: tuple[int, ...] = (1, 1, 1)
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    centred: bool = False
    padding: int = 0
    splits: int = 3
    tuning: Tuning | None = None
    seed: int = 0

    def batch(self) -> tuple[PagedBatch, Tensor | None, Tensor | None]:
        """The paged batch, the sinks and the key centre. Keys are written again without their centre."""
        batch = make_batch(
            self.format,
            head_size=self.head_size,
            block_size=self.block_size,
            kv_heads=self.kv_heads,
            group=self.group,
            lengths=self.lengths,
            queries=self.queries,
            dtype=self.dtype,
            padding=self.padding,
            seed=self.seed,
        )
        sinks = torch.randn(self.kv_heads * self.group) * 2 if self.sinks else None
        centre = torch.randn(self.kv_heads, self.head_size) if self.centred else None
        if centre is not None:
            constants = LayerConstants(key_centre=centre)
            for r, length in enumerate(self.lengths):
                token = torch.arange(length)
                slots = batch.block_table[r, token // self.block_size].long() * self.block_size
                slots += token % self.block_size
                key, value = batch.key[r, :length] + centre.to(self.dtype), batch.value[r, :length]
                reference.write(batch.pool, batch.layout, key, value, slots, constants)
        return batch, sinks, centre


def expected(case: Case, batch: PagedBatch, sinks: Tensor | None, centre: Tensor | None) -> Tensor:
    return reference.paged_attention(
        batch.query,
        batch.pool,
        batch.layout,
        batch.block_table,
        batch.query_start,
        batch.lengths,
        scale=batch.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=sinks,
        constants=LayerConstants(key_centre=centre),
    )


def to_device(pool: Tensor) -> Tensor:
    """A pool on the test device with its strides."""
    raw = pool.as_strided((pool.shape[0] * pool.stride(0),), (1,)).to(DEVICE)
    return raw.as_strided(pool.shape, pool.stride())


def run_decode(case: Case, module: object = decode_module) -> tuple[Tensor, Tensor]:
    """(what the decode kernel computes, what the reference computes); output and scratch start as NaN."""
    batch, sinks, centre = case.batch()
    plan = module.plan_decode(
        batch.layout,
        requests=len(case.lengths),
        queries=max(case.queries),
        query_heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads,
        longest=max(case.lengths),
        multiprocessors=16,
        tuning=case.tuning,
    )
    plan = replace(plan, splits=case.splits)
    output = torch.full(batch.query.shape, torch.nan, dtype=case.dtype, device=DEVICE)
    module.decode(
        batch.query.to(DEVICE),
        to_device(batch.pool),
        batch.layout,
        batch.block_table.to(DEVICE),
        batch.query_start.int().to(DEVICE),
        batch.lengths.int().to(DEVICE),
        output,
        plan,
        Bases.of(batch.layout.format, case.head_size, case.dtype, DEVICE, centre),
        torch.full((plan.scratch_floats(case.head_size),), torch.nan, device=DEVICE),
        scale=batch.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=None if sinks is None else sinks.to(DEVICE),
    )
    return output.cpu(), expected(case, batch, sinks, centre)


def decode_error(case: Case, module: object = decode_module) -> float:
    return relative_error(*run_decode(case, module))
