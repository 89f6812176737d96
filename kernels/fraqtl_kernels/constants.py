"""What calibration fixes for one layer before the first request, and what it does to keys, values and queries.

A vector x of a calibrated format is stored as codes of z, and a query sees z instead of x:

    z = (x - c) B,  x ≈ z R + c,  R = B^-1        q·k = (q R^T)·z + q·c        Σ_j p_j v_j = (Σ_j p_j z_j) R + c

- The center c is the mean. Softmax is blind to q·c, which is the same for every key, so it is only computed where
  scores are capped or sink logits are learned; that of the values is added to the output, since weights add up to 1.
- The basis B says what the 4-bit codes count: any matrix is free at decode, where queries and outputs take one product
  with a matrix anyway. `calibration.py` chooses it, and the feedback F: the second half of a vector is rounded first,
  and what rounding left of it, times F, is taken into account when the first half is rounded.
- A few tokens (attention sinks, mostly the first of a sequence) have huge keys that are much alike in
  every text (Sun et al., "Massive activations in large language models", 2024). They get a center of their
  own: each key takes the center that leaves less of it, by the scale it would need. Which one it took is
  the sign bit of its scale; a query then adds q·(outlier center - center) to the scores of those tokens.

Formats with static scales (`VectorFormat.static`) use `key_scale` and `value_scale` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SMALLEST = 2.0**-14  # of the numbers that fp16 holds to as many digits as bf16 does


@dataclass(frozen=True)
class Transform:
    """How the keys or the values of a layer are stored.

    center: (KV heads, D) fp32. basis, inverse: (KV heads, D, D), feedback: (KV heads, D/2, D/2), of numbers that both
    16-bit dtypes hold exactly (see `sixteen_bits`); rows are multiplied from the left.
    """

    center: Tensor
    basis: Tensor
    inverse: Tensor
    feedback: Tensor

    def apply(self, x: Tensor, center: Tensor | None = None) -> Tensor:
        """(x - c) B. x: (..., KV heads, D), floating point; keeps the dtype. center: in the place of c."""
        moved = x - (self.center if center is None else center).to(x)
        return torch.einsum("...hd,hde->...he", moved, self.basis.to(x))

    def undo(self, z: Tensor) -> Tensor:
        """z R + c."""
        return torch.einsum("...hd,hde->...he", z, self.inverse.to(z)) + self.center.to(z)


@dataclass(frozen=True, eq=False)  # an object is its own key: a layer's constants never change
class LayerConstants:
    """One layer's constants, None where there is nothing to do: the fields of both `Transform`s, and

    outlier_center: (KV heads, D) fp32, in the place of key_center for keys nearer to it; comes with a key_center.
    key_scale, value_scale: (KV heads, D) fp32, the steps of static formats.
    """

    key_center: Tensor | None = None
    key_basis: Tensor | None = None
    key_inverse: Tensor | None = None
    key_feedback: Tensor | None = None
    outlier_center: Tensor | None = None
    value_center: Tensor | None = None
    value_basis: Tensor | None = None
    value_inverse: Tensor | None = None
    value_feedback: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

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
        named = {
            f"{name}_{f.name}": getattr(transform, f.name)
            for name, transform in (("key", key), ("value", value))
            for f in fields(Transform)
            if transform is not None
        }
        return cls(**named, outlier_center=outlier_center, key_scale=key_scale, value_scale=value_scale)

    @property
    def key(self) -> Transform | None:
        return _transform(self.key_center, self.key_basis, self.key_inverse, self.key_feedback)

    @property
    def value(self) -> Transform | None:
        return _transform(self.value_center, self.value_basis, self.value_inverse, self.value_feedback)

    def restore_keys(self, z: Tensor, is_outlier: Tensor) -> Tensor:
        """z R and the center that was taken. is_outlier: (..., KV heads) bool, which keys took the outlier center."""
        if self.key is None:
            return z
        keys = self.key.undo(z)
        if self.outlier_center is None:
            return keys
        return keys + (self.outlier_center - self.key.center).to(z) * is_outlier[..., None]

    def prepare_queries(self, query: Tensor) -> Tensor:
        """q R^T or q · s. query: (..., KV heads, queries, D), the queries of a KV head together."""
        if self.key is not None:
            query = query @ self.key.inverse.to(query).mT
        return query if self.key_scale is None else query * self.key_scale.to(query)[:, None]

    def to(self, device: torch.device | str) -> LayerConstants:
        """The same on another device."""
        moved = ((f.name, getattr(self, f.name)) for f in fields(self))
        return LayerConstants(**{name: x if x is None else x.to(device) for name, x in moved})


IDENTITY = LayerConstants()


def _transform(*parts: Tensor | None) -> Transform | None:
    given = [x for x in parts if x is not None]
    return Transform(*given) if len(given) == len(parts) else None


def sixteen_bits(x: Tensor) -> Tensor:
    """x rounded to numbers that both 16-bit dtypes hold exactly, as bf16: 8 digits, nothing below 2^-14."""
    rounded = x.to(torch.bfloat16).clamp(-(2.0**15), 2.0**15)
    return torch.where(rounded.abs() < SMALLEST, 0, rounded).contiguous()


def make_transform(center: Tensor, basis: Tensor, feedback: Tensor) -> Transform:
    """From exact matrices. The inverse belongs to the basis as it was rounded."""
    rounded = sixteen_bits(basis)
    inverse = sixteen_bits(torch.linalg.inv(rounded.double()))
    return Transform(center.float(), rounded, inverse, sixteen_bits(feedback))
