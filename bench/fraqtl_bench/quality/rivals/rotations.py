"""Hadamard rotations of parts of a vector, as rivals use them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.rotation import hadamard


@cache
def _matrix(order: int) -> Tensor:
    return hadamard(order).float()


def rotate(x: Tensor, order: int, *, back: bool = False) -> Tensor:
    """x (..., D), every run of `order` dimensions by the orthonormal Hadamard matrix; order 1 changes nothing."""
    if order == 1:
        return x
    matrix = _matrix(order).to(x.device)
    return (x.unflatten(-1, (-1, order)) @ (matrix.T if back else matrix)).flatten(-2)


def check_power_of_two(name: str, size: int) -> None:
    """Raises UnsupportedError for a head size that Sylvester's Hadamard matrix doesn't have."""
    if size & (size - 1):
        raise UnsupportedError(f"{name}: its rotation needs a head size that is a power of two, not {size}")


def signs(size: int, seed: int) -> Tensor:
    """(size,) of ±1, drawn."""
    drawn = torch.bernoulli(torch.full((size,), 0.5), generator=torch.Generator().manual_seed(seed))
    return 2 * drawn - 1
