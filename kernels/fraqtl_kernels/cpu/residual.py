"""Residuals of the tokens of a running batch, for queries of the same batch.

Pages keep the residuals of a request's last tokens only, for the next step. Within a step, `write` hands on what it
made; residuals of the step before, which it is about to overwrite, it reads first. See `residual.py` for the rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.codec import dequantize, unpack
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE

BEFORE = DISTANCE - 1  # tokens before a query that it may read with their residuals


@dataclass(frozen=True)
class StreamResiduals:
    """What residuals add to the keys, or to the values, of a batch: float32, in the stored basis.

    tokens: (tokens, KV heads, D), zero for tokens without a residual. earlier: by the first token of a run, the
    same of the BEFORE tokens before it, (BEFORE, KV heads, D), zero where there is none.
    """

    tokens: Tensor
    earlier: dict[int, Tensor] = field(default_factory=dict)

    def around(self, first: int, count: int) -> Tensor:
        """(BEFORE + count, KV heads, D): of tokens first - BEFORE .. first + count - 1 of a request."""
        before = self.earlier.get(first)
        if before is None:
            before = self.tokens[max(0, first - BEFORE) : first]
            before = torch.cat([before.new_zeros(BEFORE - len(before), *before.shape[1:]), before])
        return torch.cat([before, self.tokens[first : first + count]])


@dataclass(frozen=True)
class Residuals:
    """Of a batch in which a request has several tokens. None for keys or values that have none."""

    key: StreamResiduals | None
    value: StreamResiduals | None


def find_runs(slots: Tensor, block_size: int) -> Tensor:
    """The first tokens (runs,) of all runs of two or more tokens that may belong to one request.

    slots: (tokens,). A token in the first slot of a block may follow one in the last slot of any other; if it doesn't,
    nothing is lost: there are no residuals before it.
    """
    place = slots.numpy()  # a batch of decodes asks in every layer, and NumPy takes less time to begin
    before, after = place[:-1], place[1:]
    crosses = (before % block_size == block_size - 1) & (after % block_size == 0)
    follows = np.zeros(len(place) + 1, bool)
    follows[1:-1] = ((after == before + 1) | crosses) & (before >= 0)
    return torch.from_numpy((follows[1:] & ~follows[:-1]).nonzero()[0])


def read_earlier(
    plane: Tensor, scales: Tensor, vector: VectorFormat, layout: PageLayout, slots: Tensor, runs: Tensor
) -> dict[int, Tensor]:
    """`StreamResiduals.earlier` of a batch, out of pages that it has not been written to yet.

    plane, scales: of `Planes`. slots: (tokens,). runs: of `find_runs`.
    """
    size = layout.block_size
    earlier = {}
    for first in runs.tolist():
        block, offset = divmod(int(slots[first]), size)
        if offset == 0:  # as most runs begin: nothing comes before
            earlier[first] = torch.zeros(BEFORE, plane.shape[1], layout.head_size, dtype=torch.float32)
            continue
        offsets = torch.arange(offset - BEFORE, offset)
        place = block, slice(None), (offsets + DISTANCE).clamp_max(size - 1)
        residual = dequantize(unpack(plane[place], vector), scales[place], vector).transpose(0, 1)
        earlier[first] = residual.masked_fill(((offsets < 0) | (offsets + DISTANCE >= size))[:, None, None], 0)
    return earlier
