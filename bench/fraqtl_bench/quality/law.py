"""The perturbation law: what a small change of the keys does to attention, predicted and measured.

Let p be a query's attention and q' = q · scale. A change of the keys along a unit vector u, independent from key to key
with variance s², changes the scores by (q'·u) times that, and to second order

    KL(p || p') = 1/2 · s² · uᵀGu        G = mean over queries of (1 - sum_j p_j²) q' q'ᵀ

as 1 - sum p² is the trace of the softmax's Fisher matrix diag(p) - p pᵀ.

- Projection drops u: s² = σ², the variance of the keys along u (their mean changes no attention).
- Quantization of the coordinate to b bits on [-R, R], with R the largest of them, has s² = R² / (3 · 2^(2b)).

So dropping costs 3 · 2^(2b) · (σ/R)² times as much as quantizing. The published form puts σ for R, which is true
of coordinates ±σ only; both are reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quality.bases import principal_basis
from fraqtl_bench.quality.routing import divergence
from fraqtl_bench.quality.watch import Seen, watching

BITS = tuple(range(1, 9))
PROJECTION, QUANTIZATION, CHANNELS, RANK = "projection", "quantisation", "all channels", "rank"


@dataclass(frozen=True)
class Point:
    """One change of one KV head's keys.

    bits: of a quantization, or kept dimensions of a rank. measured, predicted: mean KL over queries, nats.
    published: the prediction with σ in the place of R; equal to `predicted` for projections.
    """

    kind: str
    bits: int
    layer: int
    head: int
    measured: float
    predicted: float
    published: float


def quantize_coordinate(c: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Coordinates c (T, n) centered, each column on 2^b cells over [-R, R]; returns the values and R (n,)."""
    largest = c.abs().amax(0)
    step = 2 * largest / 2**bits
    half = 2 ** (bits - 1)
    return ((c / step).floor().clamp(-half, half - 1) + 0.5) * step, largest


@dataclass(frozen=True)
class _Head:
    """One KV head: scores (g, n, T), scaled queries (g, n, D), keys (T, D), and the trace 1 - sum p² (g, n)."""

    layer: int
    head: int
    scores: Tensor
    query: Tensor
    key: Tensor
    trace: Tensor

    def along(self, directions: Tensor) -> Tensor:
        """uᵀGu of the columns of (D, n): (n,)."""
        return ((self.query @ directions).square() * self.trace.unsqueeze(-1)).mean((0, 1))

    def divergence(self, change: Tensor) -> float:
        """Mean KL if the keys change by (T, D)."""
        return float(divergence(self.scores, self.scores + (self.query @ change.mT).double()).mean())

    def point(self, kind: str, bits: int, change: Tensor, predicted: Tensor, published: Tensor) -> Point:
        measured = self.divergence(change)
        return Point(kind, bits, self.layer, self.head, measured, float(predicted.sum()), float(published.sum()))


def heads_of(seen: Seen, queries: int) -> Iterator[_Head]:
    rows = seen.rows(queries)
    scores = seen.scores(rows).double()  # divergences down to 1e-12 are compared
    group = seen.query.shape[0] // seen.key.shape[0]
    for h in range(seen.key.shape[0]):
        own = slice(h * group, (h + 1) * group)
        trace = 1 - scores[own].softmax(-1).square().sum(-1)
        query = seen.query[own][:, rows].float() * seen.scale
        yield _Head(seen.layer, h, scores[own], query, seen.key[h].float(), trace)


def points_of(head: _Head) -> Iterator[Point]:
    """Four principal directions, each dropped and quantized; then all channels quantized, and rank reductions."""
    size = head.key.shape[-1]
    centered = head.key - head.key.mean(0)
    basis = principal_basis(head.key.unsqueeze(0))[0].float()
    for index in (0, size // 8, size // 2, size - 1):
        u = basis[:, index : index + 1]
        c = centered @ u
        variance, g = c.square().mean(0), head.along(u)
        yield head.point(PROJECTION, 0, -c @ u.T, variance * g / 2, variance * g / 2)
        for bits in BITS:
            stored, largest = quantize_coordinate(c, bits)
            noise = g / (2 * 3 * 4**bits)
            yield head.point(QUANTIZATION, bits, (stored - c) @ u.T, largest.square() * noise, variance * noise)
    g = head.along(torch.eye(size, device=head.key.device))
    for bits in BITS:
        stored, largest = quantize_coordinate(centered, bits)
        noise = g / (2 * 3 * 4**bits)
        variance = centered.square().mean(0)
        yield head.point(CHANNELS, bits, stored - centered, largest.square() * noise, variance * noise)
    in_basis, g = centered @ basis, head.along(basis)
    for kept in (size // 8, size // 4, size // 2, size * 3 // 4):
        dropped = basis[:, kept:]
        predicted = (in_basis.square().mean(0) * g / 2)[kept:]
        yield head.point(RANK, kept, -centered @ dropped @ dropped.T, predicted, predicted)


@torch.inference_mode()
def law_points(model: Any, ids: Sequence[int], queries: int, layers: Sequence[int]) -> list[Point]:
    """The points of the given layers, over one window. Layers with capped scores are left out: the law has no cap."""
    found: list[Point] = []

    def handle(seen: Seen) -> None:
        if seen.layer in layers and not seen.soft_cap:
            for head in heads_of(seen, queries):
                found.extend(points_of(head))

    with watching(model, handle):
        model(torch.tensor([list(ids)], device=model.device), use_cache=False)
    return found
