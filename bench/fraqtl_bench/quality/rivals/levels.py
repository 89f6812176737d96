"""Levels of scalar quantizers: Lloyd's algorithm on samples, and the best levels for a normal variable."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

ROUNDS = 50


def fit_levels(x: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """(count,) float32: levels of least squared error over all of x, each sample of it times its weight.

    Weighted k-means in one dimension. It starts at the weighted quantiles, so equal samples give equal levels.
    """
    sorted_x, order = x.flatten().double().sort()
    w = torch.ones_like(sorted_x) if weights is None else weights.flatten().double()[order]
    w = w / w.sum().clamp_min(1e-300)
    sums = torch.nn.functional.pad(torch.stack([w, w * sorted_x]).cumsum(-1), (1, 0))
    wanted = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    levels = sorted_x[torch.searchsorted(sums[0, 1:].contiguous(), wanted).clamp_max(len(sorted_x) - 1)]
    for _ in range(ROUNDS):
        inner = torch.searchsorted(sorted_x, midpoints(levels))
        edges = torch.nn.functional.pad(inner, (1, 0)), torch.nn.functional.pad(inner, (0, 1), value=len(sorted_x))
        mass, total = sums[:, edges[1]] - sums[:, edges[0]]
        levels = torch.where(mass > 0, total / mass, levels)
    return levels.float()


@cache
def normal_levels(bits: int) -> Tensor:
    """(2^bits,) float32: the levels of least squared error for a standard normal variable (Max 1960, Lloyd 1982)."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    levels = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(500):
        edges = torch.cat([torch.tensor([-math.inf]), midpoints(levels), torch.tensor([math.inf])])
        density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
        mass = normal.cdf(edges).diff()
        levels = -density.diff() / mass
    return levels.float()


def midpoints(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest of the sorted levels as uint8 codes; between two it is the upper one."""
    return torch.bucketize(x.contiguous(), midpoints(levels), right=True).to(torch.uint8)
