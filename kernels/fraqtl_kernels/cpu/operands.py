"""What compiled loops take of one layer, made once, when its constants arrive.

score = q'·z + score_bias (+ outlier_bias, for keys that took the outlier center),  q' = scale · q R^T, R the inverse of
the basis, score_bias = scale · q·center,  outlier_bias = scale · q·(outlier center - center) = q'·outlier_shift
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.codec import rotate, unrotate
from fraqtl_kernels.constants import IDENTITY, LayerConstants, StreamConstants
from fraqtl_kernels.cpu.kernels.products import panels
from fraqtl_kernels.cpu.kernels.records import STREAM
from fraqtl_kernels.formats import FEEDBACK_GRID, VectorFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE
from fraqtl_kernels.rotation import hadamard

_NOTHING = np.empty(0, np.float32)
_NO_ROTATION = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class StreamOperands:
    """How keys, or values, are stored.

    table: for every head one after another, float32: the center (D), the way from it to the outlier center in the basis
    (D), the basis in panels (D · D), and the feedback if there is one, as its spectrum (D/2) or as the matrix divided
    by FEEDBACK_GRID (D/2 · D/2); nothing without a transform. hadamard_base: of the rotation, if there is one and no
    transform. scale: (KV heads, D), the steps of static formats.
    """

    table: Any
    hadamard_base: Any
    scale: Tensor | None


class QueryBasis(NamedTuple):
    """What turns a query into q', score_bias and outlier_bias but for the softmax scale, float32.

    matrix: `panels` of (KV heads, D, D), or none where q' = q. center, outlier_bias: (KV heads, D).
    """

    matrix: Any
    center: Any
    outlier_bias: Any


class OutputBasis(NamedTuple):
    """What takes an output out of the basis of the values: multiply, then add. As in `QueryBasis`."""

    matrix: Any
    center: Any


@dataclass(frozen=True)
class Queries:
    """The queries of a bucket.

    q: (R, KV heads, M, D) float32, M = query heads a KV head x query tokens, the tokens innermost.
    score_bias, outlier_bias: (R, KV heads, M) float32.
    """

    q: Tensor
    score_bias: Tensor
    outlier_bias: Tensor

    @property
    def q_sum(self) -> Tensor:
        """(R, KV heads, M): what the midpoint of the grid is multiplied by."""
        return self.q.sum(-1)


@dataclass(frozen=True)
class LayerOperands:
    """Operands of one layer.

    streams: (2,) of `STREAM`, keys and values, but for what belongs to a batch. query: (KV heads, D, D + 2), columns
    that a query is multiplied by to give q', score_bias and outlier_bias. back: (KV heads, D, D), what an output is
    multiplied by, center: (KV heads, D), what is added then. outlier_shift: (KV heads, D), as a vector that is added to
    stored keys, or (KV heads, 0) if there is no outlier center. to_basis, from_basis: the same for compiled loops.
    """

    key: StreamOperands
    value: StreamOperands
    streams: Any
    query: Tensor
    outlier_shift: Any
    back: Tensor
    center: Tensor
    to_basis: QueryBasis
    from_basis: OutputBasis

    @classmethod
    def of(cls, layout: PageLayout, heads: int, constants: LayerConstants = IDENTITY) -> LayerOperands:
        """Operands of a layer with `heads` KV heads."""
        k, v, size = layout.format.k, layout.format.v, layout.head_size
        query, shift = _query_columns(heads, size, k, constants)
        back, center = _output_columns(heads, size, v, constants.value)
        streams = np.zeros(2, STREAM)
        key = _stream(streams[0], k, size, constants.key, 0, layout.k_scale_offset)
        value = _stream(streams[1], v, size, constants.value, layout.v_offset, layout.v_scale_offset)
        to_basis = QueryBasis(_panels(query[..., :size]), *(_array(query[..., size + i]) for i in (0, 1)))
        from_basis = OutputBasis(_panels(back), _array(center))
        return cls(key, value, streams, query, _array(shift), back, center, to_basis, from_basis)

    def prepare_queries(self, query: Tensor, scale: float) -> Queries:
        """query: (R, KV heads, M, D) float32, in the model's own basis."""
        product = (query * scale) @ self.query
        size = query.shape[3]
        return Queries(product[..., :size].contiguous(), product[..., size], product[..., size + 1])

    def restore_output(self, out: Tensor, key_share: Tensor) -> Tensor:
        """Attention outputs (R, KV heads, M, D) float32 out of the basis in which values are stored.

        key_share: (R, KV heads, M) the weights of all keys together, 1 without sink logits.
        """
        return out @ self.back + key_share[..., None] * self.center[:, None]


def _array(x: Tensor) -> Any:
    return x.contiguous().numpy()


def _panels(matrix: Tensor) -> Any:
    """Of (KV heads, D, D); nothing of an identity."""
    identity = torch.equal(matrix, torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix))
    return _array(panels(matrix[:, :0, :0] if identity else matrix))


def _query_columns(heads: int, size: int, vector: VectorFormat, constants: LayerConstants) -> tuple[Tensor, Tensor]:
    """`LayerOperands.query` and `outlier_shift`."""
    columns = torch.eye(size, dtype=torch.float32).expand(heads, size, size)
    score_bias = outlier_bias = torch.zeros(heads, size, 1, dtype=torch.float32)
    outlier_shift = columns.new_empty(heads, 0)
    transform = constants.key.transform if vector.calibrated else None
    if vector.static or transform is not None:
        columns = constants.prepare_queries(columns)
    if transform is None:
        columns = rotate(columns, vector)
    else:
        score_bias = transform.center[..., None]
        if constants.key.outlier_center is not None:
            outlier_bias = (constants.key.outlier_center - transform.center)[..., None]
            # The vector that the inverse, as rounded, carries back to it
            outlier_shift = torch.linalg.solve(transform.inverse.double().mT, outlier_bias.double())[..., 0].float()
    return torch.cat([columns, score_bias, outlier_bias], -1), outlier_shift


def _output_columns(heads: int, size: int, vector: VectorFormat, constants: StreamConstants) -> tuple[Tensor, Tensor]:
    """`LayerOperands.back` and `center`."""
    unit = torch.eye(size, dtype=torch.float32).expand(heads, size, size)  # whatever the default dtype is
    origin = unit.new_zeros(heads, size)
    if vector.calibrated and constants.transform is not None:
        return constants.transform.inverse.float(), constants.transform.center.float()
    if vector.static and constants.scale is not None:
        return unit * constants.scale.float()[:, None], origin
    return unrotate(unit, vector).contiguous(), origin


def _stream(
    record: Any, vector: VectorFormat, size: int, constants: StreamConstants, code_offset: int, scale_offset: int
) -> StreamOperands:
    """What `write` needs of keys or values; fills their record."""
    record["code_offset"], record["scale_offset"] = code_offset, scale_offset
    if not vector.is_scaled:
        return StreamOperands(_NOTHING, _NO_ROTATION, constants.scale)
    record["bits"], record["groups"] = vector.bits, vector.groups
    record["code_bytes"], record["scale_bytes"] = vector.code_bytes(size), vector.scale_bytes
    record["distance"] = DISTANCE if vector.has_residual else 0
    record["edge"], record["midpoint"], record["levels"] = vector.edge, vector.midpoint, vector.levels
    record["unit"] = size**-0.5
    transform = constants.transform if vector.calibrated else None
    if transform is None:
        return StreamOperands(_NOTHING, make_hadamard_base(size) if vector.rotated else _NO_ROTATION, None)
    center, outlier_center = transform.center.float(), constants.outlier_center
    outlier_shift = torch.zeros_like(center) if outlier_center is None else transform.apply(outlier_center.float())
    parts = [center, outlier_shift, panels(transform.basis.float()).flatten(1)]
    if transform.feedback is not None:
        spectrum = spectrum_of(transform.feedback)
        parts.append((transform.feedback.float() / FEEDBACK_GRID if spectrum is None else spectrum).flatten(1))
        record["feeds_back"], record["is_structured"] = True, spectrum is not None
    table = torch.cat(parts, 1)
    record["is_calibrated"] = True
    record["is_shifted"], record["head_numbers"] = outlier_center is not None, table.shape[1]
    return StreamOperands(_array(table.flatten()), _NO_ROTATION, None)


def spectrum_of(feedback: Tensor) -> Tensor | None:
    """What `feed_back` takes in the place of F (KV heads, D/2, D/2): (KV heads, D/2) float32, or None if F has no
    such form."""
    size = feedback.shape[-1]
    if size & (size - 1) or not 32 <= size <= 256:
        return None
    first, index = feedback[:, 0].double(), torch.arange(size)
    if not torch.equal(first[:, index[:, None] ^ index], feedback.double()):
        return None
    eigenvalues = first @ hadamard(size).sign()
    return (eigenvalues / size / FEEDBACK_GRID).float()


@cache
def make_hadamard_base(size: int) -> Any:
    """B of H = S ⊗ B, entries ±1, (b, b) float32 with b = 1, 12 or 20."""
    hadamard_base = size
    while hadamard_base % 2 == 0 and hadamard_base not in (12, 20):
        hadamard_base //= 2
    return hadamard(hadamard_base).sign().float().numpy()
