"""Queries and outputs of the CPU kernels: in the basis of the stored keys and values, and back.

score = q'·z + score_bias (+ outlier_bias, for keys that took the outlier center),  q' = scale · q R^T, R the inverse of
the basis score_bias = scale · q·center,  outlier_bias = scale · q·(outlier center - center) = q'·outlier_shift
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels.codec import rotate, unrotate
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.cpu.kernels.products import panels
from fraqtl_kernels.formats import VectorFormat


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


def prepare_queries(query: Tensor, vector: VectorFormat, constants: LayerConstants, scale: float) -> Queries:
    """query: (R, KV heads, M, D) float32, in the model's own basis. vector: how keys are stored."""
    operand, _ = _operand(query.shape[1], query.shape[3], vector, constants, scale)
    product = query @ operand
    size = query.shape[3]
    return Queries(product[..., :size].contiguous(), product[..., size], product[..., size + 1])


def restore_output(out: Tensor, vector: VectorFormat, constants: LayerConstants) -> Tensor:
    """Attention outputs (R, KV heads, M, D) float32 out of the basis in which values are stored."""
    if vector.calibrated and constants.value.transform is not None:
        return out @ _inverse(constants) + constants.value.transform.center[:, None]
    if vector.static and constants.value.scale is not None:
        return out * constants.value.scale[:, None]
    return unrotate(out, vector)


@lru_cache(maxsize=1024)
def _inverse(constants: LayerConstants) -> Tensor:
    assert constants.value.transform is not None
    return constants.value.transform.inverse.float()


@lru_cache(maxsize=1024)  # a layer's constants never change, so this runs once a layer and not once a token
def _operand(
    heads: int, size: int, vector: VectorFormat, constants: LayerConstants, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(KV heads, D, D + 2) float32: what queries are multiplied by to give q', score_bias and outlier_bias; and the
    outlier shift."""
    columns = torch.eye(size, dtype=torch.float32).expand(heads, size, size)
    score_bias = outlier_bias = torch.zeros(heads, size, 1, dtype=torch.float32)
    outlier_shift = None
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
    return torch.cat([columns, score_bias, outlier_bias], -1) * scale, outlier_shift


@lru_cache(maxsize=1024)
def query_operands(heads: int, size: int, vector: VectorFormat, constants: LayerConstants) -> tuple[Any, Any, Any, Any]:
    """What turns a query into q', score_bias and outlier_bias but for the softmax scale, as NumPy arrays.

    `panels` of (KV heads, D, D), or (KV heads, 0, 0) where q' = q; (KV heads, D); (KV heads, D); and the outlier shift,
    (KV heads, D), or (KV heads, 0) if there is no outlier center. All float32.
    """
    operand, shift = _operand(heads, size, vector, constants, 1.0)
    matrix = operand[..., :size]
    if torch.equal(matrix, torch.eye(size).expand_as(matrix)):
        matrix = matrix[:, :0, :0]
    shift = operand.new_empty(heads, 0) if shift is None else shift
    parts = (panels(matrix), operand[..., size], operand[..., size + 1], shift)
    return tuple(x.contiguous().numpy() for x in parts)  # type: ignore[return-value]


@lru_cache(maxsize=1024)
def output_operands(heads: int, size: int, vector: VectorFormat, constants: LayerConstants) -> tuple[Any, Any]:
    """What `restore_output` multiplies with and adds, float32: as of `query_operands`, and (KV heads, D)."""
    origin = torch.zeros(1, heads, 1, size, dtype=torch.float32)
    center = restore_output(origin, vector, constants)
    unit = torch.eye(size, dtype=torch.float32).expand(1, heads, size, size).contiguous()
    matrix = (restore_output(unit, vector, constants) - center)[0]
    if vector.calibrated and constants.value.transform is not None:
        matrix = _inverse(constants)  # as it is, without the rounding of a sum and a difference
    if torch.equal(matrix, unit[0]):
        matrix = matrix[:, :0, :0]
    return panels(matrix).numpy(), center[0, :, 0].contiguous().numpy()
