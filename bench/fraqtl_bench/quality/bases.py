"""Bases in which vectors are stored: what is kept of each, and its matrix.

A basis has D orthonormal columns; a method may use only `rank` of them, those whose coordinates vary
most over the calibration sample. PCA is computed per KV head. The columns of a PCA basis must be
kept; the Hadamard matrix follows from D, and a random basis from a seed, so of these only the
choice of columns is kept.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fraqtl_bench.quality.grids import FP16_BITS, Kept
from fraqtl_kernels.errors import UnsupportedError, one_of
from fraqtl_kernels.rotation import hadamard

BASES = ("identity", "random", "hadamard", "pca")
SEED_BITS = 64
INDEX_BITS = 16


@cache
def random_basis(size: int, seed: int) -> Tensor:
    """(D, D) float64, uniform over the orthogonal matrices (QR of a Gaussian matrix with the signs of R set)."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def principal_basis(sample: Tensor) -> Tensor:
    """sample (H, T, D) -> (H, D, D) float64: eigenvectors of the covariance, the largest variance first."""
    centered = sample.double() - sample.double().mean(-2, keepdim=True)
    return torch.linalg.eigh(centered.mT @ centered).eigenvectors.flip(-1)


def _fixed(kind: str, size: int, seed: int) -> Tensor:
    if kind == "identity":
        return torch.eye(size, dtype=torch.float64)
    if kind == "random":
        return random_basis(size, seed)
    if kind != "hadamard":
        raise one_of("basis", kind, BASES)
    try:
        return hadamard(size)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def fit_basis(kind: str, sample: Tensor, rank: int, seed: int) -> Kept:
    """What must be kept of a basis. sample: (H, T, D) calibration vectors."""
    heads, _, size = sample.shape
    if kind == "pca":
        return {"basis": principal_basis(sample)[..., :rank].to(torch.float16)}
    kept: Kept = {}
    if kind == "random":
        kept["seed"] = torch.full((heads,), seed, dtype=torch.int64, device=sample.device)
    if rank < size:
        variance = (sample.double() @ _fixed(kind, size, seed).to(sample.device)).var(-2)
        kept["columns"] = variance.argsort(dim=-1, descending=True, stable=True)[..., :rank].to(torch.int16)
    return kept


def matrix(kind: str, kept: Kept, size: int, device: torch.device) -> Tensor:
    """The columns (H or 1, D, rank), float32, from what was kept."""
    if kind == "pca":
        return kept["basis"].float()
    seed = int(kept["seed"][0]) if kind == "random" else 0
    whole = _fixed(kind, size, seed).float().to(device)
    if "columns" not in kept:
        return whole.unsqueeze(0)
    return whole.T[kept["columns"].long()].mT


def basis_bits(kind: str, size: int, rank: int) -> int:
    """Bits that `fit_basis` keeps per KV head."""
    if kind == "pca":
        return FP16_BITS * size * rank
    return (SEED_BITS if kind == "random" else 0) + (INDEX_BITS * rank if rank < size else 0)
