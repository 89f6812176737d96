"""The ways of storing a vector in 4 bits that the ablation compares.

A key is prepared (centered, smoothed, rotated), put on a grid with a scale of its own, and brought
back. With two centers, one for ordinary keys and one for sinks, a key takes the one that leaves the
smaller maximum (`fraqtl_kernels.constants` says where that is noted, at no cost in bytes). A value is
rotated and put on the grid. With step s (fp16) the value of code c = 0..15 is

- symmetric: (c - 8) · s with s = f · max|x| / 7, the usual signed INT4;
- midpoint: (c - 7.5) · s with s = f · max|x| / 7.5, the grid of `fraqtl_kernels.formats`;
- asymmetric: l + c · s with s = f · (max - min) / 15 and l (fp16) the shrunk minimum, 2 bytes more.

The factor f is the choice of scale: 1 (absmax); the one that puts the extreme on the outer edge of
the last cell rather than on its middle (edge: 15/16, at no larger rounding error than half a step);
7/8 (clip); or, per vector, whichever of k/16, k = 10..16, gives the least squared error (mse).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from fraqtl_kernels.calibration.solve import far_from_the_median
from fraqtl_kernels.formats import SCALE_BYTES, SCALE_DTYPE
from fraqtl_kernels.rotation import hadamard

LEVELS = 15
GRIDS = ("symmetric", "asymmetric", "midpoint")
ROTATIONS = ("none", "hadamard")
CENTERINGS = ("none", "mean", "sinks")
SMOOTHINGS = ("none", "magnitude", "balanced", "powers")
SCALES = ("absmax", "edge", "clip", "mse")
CLIP = 0.875
SEARCHED = tuple(k / 16 for k in range(16, 9, -1))
_ZERO_CODE = {"symmetric": 8.0, "midpoint": 7.5}
_LARGEST_CODE = {"symmetric": 7.0, "midpoint": 7.5}
_EDGE = {"symmetric": 14 / 15, "midpoint": 15 / 16, "asymmetric": 15 / 16}


@dataclass(frozen=True)
class Variant:
    """One combination. Centering and smoothing are for keys only and need calibration."""

    grid: str
    rotation: str
    scale: str
    centering: str = "none"
    smoothing: str = "none"

    @property
    def name(self) -> str:
        return f"{self.grid}/{self.rotation}/{self.scale}/{self.centering}/{self.smoothing}"

    @property
    def is_calibrated(self) -> bool:
        return self.centering != "none" or self.smoothing != "none"

    @property
    def values(self) -> Variant:
        """The variant in which the values are stored: the same without centering and smoothing."""
        return Variant(self.grid, self.rotation, self.scale)

    def bytes(self, head_size: int) -> int:
        """Bytes of one vector: codes, fp16 scale, and fp16 minimum if asymmetric."""
        return head_size // 2 + SCALE_BYTES * (2 if self.grid == "asymmetric" else 1)

    def bytes_per_token(self, head_size: int) -> int:
        """Bytes per (token, KV head). Centers and smoothing factors are per head, not per token."""
        return self.bytes(head_size) + self.values.bytes(head_size)


PLAIN = Variant("symmetric", "none", "absmax")


def key_variants() -> Iterator[Variant]:
    for parts in product(GRIDS, ROTATIONS, SCALES, CENTERINGS, SMOOTHINGS):
        yield Variant(*parts)


def value_variants() -> Iterator[Variant]:
    for parts in product(GRIDS, ROTATIONS, SCALES):
        yield Variant(*parts)


@dataclass(frozen=True)
class Encoded:
    """Codes (..., D) as floats, scales (...) fp16, and minima (...) fp16 of the asymmetric grid."""

    grid: str
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    def decode(self) -> Tensor:
        """(..., D) values in the dtype of the codes."""
        scale = self.scale.to(self.codes.dtype).unsqueeze(-1)
        if self.minimum is not None:
            return self.minimum.to(self.codes.dtype).unsqueeze(-1) + self.codes * scale
        return (self.codes - _ZERO_CODE[self.grid]) * scale


def encode(x: Tensor, grid: str, factor: float = 1.0) -> Encoded:
    """x (..., D) on a grid, with the scale of every vector times `factor`; see the module's docstring."""
    if grid == "asymmetric":
        low, high = x.amin(-1), x.amax(-1)
        middle, half = (high + low) / 2, (high - low) / 2 * factor
        minimum = (middle - half).to(SCALE_DTYPE)
        scale = (2 * half / LEVELS).to(SCALE_DTYPE)
        steps = (x - minimum.to(x.dtype).unsqueeze(-1)) / scale.to(x.dtype).unsqueeze(-1)
        return Encoded(grid, _to_codes(steps), scale, minimum)
    scale = (x.abs().amax(-1) / _LARGEST_CODE[grid] * factor).clamp_max(torch.finfo(SCALE_DTYPE).max).to(SCALE_DTYPE)
    steps = x / scale.to(x.dtype).unsqueeze(-1) + _ZERO_CODE[grid]
    return Encoded(grid, _to_codes(steps), scale)


def _to_codes(steps: Tensor) -> Tensor:
    return steps.nan_to_num(0.0).round().clamp(0, LEVELS)


def on_grid(x: Tensor, grid: str, scale: str) -> Tensor:
    """x (..., D) as the grid gives it back, with the named choice of scale."""
    if scale != "mse":
        factor = {"absmax": 1.0, "edge": _EDGE[grid], "clip": CLIP}[scale]
        return encode(x, grid, factor).decode()
    best = encode(x, grid).decode()
    least = (best - x).square().sum(-1, keepdim=True)
    for factor in SEARCHED[1:]:
        found = encode(x, grid, factor).decode()
        error = (found - x).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best


def tie_pairs(square: Tensor) -> Tensor:
    """Mean squares (D,) averaged over each RoPE pair (i, i + D/2), so that they commute with RoPE."""
    low, high = square.chunk(2, -1)
    return ((low + high) / 2).repeat(2)


@dataclass(frozen=True)
class Constants:
    """What calibration finds for one KV head: a center (D,), factors (D,) that keys are divided by, and perhaps a
    second center (D,) for sinks."""

    center: Tensor
    factor: Tensor
    outlier_center: Tensor | None = None

    @classmethod
    def calibrate(cls, key: Tensor, query: Tensor, variant: Variant) -> Constants:
        """From keys (T, D) and queries (n, D) of a calibration sample.

        center: the mean key; with centering `sinks`, keys that are far from the median are left out of everything
        and have a mean of their own. factor: `magnitude` is the rms m_k of a RoPE pair over the (centered)
        keys, `balanced` is sqrt(m_k / m_q) with the rms m_q of the queries. The latter is the least
        of sum_i m_q,i² f_i² · sum_j m_k,j² / f_j², the mean squared error of q·k when the rotation
        spreads the error of key / f evenly (Cauchy-Schwarz); `powers` are the nearest powers of two.
        """
        outlier_center = None
        if variant.centering == "sinks" and (far := far_from_the_median(key[:, None])[:, 0]).any():
            outlier_center, key = key[far].mean(0), key[~far]
        center = torch.zeros_like(key[0]) if variant.centering == "none" else key.mean(0)
        if variant.smoothing == "none":
            return cls(center, torch.ones_like(center), outlier_center)
        size = tie_pairs((key - center).square().mean(0)).sqrt()
        if variant.smoothing != "magnitude":
            size = (size / tie_pairs(query.square().mean(0)).sqrt().clamp_min(1e-6)).sqrt()
        size = size.clamp_min(1e-4 * size.max())
        if variant.smoothing == "powers":
            logs = size.log2()
            size = (logs - logs.mean()).round().exp2()
        return cls(center, size, outlier_center)

    def prepare_key(self, key: Tensor) -> Tensor:
        return (key - self.center) / self.factor

    def restore_key(self, key: Tensor) -> Tensor:
        return key * self.factor + self.center

    def prepare_query(self, query: Tensor) -> Tensor:
        """The query that sees prepared keys: q·k - q·center = (q · factor)·((k - center) / factor)."""
        return query * self.factor


def store(x: Tensor, variant: Variant, constants: Constants | None = None) -> Tensor:
    """Keys or values (T, D) after a round trip through the variant, in the original basis."""
    if constants is None:
        return _round_trip(x, variant)[0]
    stored, largest = _round_trip(constants.prepare_key(x), variant)
    stored = constants.restore_key(stored)
    if constants.outlier_center is None:
        return stored
    moved = replace(constants, center=constants.outlier_center)
    as_outlier, largest_as_outlier = _round_trip(moved.prepare_key(x), variant)
    return torch.where((largest_as_outlier < largest)[:, None], moved.restore_key(as_outlier), stored)


def _round_trip(x: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """x (T, D) rotated, put on the grid and rotated back, and the largest magnitude (T,) that the grid had to reach."""
    if variant.rotation == "none":
        return on_grid(x, variant.grid, variant.scale), x.abs().amax(-1)
    rotation = hadamard(x.shape[-1]).to(x.dtype)
    rotated = x @ rotation
    return on_grid(rotated, variant.grid, variant.scale) @ rotation.T, rotated.abs().amax(-1)
