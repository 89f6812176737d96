"""A paged cache with everything that vLLM may do to one: padding, strides, shuffled blocks, poison."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.pages import PageLayout


@dataclass
class PagedBatch:
    layout: PageLayout
    pool: Tensor
    query: Tensor
    key: Tensor  # (requests, longest, KV heads, D), what was written
    value: Tensor
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    constants: LayerConstants = IDENTITY

    @property
    def scale(self) -> float:
        return self.layout.head_size**-0.5

    def attention(self, requests: int | None = None, **options: Any) -> Tensor:
        """The reference's, of the first so many requests; all by default. options: of `reference.paged_attention`."""
        n = len(self.seq_lens) if requests is None else requests
        return reference.paged_attention(
            self.query[: int(self.query_start[n])],
            self.pool,
            self.layout,
            self.block_table[:n],
            self.query_start[: n + 1],
            self.seq_lens[:n],
            **{"scale": self.scale, "constants": self.constants, **options},
        )

    def page_residuals(self, requests: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """What the pages of the first so many requests add to the tokens that their last one reads with residuals."""
        found = zip(self.block_table[:requests], self.seq_lens[:requests].tolist(), strict=True)
        return [reference.page_residuals(self.pool, self.layout, *each, self.constants) for each in found]


def make_pool(layout: PageLayout, blocks: int, heads: int, padding: int = 0) -> Tensor:
    """A pool view of vLLM's shape, poisoned: every 16-bit word is NaN, and blocks are `padding` bytes apart."""
    block_bytes = heads * layout.page_bytes + padding
    raw = torch.full((blocks * block_bytes,), 0xFF, dtype=torch.uint8)
    width = layout.format.bytes_per_token(layout.head_size)
    shape = (blocks, heads, layout.block_size, width)
    return raw.as_strided(shape, (block_bytes, layout.page_bytes, width, 1))


def make_batch(
    format_name: str,
    *,
    head_size: int = 64,
    block_size: int = 16,
    kv_heads: int = 2,
    group: int = 2,
    seq_lens: tuple[int, ...] = (1, 17, 40),
    queries: tuple[int, ...] = (1, 1, 1),
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    seed: int | None = None,
    calibrated: bool = False,
    stored: bool = True,
) -> PagedBatch:
    """Random requests in a pool. calibrated: keys have a bias, smoothing to gain from, and sinks. Formats that need
    calibration have it anyway. stored: their keys and values are in the pages."""
    if seed is not None:
        torch.manual_seed(seed)
    layout = PageLayout(FORMATS[format_name], head_size, block_size)
    counts = [-(-n // block_size) for n in seq_lens]
    pool = make_pool(layout, sum(counts) + 3, kv_heads, padding)
    order = torch.randperm(sum(counts) + 2) + 1
    table = torch.zeros(len(seq_lens), max(counts) + 1, dtype=torch.int32)
    start = 0
    for r, n in enumerate(counts):
        table[r, :n] = order[start : start + n].int()
        start += n
    key, value = (torch.randn(len(seq_lens), max(seq_lens), kv_heads, head_size, dtype=dtype) for _ in range(2))
    query = torch.randn(sum(queries), kv_heads * group, head_size, dtype=dtype)
    if calibrated:
        key = (key * 4 ** torch.randn(head_size) + 5 * torch.randn(kv_heads, head_size)).to(dtype)
        key[:, ::5] += (40 * torch.randn(kv_heads, head_size)).to(dtype)
    constants = IDENTITY
    if calibrated or layout.format.needs_calibration:
        constants = calibrate(layout.format, key.flatten(0, 1), query, value.flatten(0, 1))
    for r, n in enumerate(seq_lens if stored else ()):
        token = torch.arange(n)
        slots = table[r, token // block_size].long() * block_size + token % block_size
        reference.write(pool, layout, key[r, :n], value[r, :n], slots, constants)
    return PagedBatch(
        layout=layout,
        pool=pool,
        query=query,
        key=key,
        value=value,
        block_table=table,
        query_start=torch.tensor([0, *queries]).cumsum(0),
        seq_lens=torch.tensor(seq_lens),
        constants=constants,
    )


def make_sink_batch(format_name: str, **options: Any) -> tuple[PagedBatch, Tensor]:
    """A calibrated batch, not stored yet, whose values have a mean, too, and sink logits that take about half of the
    weight."""
    batch = make_batch(format_name, calibrated=True, stored=False, **options)
    batch.query *= 0.125  # so that no key has all the weight
    batch.value += 2 * torch.randn(batch.value.shape[2:]).to(batch.value.dtype)
    key, value = batch.key.flatten(0, 1), batch.value.flatten(0, 1)
    batch.constants = calibrate(batch.layout.format, key, batch.query, value)
    k = key.float().repeat_interleave(batch.query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", batch.query.float(), k) * batch.scale
    return batch, scores.logsumexp(-1).mean(-1) + torch.randn(len(scores))


def without_key_constants(operands: Any) -> Any:
    """A layer's operands, with scores that lack the constant of the keys' center. Softmax is blind to it."""
    size = operands.center.shape[1]
    columns = torch.cat(
        [operands.query[..., :size], 0 * operands.query[..., size : size + 1], operands.query[..., size + 1 :]], -1
    )
    basis = operands.to_basis._replace(center=0 * operands.to_basis.center)
    return replace(operands, query=columns, to_basis=basis)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖ in float64; NaN anywhere counts as infinite."""
    out, expected = out.double(), expected.double()
    return float(((out - expected).norm() / expected.norm()).nan_to_num(float("inf")))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Each test has inputs of its own, the same in every run; FRAQTL_TEST_SEED=random makes fresh ones."""
    seed = os.environ.get("FRAQTL_TEST_SEED", "0")
    if seed != "random":
        torch.manual_seed(zlib.crc32(f"{seed} {request.node.nodeid}".encode()))


@pytest.fixture(params=FORMATS)
def format_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)
