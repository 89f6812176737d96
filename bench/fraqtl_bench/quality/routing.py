"""Routing: for each (layer, head, query), which key gets the most attention, and whether storing changes it.

Queries and keys are those of the model with an untouched cache, so this is the damage that a layer's own keys
do, without that of the layers below. The margin of a decision is the probability of the first key minus that
of the second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.quality.fitted import Fitted, FittedStream
from fraqtl_bench.quality.recent import Recent
from fraqtl_bench.quality.watch import Seen, watching

MARGINS = (0.0, 0.01, 0.05, 0.2, 0.5)  # lower ends; the last bin reaches to 1


@dataclass
class Routing:
    """Counts over decisions. decisions, flips: per bin of MARGINS. divergence: summed KL(exact || stored), nats."""

    decisions: list[int] = field(default_factory=lambda: [0] * len(MARGINS))
    flips: list[int] = field(default_factory=lambda: [0] * len(MARGINS))
    divergence: float = 0.0

    def add(self, other: Routing) -> None:
        self.decisions = [a + b for a, b in zip(self.decisions, other.decisions, strict=True)]
        self.flips = [a + b for a, b in zip(self.flips, other.flips, strict=True)]
        self.divergence += other.divergence

    @property
    def share(self) -> float:
        """Share of decisions that flipped."""
        return sum(self.flips) / max(1, sum(self.decisions))

    @property
    def mean_divergence(self) -> float:
        return self.divergence / max(1, sum(self.decisions))


def divergence(exact: Tensor, stored: Tensor) -> Tensor:
    """KL(softmax(exact) || softmax(stored)) over the last dimension, in nats; masked scores are -inf or very low."""
    p, q = exact.log_softmax(-1), stored.log_softmax(-1)
    return (p.exp() * (p - q).nan_to_num(0.0)).sum(-1)


def compare(exact: Tensor, stored: Tensor) -> Routing:
    """Scores (heads, rows, T) of the exact and of the stored keys."""
    top = exact.softmax(-1).topk(2, -1).values
    margin = top[..., 0] - top[..., 1]
    flipped = exact.argmax(-1) != stored.argmax(-1)
    bins = torch.bucketize(margin, torch.tensor(MARGINS[1:], device=margin.device), right=True)
    count = len(MARGINS)
    return Routing(
        torch.bincount(bins.flatten(), minlength=count).tolist(),
        torch.bincount(bins[flipped], minlength=count).tolist(),
        float(divergence(exact, stored).double().sum()),
    )


def stored_scores(seen: Seen, rows: Tensor, stream: FittedStream) -> Tensor:
    """(query heads, rows, T): scores of the queries at `rows` with the keys as each finds them stored."""
    if not isinstance(stream.codec, Recent):
        return seen.scores(rows, stream.round_trip(seen.key[None])[0])
    old, new = (seen.scores(rows, x[0]) for x in stream.codec.states(seen.key[None], stream.constants))
    return torch.where(stream.codec.is_new(rows[:, None], torch.arange(old.shape[-1])).to(old.device), new, old)


@torch.inference_mode()
def measure_routing(model: Any, ids: tuple[int, ...], methods: list[Fitted], queries: int) -> dict[str, Routing]:
    """Routing of every method whose keys are stored, over the tokens of one window and `queries` of its positions."""
    found = {m.method.name: Routing() for m in methods}

    def handle(seen: Seen) -> None:
        rows = seen.rows(queries)
        exact = seen.scores(rows)
        for fitted in methods:
            stored = stored_scores(seen, rows, fitted.layers[seen.layer].key)
            found[fitted.method.name].add(compare(exact, stored))

    with watching(model, handle):
        model(torch.tensor([ids], device=model.device), use_cache=False)
    return found
