"""What a model's rows say about the claim: the best of either paradigm at each budget, and what the basis changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fraqtl_bench.quality.schema import ModelReport, Row

MAIN_BUDGET = 4


@dataclass(frozen=True)
class Duel:
    """The methods of least perplexity on both sides of the cache at one budget, and who wins each measure."""

    budget: float
    precision: Row
    deletion: Row

    @property
    def margin(self) -> float:
        """Perplexity of deletion minus that of precision."""
        return (self.deletion.perplexity or 0.0) - (self.precision.perplexity or 0.0)

    def wins(self) -> dict[str, bool | None]:
        """Whether precision is strictly better, by measure; None where it was not measured or both are equal."""
        a, b = self.precision, self.deletion
        pairs = {
            "perplexity": (a.perplexity, b.perplexity),
            "needle": (b.needle_accuracy, a.needle_accuracy),
            "flips": (a.flips, b.flips),
        }
        return {name: None if x is None or y is None or x == y else x < y for name, (x, y) in pairs.items()}


def duels(model: ModelReport) -> Iterator[Duel]:
    """One per budget at which both paradigms were measured, without the server's formats."""
    for budget in sorted({row.budget for row in model.rows}):
        precision, deletion = best_at(model, budget, "quantisation"), best_at(model, budget, "rank", "hybrid")
        if precision and deletion:
            yield Duel(budget, precision, deletion)


def best_at(model: ModelReport, budget: float, *families: str) -> Row | None:
    """The row of least perplexity at a budget, among those of `families` on both sides of the cache."""
    found = [
        row
        for row in model.rows
        if row.side == "kv" and row.perplexity is not None and row.budget == budget and row.family in families
    ]
    return min(found, key=lambda row: row.perplexity or 0.0, default=None)


def basis_spread(model: ModelReport, kind: str) -> float | None:
    """Largest minus smallest perplexity of a kind of method (int4-channel, rank16) over its bases."""
    found = [
        row.perplexity
        for row in model.rows
        if row.method.split("@")[0] == kind and row.side == "kv" and row.perplexity is not None
    ]
    return max(found) - min(found) if len(found) > 1 else None


def spreads(model: ModelReport) -> dict[str, float]:
    """The basis spread of every kind that was measured in several bases."""
    kinds = dict.fromkeys(row.method.split("@")[0] for row in model.rows if "@" in row.method)
    found = {kind: basis_spread(model, kind) for kind in kinds}
    return {kind: spread for kind, spread in found.items() if spread is not None}
