"""The matrices and vectors that carry queries, keys and values into the stored basis, as kernels take them.

Without calibration the basis is a Hadamard matrix, with entries ±1/sqrt(D). Kernels multiply by ±1, which 16-bit
numbers hold exactly, and apply the factor 1/sqrt(D) in fp32 afterwards: the rotation of a 16-bit vector is then
as exact as fp32 sums are. The matrices of calibration, one per KV head, hold 16-bit numbers from the start
(`constants.sixteen_bits`):

    queries: R^T      keys, values: B      back: R, the inverse of B

Centres are subtracted in the stored basis, so they are carried there once, here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants, Transform
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import KVFormat, VectorFormat
from fraqtl_kernels.gpu.config import in_words, word_order
from fraqtl_kernels.rotation import hadamard


@dataclass(frozen=True)
class Side:
    """Operands of the keys or of the values of one layer. None where there is nothing to do.

    query, store, back: (D, D), or (KV heads, D, D) if calibrated, contiguous in the model's dtype:
    stored row = row @ store · factor. Prepared queries, what they are multiplied by, and the rows of `back` are in
    `word_order` where kernels read words. feedback: (KV heads, D/2, D/2), alike.
    centre, sink_centre: (KV heads, D) fp32 in the stored basis, own_centre, own_sink_centre: in the model's own.
    query_centre, sink_shift: what a prepared query is multiplied by for q·centre, q·(sink centre - centre).
    scale: (KV heads, D) fp32, the steps of static formats.
    """

    factor: float = 1.0
    query: Tensor | None = None
    store: Tensor | None = None
    back: Tensor | None = None
    feedback: Tensor | None = None
    centre: Tensor | None = None
    sink_centre: Tensor | None = None
    own_centre: Tensor | None = None
    own_sink_centre: Tensor | None = None
    query_centre: Tensor | None = None
    sink_shift: Tensor | None = None
    scale: Tensor | None = None

    @property
    def head_stride(self) -> int:
        """Numbers between the matrices of two KV heads: 0 where they share one."""
        return self.store.stride(0) if self.store is not None and self.store.dim() == 3 else 0


@dataclass(frozen=True)
class Bases:
    """Operands of one layer (layers without constants may share them)."""

    key: Side
    value: Side

    def check(self, format: KVFormat) -> None:
        """Raises ConfigError if the format has static scales and calibration has given none."""
        if (format.k.static and self.key.scale is None) or (format.v.static and self.value.scale is None):
            raise ConfigError(f"the format {format.name} has static scales and needs calibration: leave calibration on")

    @classmethod
    def of(
        cls,
        format: KVFormat,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        constants: LayerConstants = IDENTITY,
    ) -> Bases:
        """Operands of a format."""

        def matrix(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype).contiguous()

        def vector(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=torch.float32).contiguous()

        def rotated(v: VectorFormat, scale: Tensor | None) -> Side:
            steps = vector(scale) if v.static else None
            if not v.rotated:
                return Side(scale=steps)
            signs, order = hadamard(head_size).sign(), reading_order(v)
            return Side(head_size**-0.5, matrix(signs[:, order]), matrix(signs), matrix(signs.T[order]), scale=steps)

        def reading_order(v: VectorFormat) -> Tensor:
            return word_order(head_size) if in_words(v) else torch.arange(head_size)

        def calibrated(v: VectorFormat, t: Transform, sink: Tensor | None) -> Side:
            order = reading_order(v)
            basis, inverse = t.basis.double().cpu(), t.inverse.double().cpu()
            centre = t.centre.double().cpu()
            sink = None if sink is None else sink.double().cpu()

            def stored(x: Tensor) -> Tensor | None:
                return vector((x[:, None] @ basis)[:, 0])

            def for_queries(x: Tensor) -> Tensor | None:
                return vector(torch.linalg.solve(inverse.mT, x)[:, order])

            return Side(
                1.0,
                matrix(inverse.mT[..., order]),
                matrix(basis),
                matrix(inverse[:, order]),
                matrix(t.feedback),
                stored(centre),
                None if sink is None else stored(sink),
                vector(centre),
                vector(sink),
                for_queries(centre),
                None if sink is None else for_queries(sink - centre),
            )

        k = constants.key if format.k.centred else None
        v = constants.value if format.v.centred else None
        return cls(
            rotated(format.k, constants.key_scale) if k is None else calibrated(format.k, k, constants.sink_centre),
            rotated(format.v, constants.value_scale) if v is None else calibrated(format.v, v, None),
        )
