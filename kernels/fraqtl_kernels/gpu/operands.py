"""The matrices and vectors that carry queries, keys and values into the stored basis, as kernels take them.

Without calibration the basis is a Hadamard matrix, with entries ±1/sqrt(D). Kernels multiply by ±1, which 16-bit
numbers hold exactly, and apply the factor 1/sqrt(D) in fp32 afterwards: the rotation of a 16-bit vector is then
as exact as fp32 sums are. The matrices of calibration, one per KV head, hold 16-bit numbers from the start
(`constants.sixteen_bits`):

    queries: R^T      keys, values: B      back: R, the inverse of B

Centers are subtracted in the stored basis, so they are carried there once, here.

What attention multiplies by comes in two orders of the stored dimensions: that of bytes, and that of words
(`constexprs.word_order`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants, StreamConstants, Transform
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import KVFormat, VectorFormat
from fraqtl_kernels.gpu.constexprs import readable_in_words, word_order
from fraqtl_kernels.rotation import hadamard


@dataclass(frozen=True)
class ReadOperands:
    """What attention multiplies by, with the stored dimensions in one order. None where there is nothing to do.

    query, back: (D, D), or (KV heads, D, D) if calibrated, contiguous in the model's dtype: prepared query = query row
    @ query · factor, output = stored row @ back · factor.
    query_center, outlier_shift: (KV heads, D) fp32, what a prepared query is multiplied by for q·center, q·(outlier
    center - center).
    """

    query: Tensor | None = None
    back: Tensor | None = None
    query_center: Tensor | None = None
    outlier_shift: Tensor | None = None

    def reordered(self, order: Tensor) -> ReadOperands:
        """The same with the stored dimensions in another order. order: (D,) int64."""

        def pick(x: Tensor | None, dim: int) -> Tensor | None:
            return None if x is None else x.index_select(dim, order.to(x.device)).contiguous()

        return ReadOperands(
            pick(self.query, -1), pick(self.back, -2), pick(self.query_center, -1), pick(self.outlier_shift, -1)
        )


@dataclass(frozen=True)
class StreamOperands:
    """Operands of the keys or of the values of one layer. None where there is nothing to do.

    store: like the matrices of `ReadOperands`, stored row = row @ store · factor. feedback: (KV heads, D/2, D/2),
    alike. center, outlier_center: (KV heads, D) fp32 in the stored basis, own_center, own_outlier_center: in the
    model's own. scale: (KV heads, D) fp32, the steps of static formats. in_bytes, in_words: what to read with; the same
    where nothing can be read as words.
    """

    factor: float = 1.0
    store: Tensor | None = None
    feedback: Tensor | None = None
    center: Tensor | None = None
    outlier_center: Tensor | None = None
    own_center: Tensor | None = None
    own_outlier_center: Tensor | None = None
    scale: Tensor | None = None
    in_bytes: ReadOperands = ReadOperands()
    in_words: ReadOperands = ReadOperands()

    @property
    def head_stride(self) -> int:
        """Numbers between the matrices of two KV heads: 0 where they share one."""
        return self.store.stride(0) if self.store is not None and self.store.dim() == 3 else 0

    def read(self, words: bool) -> ReadOperands:
        """For kernels that read words, or bytes."""
        return self.in_words if words else self.in_bytes


def calibrated_bytes(format: KVFormat, head_size: int, kv_heads: int) -> int:
    """Device memory of the matrices that calibration gives a layer: what must be kept free for them."""
    square = head_size * head_size
    words = sum(2 * readable_in_words(v) for v in (format.k, format.v) if v.calibrated)
    calibrated = format.k.calibrated + format.v.calibrated
    feedbacks = format.k.has_feedback + format.v.has_feedback
    return 2 * kv_heads * ((3 * calibrated + words) * square + feedbacks * square // 4)


@dataclass(frozen=True)
class LayerOperands:
    """Operands of one layer (layers without constants may share them)."""

    key: StreamOperands
    value: StreamOperands

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
    ) -> LayerOperands:
        """Operands of a format, for kernels that compute in `dtype`."""
        target = _Target(dtype, torch.device(device))
        return cls(
            _stream(format.k, head_size, constants.key, target), _stream(format.v, head_size, constants.value, target)
        )


@dataclass(frozen=True)
class _Target:
    """What operands are made for."""

    dtype: torch.dtype
    device: torch.device

    def matrix(self, x: Tensor) -> Tensor:
        return x.to(device=self.device, dtype=self.dtype).contiguous()

    def vector(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device=self.device, dtype=torch.float32).contiguous()


def _stream(vector: VectorFormat, head_size: int, constants: StreamConstants, target: _Target) -> StreamOperands:
    if vector.calibrated and constants.transform is not None:
        return _calibrated(vector, constants.transform, constants.outlier_center, target)
    scale = target.vector(constants.scale) if vector.static else None
    if not vector.rotated:
        return StreamOperands(scale=scale)
    signs = target.matrix(hadamard(head_size).sign())
    read = ReadOperands(signs, signs.T.contiguous())
    in_words = _in_words(vector, read, head_size)
    return StreamOperands(head_size**-0.5, signs, scale=scale, in_bytes=read, in_words=in_words)


def _calibrated(
    vector: VectorFormat, transform: Transform, outlier_center: Tensor | None, target: _Target
) -> StreamOperands:
    basis, inverse, center = (x.double().cpu() for x in (transform.basis, transform.inverse, transform.center))
    outlier = None if outlier_center is None else outlier_center.double().cpu()

    def stored(x: Tensor) -> Tensor | None:
        return target.vector((x[:, None] @ basis)[:, 0])

    def for_queries(x: Tensor) -> Tensor | None:
        return target.vector(torch.linalg.solve(inverse.mT, x))

    read = ReadOperands(
        target.matrix(inverse.mT),
        target.matrix(inverse),
        for_queries(center),
        None if outlier is None else for_queries(outlier - center),
    )
    return StreamOperands(
        store=target.matrix(basis),
        feedback=None if transform.feedback is None else target.matrix(transform.feedback),
        center=stored(center),
        outlier_center=None if outlier is None else stored(outlier),
        own_center=target.vector(center),
        own_outlier_center=target.vector(outlier),
        in_bytes=read,
        in_words=_in_words(vector, read, basis.shape[-1]),
    )


def _in_words(vector: VectorFormat, read: ReadOperands, head_size: int) -> ReadOperands:
    return read.reordered(word_order(head_size)) if readable_in_words(vector) else read


def check_contiguous(**tensors: Tensor) -> None:
    """Raises ValueError unless the last dimension of every tensor is contiguous."""
    wrong = [name for name, x in tensors.items() if x.stride(-1) != 1]
    if wrong:
        raise ValueError(
            f"{' and '.join(tensors)} must be contiguous in their last dimension, {' and '.join(wrong)} is not"
        )
