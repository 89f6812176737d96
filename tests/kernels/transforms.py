"""Constants as calibration might make them, without the statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.constants import LayerConstants, Transform, make_transform
from fraqtl_kernels.formats import FORMATS, KVFormat
from fraqtl_kernels.rotation import hadamard


def random_transform(
    heads: int, size: int, *, spread: int = 3, center: Tensor | None = None, feeds_back: bool = True
) -> tuple[Transform, Tensor]:
    """Channels that are 2^-spread to 2^spread times as large as others, and these factors (KV heads, D).

    At head sizes 64 and 256 its matrices are exact, and so are their products with small integers.
    """
    factor = torch.exp2(torch.randint(-spread, spread + 1, (heads, size)).float())
    basis = hadamard(size).float() / factor[..., None]
    feedback = torch.randint(-4, 5, (heads, size // 2, size // 2)) / 16 if feeds_back else None
    center = torch.randn(heads, size) * factor if center is None else center
    return make_transform(center, basis, feedback), factor


def random_constants(
    heads: int, size: int, format: KVFormat = FORMATS["k4v4"]
) -> tuple[LayerConstants, Tensor, Tensor]:
    """With sinks, and the factors of key and value channels."""
    key, key_factor = random_transform(heads, size, feeds_back=format.k.has_feedback)
    # Small, so that it doesn't hide what the values themselves add to an output
    center = torch.randn(heads, size) / 4
    value, value_factor = random_transform(heads, size, center=center, feeds_back=format.v.has_feedback)
    outlier = 4 * torch.randn(heads, size) * key_factor
    return LayerConstants.of(key, value, outlier), key_factor, value_factor


def without_centers(format: KVFormat, size: int) -> LayerConstants:
    """Of one KV head, with channels that are all alike."""
    center = torch.zeros(1, size)
    key, value = (
        random_transform(1, size, spread=0, center=center, feeds_back=vector.has_feedback)[0]
        for vector in (format.k, format.v)
    )
    return LayerConstants.of(key, value)


def only_center(center: Tensor) -> LayerConstants:
    """Keys (KV heads, D) are moved and rotated, no more."""
    heads, size = center.shape
    half = size // 2
    basis = hadamard(size).float().expand(heads, size, size)
    return LayerConstants.of(make_transform(center, basis, torch.zeros(heads, half, half)))
