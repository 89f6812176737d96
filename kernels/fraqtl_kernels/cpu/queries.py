"""Queries as the CPU kernels take them: in the basis of the stored keys, with what the keys' centres add to a score.

score = q'·z + base (+ sink, for keys that took the sink centre),  q' = scale · (q · 2^e) H
base = scale · q·centre,  sink = scale · q·(sink centre - centre) = q'·sink_shift
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.reference import rotate


@dataclass(frozen=True)
class Queries:
    """The queries of a bucket.

    q: (R, KV heads, M, D) float32, M = query heads a KV head x query tokens, the tokens innermost.
    base, sink: (R, KV heads, M) float32. sink_shift: (KV heads, D) float32, the same as a vector that is added to
    stored keys, or None if there is no sink centre.
    """

    q: Tensor
    base: Tensor
    sink: Tensor
    sink_shift: Tensor | None

    @property
    def total(self) -> Tensor:
        """(R, KV heads, M): what the midpoint of the grid is multiplied by."""
        return self.q.sum(-1)


def prepare_queries(query: Tensor, vector: VectorFormat, constants: LayerConstants, scale: float) -> Queries:
    """query: (R, KV heads, M, D) float32, in the model's own basis. vector: how keys are stored."""
    zero = query.new_zeros(query.shape[:-1])
    if vector.static:
        return Queries(constants.prepare_queries(query) * scale, zero, zero, None)
    if not vector.centred or constants.key_centre is None:
        return Queries(rotate(query, vector) * scale, zero, zero, None)
    q = rotate(constants.prepare_queries(query), vector) * scale
    base = torch.einsum("rhmd,hd->rhm", query, constants.key_centre) * scale
    if constants.sink_centre is None:
        return Queries(q, base, zero, None)
    shift = rotate(constants.prepare_keys(constants.sink_centre), vector)
    return Queries(q, base, torch.einsum("rhmd,hd->rhm", q, shift), shift)
