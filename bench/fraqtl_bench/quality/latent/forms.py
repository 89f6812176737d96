"""In which forms a latent and the key beside it are kept, and what they come to in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec
from fraqtl_bench.quality.grids import Kept
from fraqtl_bench.quality.latent.absorbed import LatentSample, cost, rope_cost
from fraqtl_bench.quality.rivals.floats import LARGEST_E4M3, to_e4m3
from fraqtl_bench.quality.server_codec import ServerStream
from fraqtl_kernels.calibration.solve import DIRECTION_FLOOR, mean_of, solve_transform, weighted_covariance
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import KVFormat, VectorFormat

REAL_LATENT, REAL_ROPE = 512, 64
"""Dimensions in DeepSeek-V2 and V3, Kimi K2 and GLM-5."""
TILE, TILE_SCALE_BYTES = 128, 4  # of vLLM's fp8_ds_mla

INT8 = VectorFormat(8)
INT4 = VectorFormat(4)
ROTATED = VectorFormat(4, rotated=True)
CALIBRATED = VectorFormat(4, rotated=True, calibrated=True)
BF16 = VectorFormat(16, raw_dtype=torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """of_scores, of_values: what a calibrated latent's basis is chosen for; neither: for the latents alone."""

    name: str
    latent: VectorFormat | None
    """None: vLLM's fp8_ds_mla."""
    rope: VectorFormat
    of_scores: bool = True
    of_values: bool = True

    @property
    def token_bytes(self) -> int:
        """Of one layer of a model of the usual size."""
        if self.latent is None:
            latent = REAL_LATENT + REAL_LATENT // TILE * TILE_SCALE_BYTES
        else:
            latent = self.latent.bytes(REAL_LATENT)
        return latent + self.rope.bytes(REAL_ROPE)


FORMS = (
    Form("bf16", BF16, BF16),
    Form("fp8_ds_mla", None, BF16),
    Form("latent 8", INT8, BF16),
    Form("latent 8, rope 8", INT8, INT8),
    Form("latent 4, not rotated", INT4, BF16),
    Form("latent 4, rotated", ROTATED, BF16),
    Form("latent 4, basis of the latents", CALIBRATED, BF16, of_scores=False, of_values=False),
    Form("latent 4, basis of keys", CALIBRATED, BF16, of_values=False),
    Form("latent 4, basis of values", CALIBRATED, BF16, of_scores=False),
    Form("latent 4, basis of both", CALIBRATED, BF16),
    Form("latent 4, basis of both, rope 8", CALIBRATED, INT8),
    Form("latent 4, basis of both, rope 4", CALIBRATED, CALIBRATED),
)


@dataclass(frozen=True)
class Side:
    """What is done to the latent, or to the key beside it."""

    codec: Codec | None
    """None: vLLM's tiles of e4m3."""
    constants: Kept

    def round_trip(self, x: Tensor) -> Tensor:
        """x: (..., 1, T, D)."""
        return _in_tiles(x) if self.codec is None else self.codec.round_trip(x, self.constants)


def fit(form: Form, samples: Sequence[LatentSample]) -> tuple[Side, Side]:
    """Latent and key of one layer. samples: of that layer, one a text."""
    if form.latent is None:
        latent = Side(None, {})
    else:
        of_both = {"of_scores": form.of_scores, "of_values": form.of_values}
        spent = sum((cost(sample, **of_both) for sample in samples), torch.zeros(()))
        latent = _side(form.latent, torch.cat([s.latent for s in samples]), spent)
    spent = sum((rope_cost(sample) for sample in samples), torch.zeros(()))
    return latent, _side(form.rope, torch.cat([s.rope_key for s in samples]), spent)


def _side(vector: VectorFormat, x: Tensor, spent: Tensor) -> Side:
    """x: (T, D). spent: (D, D), what an error costs; of any unit, zeros for its square."""
    codec = ServerStream(KVFormat("latent", vector, vector, ""), "value")
    if not vector.calibrated:
        return Side(codec, {})
    by_head, alike = x[:, None], torch.ones(len(x), 1)
    center = mean_of(by_head, alike)
    covariance = weighted_covariance(by_head - center, alike, tied=False)
    square, hessian = torch.eye(x.shape[1]).to(covariance), spent.to(covariance)
    mean = hessian.diagonal().mean()
    hessian = (1 - DIRECTION_FLOOR) * hessian / mean + DIRECTION_FLOOR * square if mean > 0 else square
    constants = LayerConstants.of(value=solve_transform(center, covariance, hessian[None]))
    return Side(codec, constants.tensors())


def _in_tiles(x: Tensor) -> Tensor:
    tiles = x.float().unflatten(-1, (-1, min(TILE, x.shape[-1])))
    scale = (tiles.abs().amax(-1, keepdim=True) / LARGEST_E4M3).clamp_min(torch.finfo(torch.float32).tiny)
    return (to_e4m3(tiles / scale).float() * scale).flatten(-2).to(x.dtype)
