"""What calibration fixes for one layer before the first request, and what it does to keys, values and queries.

A vector x of a calibrated format is stored as codes of z, and a query sees z instead of x:

    z = (x - c) B,  x ≈ z R + c,  R = B^-1        q·k = (q R^T)·z + q·c        Σ_j p_j v_j = (Σ_j p_j z_j) R + c

- The center c is the mean. Softmax is blind to q·c, which is the same for every key, so it is only computed where
  scores are capped or sink logits are learned; that of the values is added to the output, since weights add up to 1.
- The basis B says what the codes count: any matrix is free at decode, where queries and outputs take one product with a
  matrix anyway. For 3- and 4-bit codes `calibration.solve` chooses it, and the feedback F: the second half of a vector
  is rounded first, and what rounding left of it, times F, is taken into account when the first half is rounded. For 8-
  and 2-bit codes it is a Hadamard matrix, and there is no F.
- A few tokens (attention sinks, mostly the first of a sequence) have huge keys that are much alike in
  every text (Sun et al., "Massive activations in large language models", 2024). They get a center of their
  own: each key takes the center that leaves less of it, by the scale it would need. Which one it took is
  the sign bit of its scale; a query then adds q·(outlier center - center) to the scores of those tokens.

Formats with static scales (`VectorFormat.static`) use scales instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SMALLEST = 2.0**-14  # of the numbers that fp16 holds to as many digits as bf16 does


@dataclass(frozen=True)
class Transform:
    """How the keys or the values of a layer are stored.

    center: (KV heads, D) fp32. basis, inverse: (KV heads, D, D), feedback: (KV heads, D/2, D/2), of numbers that both
    16-bit dtypes hold exactly (see `sixteen_bits`); rows are multiplied from the left. Without feedback, codes follow
    `reference.quantize`.
    """

    center: Tensor
    basis: Tensor
    inverse: Tensor
    feedback: Tensor | None = None

    def apply(self, x: Tensor, center: Tensor | None = None) -> Tensor:
        """(x - c) B. x: (..., KV heads, D), floating point; keeps the dtype. center: in the place of c."""
        moved = x - (self.center if center is None else center).to(x)
        return torch.einsum("...hd,hde->...he", moved, self.basis.to(x))

    def undo(self, z: Tensor) -> Tensor:
        """z R + c."""
        return torch.einsum("...hd,hde->...he", z, self.inverse.to(z)) + self.center.to(z)


@dataclass(frozen=True)
class StreamConstants:
    """Constants of the keys, or of the values, of one layer; None where there is nothing to do.

    outlier_center: (KV heads, D) fp32, of keys only, in the place of the transform's center for keys nearer to it;
    comes with a transform. scale: (KV heads, D) fp32, the steps of static formats.
    """

    transform: Transform | None = None
    outlier_center: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True, eq=False)  # an object is its own key: a layer's constants never change
class LayerConstants:
    """One layer's constants."""

    key: StreamConstants = StreamConstants()
    value: StreamConstants = StreamConstants()

    @classmethod
    def of(
        cls,
        key: Transform | None = None,
        value: Transform | None = None,
        outlier_center: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> LayerConstants:
        """From its parts."""
        return cls(StreamConstants(key, outlier_center, key_scale), StreamConstants(value, None, value_scale))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerConstants:
        """From some of TENSOR_NAMES; a transform needs all of its own but the feedback."""
        key, value = (_transform(f"{stream}_", tensors) for stream in ("key", "value"))
        others = (tensors.get(name) for name in ("outlier_center", "key_scale", "value_scale"))
        return cls.of(key, value, *others)

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by TENSOR_NAMES."""
        found = {
            f"{name}_{part}": getattr(stream.transform, part, None)
            for name, stream in (("key", self.key), ("value", self.value))
            for part in _PARTS
        }
        others = {
            "outlier_center": self.key.outlier_center,
            "key_scale": self.key.scale,
            "value_scale": self.value.scale,
        }
        return {name: x for name, x in (found | others).items() if x is not None}

    def restore_keys(self, z: Tensor, is_outlier: Tensor) -> Tensor:
        """z R and the center that was taken. is_outlier: (..., KV heads) bool, which keys took the outlier center."""
        transform, outlier_center = self.key.transform, self.key.outlier_center
        if transform is None:
            return z
        keys = transform.undo(z)
        if outlier_center is None:
            return keys
        return keys + (outlier_center - transform.center).to(z) * is_outlier[..., None]

    def prepare_queries(self, query: Tensor) -> Tensor:
        """q R^T or q · s. query: (..., KV heads, queries, D), the queries of a KV head together."""
        if self.key.transform is not None:
            query = query @ self.key.transform.inverse.to(query).mT
        return query if self.key.scale is None else query * self.key.scale.to(query)[:, None]

    def to(self, device: torch.device | str) -> LayerConstants:
        """The same on another device."""
        return LayerConstants.from_tensors({name: x.to(device) for name, x in self.tensors().items()})


_PARTS = tuple(field.name for field in fields(Transform))
TENSOR_NAMES = (
    *(f"{stream}_{part}" for stream in ("key", "value") for part in _PARTS),
    "outlier_center",
    "key_scale",
    "value_scale",
)
IDENTITY = LayerConstants()


def _transform(stream: str, tensors: Mapping[str, Tensor]) -> Transform | None:
    """Of a stream, "key_" or "value_"."""
    center, basis, inverse, feedback = (tensors.get(stream + part) for part in _PARTS)
    if center is None or basis is None or inverse is None:
        return None
    return Transform(center, basis, inverse, feedback)


def sixteen_bits(x: Tensor) -> Tensor:
    """x rounded to numbers that both 16-bit dtypes hold exactly, as bf16: 8 digits, nothing below 2^-14."""
    rounded = x.to(torch.bfloat16).clamp(-(2.0**15), 2.0**15)
    return torch.where(rounded.abs() < SMALLEST, 0, rounded).contiguous()


def make_transform(center: Tensor, basis: Tensor, feedback: Tensor | None = None) -> Transform:
    """From exact matrices. The inverse belongs to the basis as it was rounded."""
    rounded = sixteen_bits(basis)
    inverse = sixteen_bits(torch.linalg.inv(rounded.double()))
    return Transform(center.float(), rounded, inverse, None if feedback is None else sixteen_bits(feedback))
