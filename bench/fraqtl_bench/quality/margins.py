"""What rows say about each other: margins between the paradigms, and the law's points summed up."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fraqtl_bench.quality.law import BITS, PROJECTION, QUANTIZATION, Point
from fraqtl_bench.quality.schema import Law, LawLine, LawRatio, Row

PARADIGM = {"quantisation": "precision", "server": "precision", "rank": "deletion", "hybrid": "deletion"}
POINTS_KEPT = 2000


def add_margins(rows: Sequence[Row]) -> None:
    """Give each row its margin: the best of the other paradigm at its budget and side, minus itself, in perplexity."""
    for row in rows:
        others = [
            other.perplexity
            for other in rows
            if other.family in PARADIGM
            and row.family in PARADIGM
            and PARADIGM[other.family] != PARADIGM[row.family]
            and "server" not in (other.family, row.family)
            and (other.budget, other.side) == (row.budget, row.side)
            and other.perplexity is not None
        ]
        if others and row.perplexity is not None:
            row.margin = min(others) - row.perplexity


def summarize_law(points: Sequence[Point]) -> Law:
    """Means per kind and bits, ratios of projection to quantization, and at most 2000 points for the figure."""
    groups = {(p.kind, p.bits): [q for q in points if (q.kind, q.bits) == (p.kind, p.bits)] for p in points}
    lines = [_line(kind, bits, group) for (kind, bits), group in groups.items()]
    by_bits = {line.bits: line for line in lines if line.kind == QUANTIZATION}
    dropped = next((line for line in lines if line.kind == PROJECTION), None)
    ratios = []
    for bits in BITS if dropped else ():
        assert dropped is not None
        quantized = by_bits[bits]
        ratios.append(
            LawRatio(
                bits=bits,
                measured=dropped.measured / quantized.measured,
                predicted=dropped.predicted / quantized.predicted,
                published=3.0 * 4**bits,
            )
        )
    kept = points[:: -(-len(points) // POINTS_KEPT)] if points else []
    shown = [(p.kind, p.bits, _short(p.predicted), _short(p.measured)) for p in kept]
    return Law(lines=lines, ratios=ratios, points=shown)


def _line(kind: str, bits: int, group: list[Point]) -> LawLine:
    measured, predicted, published = (
        fmean(getattr(p, name) for p in group) for name in ("measured", "predicted", "published")
    )
    near = [0.75 <= p.measured / p.predicted <= 1.25 for p in group if p.predicted > 0]
    return LawLine(
        kind=kind,
        bits=bits,
        points=len(group),
        measured=measured,
        predicted=predicted,
        ratio=measured / predicted,
        published_ratio=measured / published,
        within_quarter=fmean(near),
    )


def _short(x: float) -> float:
    return float(f"{x:.4g}")
